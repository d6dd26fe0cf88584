"""*slice-lm-head*: logits of the last position only, for every row of the batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from manifests.errors import BadInputError, ConversionError
from passes.graph_pass import Graph, GraphPass
from passes.vocabulary import Component

if TYPE_CHECKING:
    import openvino as ov

__all__ = ["SliceLmHeadPass", "check_lm_head", "lm_head_layers"]


@dataclass(frozen=True)
class SliceLmHeadPass(GraphPass):
    """Slice the hidden states [batch, sequence, hidden] to [batch, 1, hidden] in front of the LM head's matrix product.

    Batches of prompts are padded on the left, so the last position is the last token of every row.
    """

    name = "slice-lm-head"

    def check(self, component: Component) -> None:
        check_lm_head(component, self.name)

    def requires(self, model: ov.Model, graph: Graph) -> None:
        _lm_head(model, graph.component)

    def apply(self, model: ov.Model, graph: Graph) -> ov.Model:
        import numpy as np
        from openvino import opset13

        lm_head = _lm_head(model, graph.component)
        position, axis = opset13.constant(np.array([-1], np.int64)), opset13.constant(np.int64(1))
        last = opset13.gather(lm_head.input_value(0), position, axis)
        last.set_friendly_name("lm_head/last_position")
        lm_head.input(0).replace_source_output(last.output(0))
        model.validate_nodes_and_infer_types()
        return model

    def ensures(self, model: ov.Model, graph: Graph) -> None:
        shape = model.output("logits").partial_shape
        if not (shape[1].is_static and shape[1].get_length() == 1):
            raise ConversionError(f"logits have shape {shape}, expected one position")


def check_lm_head(component: Component, pass_name: str) -> None:
    """Refuse a component without an LM head.

    Raises:
        BadInputError: with the names of component and pass.
    """
    if not component.logits:
        raise BadInputError(f"component {component.name} has no LM head: take pass {pass_name} out of its recipe")


def lm_head_layers(component: Component) -> set[str]:
    """Names of the layers of the block that makes the logits; one of them is the LM head's matrix product."""
    return {
        tensor.removesuffix(".weight")
        for block in component.blocks
        if block.role == "head"
        for tensor in block.tensors.values()
    }


def _lm_head(model: ov.Model, component: Component) -> ov.Node:
    """The matrix product that makes the logits."""
    layers = lm_head_layers(component)
    found = [
        node
        for node in model.get_ordered_ops()
        if node.get_type_name() == "MatMul" and node.get_friendly_name() in layers
    ]
    if len(found) != 1:
        raise ConversionError(
            f"the graph has {len(found)} matrix products among {', '.join(sorted(layers))}, expected only the LM head"
        )
    return found[0]
