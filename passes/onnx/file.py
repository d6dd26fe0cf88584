"""ONNX files with their weights beside them: written, and read back for what they hold."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from manifests.errors import ConversionError
from manifests.model import FileRecord, Port
from passes.export.weights import WeightBytes, write_bytes

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

__all__ = ["Requirements", "count_weights", "data_file", "ports", "read", "requirements", "weight_places", "write"]

_ALIGNMENT = 64
# Large weights begin on a page, so that a runtime can map them into memory; the same limit as in onnx-ir.
_PAGE, _LARGE = 4096, 1 << 20
# onnx.TensorProto's numbers of dtypes.
_WEIGHT_DTYPES = {1: "f32", 10: "f16", 16: "bf16", 2: "int8", 3: "int8"}
_PORT_DTYPES = {1: "f32", 6: "i32", 7: "i64", 10: "f16"}
# Smaller constants are not weights but axes, shapes and the like.
_SMALL = 1024
# The first ONNX Runtime that runs ONNX's own operators up to opset 18, and those that run more; each was tried.
_OLDEST_RUNTIME = (1, 15)
_OLDEST_RUNTIMES = {
    ("com.microsoft", "MatMulNBits", 4): (1, 17),
    ("com.microsoft", "MatMulNBits", 8): (1, 22),
}


@dataclass(frozen=True)
class Requirements:
    """What a graph asks of a runtime.

    Attributes:
        opset: of ONNX's own operators.
        domains: other operator domains and their versions.
        onnxruntime: the oldest ONNX Runtime that runs it.
    """

    opset: int
    domains: dict[str, int]
    onnxruntime: str


def data_file(path: Path) -> Path:
    """Where the weights of a graph lie."""
    return path.with_name(f"{path.name}.data")


def write(model: ir.Model, weights: dict[str, WeightBytes], path: Path) -> FileRecord:
    """Write a graph as `path` and its detached weights as `path`.data.

    Memory use does not depend on the size of the weights.

    Returns:
        The record of the .data file, hashed while it is written.

    Raises:
        ConversionError: if a weight has no place in the graph.
    """
    import onnx_ir as ir

    data = data_file(path)
    end = 0
    copies: list[tuple[WeightBytes, int]] = []
    for name, value in model.graph.initializers.items():
        if name not in weights:
            continue
        source, tensor = weights[name], value.const_value
        alignment = _PAGE if source.final_size >= _LARGE else _ALIGNMENT
        offset = (end + alignment - 1) // alignment * alignment
        copies.append((source, offset))
        end = offset + source.final_size
        assert isinstance(tensor, ir.ExternalTensor)
        if tensor.nbytes != source.final_size:
            raise ConversionError(f"{name} takes {source.final_size} bytes, {tensor.nbytes} in its graph")
        value.const_value = ir.ExternalTensor(
            data.name, offset, source.final_size, tensor.dtype, shape=tensor.shape, name=name
        )
    if len(copies) != len(weights):
        raise ConversionError(f"{len(weights) - len(copies)} weights got lost while {path.name} was put together")
    record = write_bytes(data, b"", copies, end)
    path.write_bytes(ir.to_proto(model).SerializeToString(deterministic=True))
    return record


def count_weights(path: Path) -> dict[str, int]:
    """Count the weight values of a graph by dtype, from the file itself; `passes.export.ir.count_weights` for ONNX.

    Counted are constants of two dimensions or more and at least 1 KiB; the scales and zero points of compressed weights,
    recognised by their innermost dimension of 1 or by being vectors, are not weights.
    """
    graph = read(path).graph
    readers: dict[str, list[onnx.NodeProto]] = {}
    for node in graph.node:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    counts: dict[str, int] = {}
    for constant in graph.initializer:
        dtype, count = _WEIGHT_DTYPES.get(constant.data_type), prod(constant.dims)
        if dtype is None or len(constant.dims) < 2 or constant.dims[-1] == 1 or _size(constant) < _SMALL:
            continue
        for reader in readers.get(constant.name, ()):
            if reader.op_type == "MatMulNBits":
                numbers = _numbers(reader)
                dtype, count = f"int{numbers['bits']}", numbers["K"] * numbers["N"]
            elif any(other.op_type == "BitwiseAnd" for other in readers.get(reader.output[0], ())):
                dtype, count = "int4", 2 * prod(constant.dims)  # two codes in a byte, taken apart after the look-up
        counts[dtype] = counts.get(dtype, 0) + count
    return dict(sorted(counts.items()))


def requirements(path: Path) -> Requirements:
    """What a runtime must offer to run a graph, from the file itself.

    Raises:
        ConversionError: if the graph uses an operator of which it is not known what it needs.
    """
    model = read(path)
    opsets = {item.domain: item.version for item in model.opset_import}
    oldest = _OLDEST_RUNTIME
    for node in model.graph.node:
        if node.domain:
            key = (node.domain, node.op_type, _numbers(node).get("bits", 0))
            if key not in _OLDEST_RUNTIMES:
                raise ConversionError(f"{path.name}: nothing is known of {node.domain}'s {node.op_type}")
            oldest = max(oldest, _OLDEST_RUNTIMES[key])
    return Requirements(opsets.pop(""), opsets, ".".join(map(str, oldest)))


def read(path: Path) -> onnx.ModelProto:
    """The graph without its weights."""
    import onnx

    return onnx.load(path, load_external_data=False)


def weight_places(path: Path) -> dict[str, tuple[int, int]]:
    """Where the constants of a graph lie in its .data file: name -> (offset, size), in the graph's order."""
    places = {}
    for constant in read(path).graph.initializer:
        entries = {entry.key: entry.value for entry in constant.external_data}
        if entries:
            places[constant.name] = int(entries["offset"]), int(entries["length"])
    return places


def ports(path: Path) -> tuple[list[Port], list[Port]]:
    """The inputs and outputs of a graph."""
    graph = read(path).graph
    return [_port(item) for item in graph.input], [_port(item) for item in graph.output]


def _port(item: onnx.ValueInfoProto) -> Port:
    tensor = item.type.tensor_type
    shape = [dim.dim_param or dim.dim_value for dim in tensor.shape.dim]
    return Port(name=item.name, dtype=_PORT_DTYPES[tensor.elem_type], shape=shape)


def _numbers(node: onnx.NodeProto) -> dict[str, int]:
    return {attribute.name: attribute.i for attribute in node.attribute}


def _size(constant: onnx.TensorProto) -> int:
    """Bytes of a constant, wherever they lie."""
    places = {entry.key: entry.value for entry in constant.external_data}
    return int(places["length"]) if places else len(constant.raw_data)
