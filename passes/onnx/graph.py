"""Blocks as ONNX graphs whose weights stay on disk."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from passes.base import Intermediate
from passes.export.weights import WeightBytes
from passes.vocabulary import Block, Component, operation_name

if TYPE_CHECKING:
    from collections.abc import Sequence

    import onnx_ir as ir

    Detached = tuple[ir.Model, dict[str, WeightBytes]]

__all__ = [
    "MICROSOFT",
    "OnnxBlocks",
    "OnnxGraph",
    "add_constant",
    "add_float",
    "add_weight",
    "read_trace",
    "take_over",
    "weight_readers",
    "weight_values",
]

MICROSOFT = "com.microsoft"
_READERS = {"Conv", "Gather", "MatMul"}


class OnnxBlocks(Intermediate, ABC):
    """The blocks of a component as ONNX graphs; `component` is the one that they belong to."""

    component: Component

    @abstractmethod
    def detached(self, index: int) -> Detached:
        """A block's graph without its weights, and the places of their bytes."""


class OnnxGraph(Intermediate):
    """A component as one ONNX graph whose weights are put in when it is written.

    Args:
        component: describes what the graph computes.
        key: see `Intermediate`.
        before: the blocks or the graph that it is made from.
        build: returns the graph without its weights, and the places of their bytes.
    """

    def __init__(self, component: Component, key: str, before: Intermediate, build: Callable[[], Detached]) -> None:
        self.component, self.key, self.build, self._before = component, key, build, before

    def prepare(self) -> None:
        """See `Intermediate`."""
        self._before.prepare()

    def discard(self) -> None:
        """See `Intermediate`."""
        self._before.discard()


def read_trace(folder: Path, block: Block) -> ir.Model:
    """The graph of a block's kind; the inputs after those of the kind's ports stand for its parameters.

    An operation that reads a weight is named after the weight's tensor (in-memory name), as in OpenVINO graphs.
    """
    import onnx_ir as ir

    model = ir.load(folder / f"{block.kind}.onnx")
    for value, tensor in weight_values(model, block):
        for reader in weight_readers(value):
            if reader.op_type in _READERS:
                reader.name = operation_name(tensor)
    return model


def weight_values(model: ir.Model, block: Block) -> list[tuple[ir.Value, str]]:
    """The inputs of a trace that stand for weights, each with the in-memory name of its tensor."""
    return [(value, block.tensors[value.name]) for value in model.graph.inputs if value.name in block.tensors]


def add_weight(
    model: ir.Model,
    weights: dict[str, WeightBytes],
    name: str,
    dtype: ir.DataType,
    shape: Sequence[int],
    place: WeightBytes,
) -> ir.Value:
    """Add an initializer to the graph; its bytes are copied from `place` when the graph is written (`passes.onnx.file`)."""
    import onnx_ir as ir

    tensor = ir.ExternalTensor("", None, place.final_size, dtype, shape=ir.Shape(shape), name=name)
    value = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(dtype), const_value=tensor)
    model.graph.initializers.add(value)
    weights[name] = place
    return value


def add_float(
    model: ir.Model, weights: dict[str, WeightBytes], name: str, shape: Sequence[int], place: WeightBytes
) -> ir.Value:
    """Add a float weight in the dtype of `place`, and return its value as float32."""
    import onnx_ir as ir

    if (place.wanted or place.stored) == "F32":
        return add_weight(model, weights, name, ir.DataType.FLOAT, shape, place)
    weight = add_weight(model, weights, name, ir.DataType.FLOAT16, shape, place)
    cast = ir.node("Cast", [weight], {"to": ir.DataType.FLOAT}, name=f"{name}/float")
    model.graph.insert_before(model.graph[0], cast)
    return cast.outputs[0]


def add_constant(model: ir.Model, name: str, value: np.ndarray | np.generic) -> ir.Value:
    """Add a small constant, which is stored in the graph itself."""
    import onnx_ir as ir

    tensor = ir.tensor(np.asarray(value), name=name)
    constant = ir.Value(name=name, shape=ir.Shape(value.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    model.graph.initializers.add(constant)
    return constant


def weight_readers(value: ir.Value) -> list[ir.Node]:
    """The operations that read a value, directly or transposed, but not as their bias."""
    readers: list[ir.Node] = []
    for reader in value.consumers():
        if value in reader.inputs[2:]:
            continue
        readers += weight_readers(reader.outputs[0]) if reader.op_type == "Transpose" else [reader]
    return readers


def take_over(node: ir.Node, value: ir.Value) -> None:
    """Replace the output of `node` by `value`, and remove the node."""
    made = node.outputs[0]
    value.type, value.shape = made.type, made.shape
    made.replace_all_uses_with(value, replace_graph_outputs=True)
    assert node.graph is not None
    node.graph.remove(node, safe=True)
