"""*stitch*: the blocks of a component joined to one graph by the names of their values."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from manifests.errors import ConversionError
from passes.base import Pass
from passes.export.weights import WeightBytes
from passes.split import Block, Component

if TYPE_CHECKING:
    import openvino as ov

    Detached = tuple[ov.Model, dict[str, WeightBytes]]

__all__ = ["StitchPass", "block_names", "block_prefixes", "tensor_name"]


@dataclass(frozen=True)
class StitchPass(Pass):
    """Join stored blocks: each input of a block is fed by the last value of that name, or becomes a graph input.

    The graph's outputs are the component's, followed by the new values of its state. Any other value is named after the
    block that makes it, so that the block can be found in the finished artifact (`passes.validate.cut`).
    """

    name = "stitch"
    version = 2

    def __call__(self, component: Component, blocks: Iterable[Detached]) -> tuple[ov.Model, dict[str, WeightBytes]]:
        """Stitch one component.

        Args:
            component: what the graph is to take and return.
            blocks: every block in order, with its weights detached.

        Returns:
            The graph with its weights detached, and where their bytes lie.
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
                f"blocks of the {component.name} need {', '.join(sorted(missing))}, which nothing makes"
            )
        results = [
            opset13.result(values[name], name=name)
            for name in [port.name for port in component.outputs] + list(component.state.values())
        ]
        for node_input in inputs.values():
            node_input.output(0).set_names({node_input.get_friendly_name()})
        stitched = ov.Model(results, [inputs[name] for name in order] + weight_inputs, component.name)
        for result in stitched.get_results():
            name = result.get_friendly_name()
            result.output(0).set_names({name, component.aliases.get(name, name)})
        stitched.validate_nodes_and_infer_types()
        return stitched, weights


def block_prefixes(block: Block) -> tuple[str, ...]:
    """What the names of a block's nodes begin with in the stitched graph."""
    return (f"{block.name}/", *(name.removesuffix(".weight") for name in block.tensors.values()))


def block_names(block: Block) -> Callable[[str], str]:
    """Make names unique over all blocks: what is called after a tensor keeps its name, the rest gets the block's in front."""
    own, *modules = block_prefixes(block)

    def rename(name: str) -> str:
        return name if name.startswith(tuple(modules)) else f"{own}{name}"

    return rename


def tensor_name(component: Component, block: Block, port: str) -> str:
    """The tensor name of what a block makes: an output of the graph has that output's name alone, by which runtimes find it."""
    value = block.outputs[port]
    last = next(other for other in reversed(component.blocks) if value in other.outputs.values())
    if last.name == block.name and any(output.name == value for output in component.outputs):
        return value
    return f"{block.name}.{port}"
