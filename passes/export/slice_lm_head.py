"""*slice-lm-head*: logits of the last position only, for every row of the batch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from manifests.errors import ConversionError
from passes.base import GraphPass

if TYPE_CHECKING:
    import openvino as ov

__all__ = ["SliceLmHeadPass"]


@dataclass(frozen=True)
class SliceLmHeadPass(GraphPass):
    """Slice the hidden states [batch, sequence, hidden] to [batch, 1, hidden] in front of the LM head's matrix product.

    With left padding, as decoders are batched, the last position is the last token of every row.
    """

    name = "slice-lm-head"

    def requires(self, model: ov.Model) -> None:
        _lm_head(model)

    def apply(self, model: ov.Model) -> ov.Model:
        import numpy as np
        from openvino import opset13

        lm_head = _lm_head(model)
        position, axis = opset13.constant(np.array([-1], np.int64)), opset13.constant(np.int64(1))
        last = opset13.gather(lm_head.input_value(0), position, axis)
        last.set_friendly_name("lm_head/last_position")
        lm_head.input(0).replace_source_output(last.output(0))
        model.validate_nodes_and_infer_types()
        return model

    def ensures(self, model: ov.Model) -> None:
        shape = model.output("logits").partial_shape
        if not (shape[1].is_static and shape[1].get_length() == 1):
            raise ConversionError(f"logits have shape {shape}, expected one position")


def _lm_head(model: ov.Model) -> ov.Node:
    """The matrix product that makes the logits."""
    node = model.output("logits").get_node().input_value(0).get_node()
    while node.get_type_name() in {"Convert", "Reshape", "Add", "Multiply"}:
        node = node.input_value(0).get_node()
    if node.get_type_name() != "MatMul":
        raise ConversionError(f"the logits come from a {node.get_type_name()}, not from a matrix product")
    return node
