"""*slice-lm-head-onnx*: logits of the last position only, for every row of the batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from manifests.errors import ConversionError
from passes.base import Context, Form, Intermediate, TransformPass, named_failure
from passes.export.slice_lm_head import check_lm_head, lm_head_layers
from passes.onnx.graph import OnnxGraph
from passes.store import digest
from passes.vocabulary import Component

if TYPE_CHECKING:
    import onnx_ir as ir

    from passes.onnx.graph import Detached

__all__ = ["SliceLmHeadOnnxPass"]


@dataclass(frozen=True)
class SliceLmHeadOnnxPass(TransformPass):
    """Slice the hidden states [batch, sequence, hidden] to [batch, 1, hidden] in front of the LM head's matrix product.

    Batches of prompts are padded on the left, so the last position is the last token of every row.
    """

    name = "slice-lm-head-onnx"
    takes = (Form.ONNX_GRAPH,)

    @property
    def makes(self) -> Form:
        return Form.ONNX_GRAPH

    def check(self, component: Component) -> None:
        check_lm_head(component, self.name)

    def __call__(self, before: Intermediate, context: Context) -> Intermediate:
        """See `TransformPass`."""
        assert isinstance(before, OnnxGraph)
        component = before.component

        def build() -> Detached:
            model, weights = before.build()
            with named_failure(self, component.name, after=["stitch-onnx"]):
                return self.slice(model, component), weights

        return OnnxGraph(component, digest(before.key, str(self), self.version), before, build)

    def slice(self, model: ir.Model, component: Component) -> ir.Model:
        """Slice the graph in place.

        Raises:
            ConversionError: if the graph has no logits, or not exactly one matrix product that can be the LM head.
        """
        import numpy as np
        import onnx_ir as ir

        graph = model.graph
        logits = next((value for value in graph.outputs if value.name == "logits"), None)
        if logits is None or logits.shape is None:
            raise ConversionError("the graph has no logits")
        lm_head = _lm_head(graph, component)
        name = "lm_head/last_position"
        position = ir.Value(
            name=f"{name}/index",
            shape=ir.Shape([1]),
            type=ir.TensorType(ir.DataType.INT64),
            const_value=ir.tensor(np.array([-1], np.int64), name=f"{name}/index"),
        )
        graph.initializers.add(position)
        last = ir.node("Gather", [lm_head.inputs[0], position], {"axis": 1}, name=name)
        last.outputs[0].name = f"{name}.0"
        graph.insert_before(lm_head, last)
        lm_head.replace_input_with(0, last.outputs[0])
        batch, _, vocabulary = logits.shape
        logits.shape = ir.Shape([batch, 1, vocabulary])
        return model


def _lm_head(graph: ir.Graph, component: Component) -> ir.Node:
    """The matrix product that makes the logits."""
    layers = lm_head_layers(component)
    found = [node for node in graph if node.op_type in {"MatMul", "MatMulNBits"} and node.name in layers]
    if len(found) != 1:
        raise ConversionError(
            f"the graph has {len(found)} matrix products among {', '.join(sorted(layers))}, expected only the LM head"
        )
    return found[0]
