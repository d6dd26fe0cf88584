"""*make-stateful*: the key-value cache moves from inputs and outputs into the graph's state."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from manifests.errors import ConversionError
from passes.base import GraphPass

if TYPE_CHECKING:
    import openvino as ov

__all__ = ["MakeStatefulPass"]

_PAST = re.compile(r"^past_key_values\.(\d+\.(?:key|value))$")


@dataclass(frozen=True)
class MakeStatefulPass(GraphPass):
    """Turn each `past_key_values.N.key/value` -> `present.N.key/value` pair into a state variable.

    A new input `beam_idx` [batch] (i32) picks the rows of the cache, for beam search and batch reordering. The state
    starts empty, with the batch size of the first input.
    """

    name = "make-stateful"

    def requires(self, model: ov.Model) -> None:
        inputs, outputs = _names(model.inputs), _names(model.outputs)
        pasts = [match[1] for name in inputs if (match := _PAST.match(name))]
        if not pasts:
            raise ConversionError("the graph has no past_key_values inputs")
        if missing := [name for name in pasts if f"present.{name}" not in outputs]:
            raise ConversionError(f"past_key_values.{missing[0]} has no output present.{missing[0]}")

    def apply(self, model: ov.Model) -> ov.Model:
        import numpy as np
        import openvino as ov
        from openvino import opset13
        from openvino._offline_transformations import apply_make_stateful_transformation

        beam_idx = opset13.parameter(ov.PartialShape([-1]), ov.Type.i32, name="beam_idx")
        beam_idx.output(0).set_names({"beam_idx"})
        model.add_parameters([beam_idx])
        zero = opset13.constant(np.int64(0))
        batch = opset13.gather(
            opset13.shape_of(model.inputs[0], "i64"), opset13.constant(np.array([0], np.int64)), zero
        )
        pairs = {}
        empty = {}
        for port in model.inputs:
            name = port.get_any_name()
            match = _PAST.match(name)
            if match is None:
                continue
            pairs[name] = f"present.{match[1]}"
            targets = port.get_target_inputs()
            rows = opset13.gather(port, beam_idx, zero)
            for target in targets:
                target.replace_source_output(rows.output(0))
            shape = port.partial_shape
            parts: list[ov.Node] = [batch]
            for axis in range(1, len(shape)):
                length = shape[axis].get_length() if shape[axis].is_static else 0
                parts.append(opset13.constant(np.array([length], np.int64)))
            empty[pairs[name]] = opset13.broadcast(
                opset13.constant(0.0, dtype=port.element_type), opset13.concat(parts, axis=0)
            )
        apply_make_stateful_transformation(model, pairs)
        for node in model.get_ops():
            if node.get_type_name() == "ReadValue":
                suffix = next(present for past, present in pairs.items() if past in node.get_variable_id())
                node.set_arguments([empty[suffix].output(0)])
        model.validate_nodes_and_infer_types()
        return model

    def ensures(self, model: ov.Model) -> None:
        if left := [name for name in _names(model.inputs) if _PAST.match(name)]:
            raise ConversionError(f"input {left[0]} is still there")


def _names(ports: list[ov.Output]) -> set[str]:
    return {name for port in ports for name in port.get_names()}
