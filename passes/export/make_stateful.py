"""*make-stateful*: the key-value cache moves from inputs and outputs into the graph's state."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from manifests.errors import BadInputError, ConversionError
from passes.compat.openvino import make_stateful, set_runtime_option
from passes.graph_pass import Graph, GraphPass
from passes.vocabulary import Component

if TYPE_CHECKING:
    import openvino as ov

__all__ = ["MakeStatefulPass"]


@dataclass(frozen=True)
class MakeStatefulPass(GraphPass):
    """Turn each pair of input and output in `Component.state` into a state variable.

    A new input `beam_idx` [batch] (i32) picks the rows of the cache, for beam search and for reordering a batch. The state
    starts empty, with the batch size of the first input.

    The graph also gets two compile options, which OpenVINO's own example sets too. The cache is kept in float16, where CPUs
    would use 8 bit by default. Activations are scaled down for GPUs that compute in half precision, because those of Llama
    3.2 Vision exceed its range. With float32 weights, the runtime chooses the precision of the cache: paged attention in
    bfloat16 refuses a float32 cache, and `EXECUTION_MODE_HINT` ACCURACY chooses float32 by itself.
    """

    name = "make-stateful"

    def check(self, component: Component) -> None:
        if not component.state:
            raise BadInputError(
                f"component {component.name} has no key-value cache: take pass {self.name} out of its recipe"
            )

    def requires(self, model: ov.Model, graph: Graph) -> None:
        inputs, outputs = _names(model.inputs), _names(model.outputs)
        for past, present in graph.component.state.items():
            if past not in inputs:
                raise ConversionError(f"the graph has no input {past}")
            if present not in outputs:
                raise ConversionError(f"the graph has no output {present}, which replaces input {past}")

    def apply(self, model: ov.Model, graph: Graph) -> ov.Model:
        import numpy as np
        import openvino as ov
        from openvino import opset13

        state = graph.component.state
        beam_idx = opset13.parameter(ov.PartialShape([-1]), ov.Type.i32, name="beam_idx")
        beam_idx.output(0).set_names({"beam_idx"})
        model.add_parameters([beam_idx])
        zero = opset13.constant(np.int64(0))
        batch = opset13.gather(
            opset13.shape_of(model.inputs[0], "i64"), opset13.constant(np.array([0], np.int64)), zero
        )
        empty = {}
        for port in model.inputs:
            name = port.get_any_name()
            if name not in state:
                continue
            targets = port.get_target_inputs()
            rows = opset13.gather(port, beam_idx, zero)
            for target in targets:
                target.replace_source_output(rows.output(0))
            shape = port.partial_shape
            parts: list[ov.Node] = [batch]
            for axis in range(1, len(shape)):
                length = shape[axis].get_length() if shape[axis].is_static else 0
                parts.append(opset13.constant(np.array([length], np.int64)))
            zeros = opset13.broadcast(opset13.constant(0.0, dtype=port.element_type), opset13.concat(parts, axis=0))
            empty[name] = zeros.output(0)
        make_stateful(model, {name: state[name] for name in empty}, empty)
        model.validate_nodes_and_infer_types()
        if not graph.exact:
            set_runtime_option(model, "KV_CACHE_PRECISION", "f16")
        set_runtime_option(model, "ACTIVATIONS_SCALE_FACTOR", "8.0")
        return model

    def ensures(self, model: ov.Model, graph: Graph) -> None:
        if left := sorted(_names(model.inputs) & graph.component.state.keys()):
            raise ConversionError(f"input {left[0]} is still there")


def _names(ports: list[ov.Output]) -> set[str]:
    return {name for port in ports for name in port.get_names()}
