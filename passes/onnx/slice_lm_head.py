"""*slice-lm-head-onnx*: logits of the last position only, for every row of the batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from manifests.errors import ConversionError
from passes.base import Pass

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["SliceLmHeadOnnxPass"]


@dataclass(frozen=True)
class SliceLmHeadOnnxPass(Pass):
    """Slice the hidden states [batch, sequence, hidden] to [batch, 1, hidden] in front of the LM head's matrix product.

    With left padding, as decoders are batched, the last position is the last token of every row.
    """

    name = "slice-lm-head-onnx"

    def __call__(self, model: ir.Model) -> ir.Model:
        """Slice the graph in place.

        Raises:
            ConversionError: if the logits do not come from a matrix product.
        """
        import numpy as np
        import onnx_ir as ir

        graph = model.graph
        logits = next((value for value in graph.outputs if value.name == "logits"), None)
        if logits is None or logits.shape is None:
            raise ConversionError("the graph has no logits")
        lm_head = _lm_head(logits)
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


def _lm_head(logits: ir.Value) -> ir.Node:
    """The matrix product that makes the logits."""
    node = logits.producer()
    while node is not None and node.op_type in {"Add", "Cast", "Mul", "Reshape"}:
        node = node.inputs[0].producer() if node.inputs[0] is not None else None
    if node is None or node.op_type not in {"MatMul", "MatMulNBits"}:
        kind = "an input" if node is None else f"a {node.op_type}"
        raise ConversionError(f"the logits come from {kind}, not from a matrix product")
    return node
