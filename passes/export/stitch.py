"""*stitch*: the blocks of a component joined to one graph by the names of their values."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from manifests.errors import ConversionError
from passes.base import Context, Form, Intermediate, TransformPass, named_failure
from passes.block_pass import Blocks
from passes.export.names import block_names, tensor_name
from passes.export.weights import WeightBytes
from passes.graph_pass import Graph
from passes.store import digest
from passes.vocabulary import Component

if TYPE_CHECKING:
    import openvino as ov

    from passes.export.ir import Detached

__all__ = ["StitchPass"]


@dataclass(frozen=True)
class StitchPass(TransformPass):
    """Join blocks: an input of a block is the last value of its name that an earlier block makes, or else a graph input.

    The graph's outputs are the component's, followed by the new values of its state. Any other value is named after the
    block that makes it, so that the block can be cut out of the finished artifact (`passes.validate.cut`).
    """

    name = "stitch"
    version = 2
    takes = (Form.F32_BLOCKS, Form.F16_BLOCKS, Form.COMPRESSED_BLOCKS)

    @property
    def makes(self) -> Form:
        return Form.GRAPH

    def __call__(self, before: Intermediate, context: Context) -> Intermediate:
        """See `TransformPass`."""
        assert isinstance(before, Blocks)
        component = before.component

        def build() -> Detached:
            with named_failure(self, component.name):
                return self.join(component, map(before.detached, range(len(component.blocks))))

        return Graph(component, digest("stitch", self.version, before.key), before, build, before.exact, (self.name,))

    def join(self, component: Component, blocks: Iterable[Detached]) -> Detached:
        """Stitch one component.

        Args:
            component: describes the inputs and outputs of the graph.
            blocks: every block in order, with its weights detached (see `passes.export.ir`).

        Returns:
            The graph with its weights detached, and the places of their bytes.

        Raises:
            ConversionError: if a block reads a value that neither a block nor the graph's inputs provide.
        """
        import openvino as ov
        from openvino import opset13

        values: dict[str, ov.Output] = {}
        inputs: dict[str, ov.op.Parameter] = {}
        weights: dict[str, WeightBytes] = {}
        weight_inputs: list[ov.op.Parameter] = []
        for block, (model, block_weights) in zip(component.blocks, blocks, strict=True):
            kind = component.kinds[block.kind]
            rename = block_names(block)
            weights |= block_weights
            for node in model.get_ordered_ops():
                if node.get_friendly_name() not in block_weights:
                    node.set_friendly_name(rename(node.get_friendly_name()))
                for output in node.outputs():
                    output.set_names(set())
            for parameter in model.get_parameters():
                name = parameter.get_friendly_name()
                if name in block_weights:
                    weight_inputs.append(parameter)
                    continue
                value = block.inputs[name.removeprefix(f"{block.name}/")]
                if value not in values:
                    inputs[value] = opset13.parameter(
                        parameter.get_partial_shape(), parameter.get_element_type(), name=value
                    )
                    values[value] = inputs[value].output(0)
                parameter.output(0).replace(values[value])
            for result, port in zip(model.get_results(), kind.outputs, strict=True):
                made = result.input_value(0)
                made.add_names({tensor_name(component, block, port.name)})
                values[block.outputs[port.name]] = made
        order = [port.name for port in component.inputs if port.name in inputs] + list(component.state)
        if missing := inputs.keys() - set(order):
            raise ConversionError(
                f"blocks of the {component.name} read {', '.join(sorted(missing))}, which no block and no input provides"
            )
        results = [
            opset13.result(values[name], name=name)
            for name in [port.name for port in component.outputs] + list(component.state.values())
        ]
        for name, node_input in inputs.items():
            node_input.output(0).set_names({name, component.aliases.get(name, name)})
        stitched = ov.Model(results, [inputs[name] for name in order] + weight_inputs, component.name)
        for result in stitched.get_results():
            name = result.get_friendly_name()
            result.output(0).set_names({name, component.aliases.get(name, name)})
        stitched.validate_nodes_and_infer_types()
        return stitched, weights
