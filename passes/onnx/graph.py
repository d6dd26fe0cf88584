"""Blocks as ONNX graphs whose weights stay on disk."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from passes.export.weights import WeightBytes
from passes.split import Block

if TYPE_CHECKING:
    from collections.abc import Sequence

    import onnx_ir as ir

    Detached = tuple[ir.Model, dict[str, WeightBytes]]

__all__ = [
    "MICROSOFT",
    "add_constant",
    "add_float",
    "add_weight",
    "read_trace",
    "take_over",
    "weight_readers",
    "weight_values",
]

MICROSOFT = "com.microsoft"
_READERS = {"Conv", "Gather", "Gemm", "MatMul"}


def read_trace(folder: Path, block: Block) -> ir.Model:
    """The graph of a block's kind; inputs after the kind's ports stand for its parameters.

    The operation that reads a weight is called after the checkpoint's tensor (in-memory spelling), as in OpenVINO.
    """
    import onnx_ir as ir

    model = ir.load(folder / f"{block.kind}.onnx")
    for value, tensor in weight_values(model, block):
        for reader in weight_readers(value):
            if reader.op_type in _READERS:
                reader.name = tensor.removesuffix(".weight")
    return model


def weight_values(model: ir.Model, block: Block) -> list[tuple[ir.Value, str]]:
    """The inputs of a trace that stand for weights, with the tensors' names."""
    return [(value, block.tensors[value.name]) for value in model.graph.inputs if value.name in block.tensors]


def add_weight(
    model: ir.Model,
    weights: dict[str, WeightBytes],
    name: str,
    dtype: ir.DataType,
    shape: Sequence[int],
    place: WeightBytes,
) -> ir.Value:
    """Add an initializer whose bytes are copied from `place` when the graph is written (`passes.onnx.file`)."""
    import onnx_ir as ir

    tensor = ir.ExternalTensor("", None, place.final_size, dtype, shape=ir.Shape(shape), name=name)
    value = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(dtype), const_value=tensor)
    model.graph.initializers.add(value)
    weights[name] = place
    return value


def add_float(
    model: ir.Model, weights: dict[str, WeightBytes], name: str, shape: Sequence[int], place: WeightBytes
) -> ir.Value:
    """Add a float weight, stored as what `place` gives; its values are float32."""
    import onnx_ir as ir

    if (place.wanted or place.stored) == "F32":
        return add_weight(model, weights, name, ir.DataType.FLOAT, shape, place)
    weight = add_weight(model, weights, name, ir.DataType.FLOAT16, shape, place)
    cast = ir.node("Cast", [weight], {"to": ir.DataType.FLOAT}, name=f"{name}/float")
    model.graph.insert_before(model.graph[0], cast)
    return cast.outputs[0]


def add_constant(model: ir.Model, name: str, value: np.ndarray | np.generic) -> ir.Value:
    """Add a small constant that lies in the graph itself."""
    import onnx_ir as ir

    tensor = ir.tensor(np.asarray(value), name=name)
    constant = ir.Value(name=name, shape=ir.Shape(value.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    model.graph.initializers.add(constant)
    return constant


def weight_readers(value: ir.Value) -> list[ir.Node]:
    """The operations that read a value, or read it transposed."""
    readers: list[ir.Node] = []
    for reader in value.consumers():
        readers += weight_readers(reader.outputs[0]) if reader.op_type == "Transpose" else [reader]
    return readers


def take_over(node: ir.Node, value: ir.Value) -> None:
    """Let `value` stand for what `node` makes, and remove the node."""
    made = node.outputs[0]
    value.type, value.shape = made.type, made.shape
    made.replace_all_uses_with(value, replace_graph_outputs=True)
    assert node.graph is not None
    node.graph.remove(node, safe=True)
