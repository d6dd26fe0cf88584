"""A sketch of a forward pass: how large its activations are and how much work it is, found from shapes alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

from passes.vocabulary import Block, Component

if TYPE_CHECKING:
    import openvino as ov

    from passes.export.template import Templates

__all__ = ["BlockSketch", "Sketch", "sketch"]


@dataclass(frozen=True)
class BlockSketch:
    """What computing one block on one sample takes.

    Attributes:
        component, block: names of the component and the block.
        operations: floating-point operations of its matrix products.
        kept: bytes of all values that this or a later block still reads while the block is computed, its outputs included.
        inside: bytes of the largest value in the block.
    """

    component: str
    block: str
    operations: int
    kept: int
    inside: int


@dataclass(frozen=True)
class Sketch:
    """What one sample takes.

    Attributes:
        inputs: bytes of the inputs of the components.
        tokens: number of tokens of its prompt.
        blocks: the blocks that the sample reaches, in order.
    """

    inputs: int
    tokens: int
    blocks: tuple[BlockSketch, ...]

    def operations(self, component: str) -> int:
        """Floating-point operations of a component's matrix products."""
        return sum(block.operations for block in self.blocks if block.component == component)


@dataclass
class _Value:
    """A value that blocks exchange; `read` is the number of the last block that reads it."""

    array: np.ndarray
    made: int
    read: int = -1


def sketch(
    components: tuple[Component, ...], config: dict[str, Any], templates: Templates, inputs: Mapping[str, np.ndarray]
) -> Sketch:
    """Follow one sample through the components; blocks are not computed, and their outputs are zeros.

    Args:
        components: in the order of the data flow.
        config: the config with every default filled in, which host steps read.
        templates: the traced kinds of block.
        inputs: the inputs of the components by name, with batch size 1.
    """
    known = {name: _Value(value, -1) for name, value in inputs.items()}
    every: list[_Value] = []
    found: list[tuple[str, str, int, int]] = []
    sizes: dict[Any, tuple[dict[str, tuple[int, ...]], int, int]] = {}
    for component in components:
        values = dict(known)
        if (step := component.host_step) is not None:
            made = step({name: value.array for name, value in values.items()}, config)
            computed = {name: _Value(array, len(found)) for name, array in made.items()}
            every += computed.values()
            values |= computed
        for block in component.blocks:
            taken = {port: values[value] for port, value in block.inputs.items() if value in values}
            if len(taken) < len(block.inputs):
                continue
            shapes = {port: value.array.shape for port, value in taken.items()}
            key = (block.kind, *sorted(shapes.items()))
            if key not in sizes:
                sizes[key] = _measure(templates, block, shapes)
            outputs, operations, inside = sizes[key]
            number = len(found)
            for value in taken.values():
                value.read = number
            zero = np.zeros((), np.float32)
            for port, name in block.outputs.items():
                values[name] = _Value(np.broadcast_to(zero, outputs[port]), number)
                every.append(values[name])
            found.append((component.name, block.name, operations, inside))
        known |= {port.name: values[port.name] for port in component.outputs if port.name in values}
    blocks = []
    for number, (owner, name, operations, inside) in enumerate(found):
        kept = sum(_size(value.array) for value in every if value.made <= number <= value.read)
        blocks.append(BlockSketch(owner, name, operations, kept, inside))
    return Sketch(sum(value.nbytes for value in inputs.values()), inputs["input_ids"].shape[1], tuple(blocks))


def _measure(
    templates: Templates, block: Block, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, tuple[int, ...]], int, int]:
    """Shapes of a block's outputs by port, the operations of its matrix products, and the bytes of its largest value."""
    import openvino as ov

    model = ov.Core().read_model(templates.folder / f"{block.kind}.xml")
    model.reshape({port: ov.PartialShape(list(shape)) for port, shape in shapes.items()})
    operations = inside = 0
    for node in model.get_ordered_ops():
        if node.get_type_name() in {"MatMul", "Convolution", "ScaledDotProductAttention"}:
            operations += _operations(node)
            inside = max(inside, 4 * prod(_shape(node.output(0))))
    results = {result.get_friendly_name(): _shape(result.input_value(0)) for result in model.get_results()}
    return results, operations, inside


def _operations(node: ov.Node) -> int:
    """Floating-point operations of a matrix product: two for each product of two values."""
    inputs, made = [_shape(value) for value in node.input_values()], prod(_shape(node.output(0)))
    if node.get_type_name() == "ScaledDotProductAttention":
        query, key, value = inputs[:3]
        return 2 * prod(query[:-1]) * key[-2] * (query[-1] + value[-1])
    if node.get_type_name() == "Convolution":
        return 2 * made * prod(inputs[1][1:])
    transposed = node.get_attributes()["transpose_a"]
    return 2 * made * inputs[0][-2 if transposed and len(inputs[0]) > 1 else -1]


def _shape(output: ov.Output) -> tuple[int, ...]:
    """A shape; a size that depends on values counts as 1."""
    return tuple(1 if dim.is_dynamic else dim.get_length() for dim in output.get_partial_shape())


def _size(array: np.ndarray) -> int:
    """Bytes of an array, whose values may share their memory."""
    return array.size * array.itemsize
