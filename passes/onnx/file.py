"""ONNX files with their weights in a .data file: writing them, and reading what they hold."""

from __future__ import annotations

from math import prod
from pathlib import Path
from typing import TYPE_CHECKING

from manifests.errors import BadInputError, ConversionError
from manifests.model import FileRecord, OnnxRequirements, Port
from passes.export.weights import WeightBytes, write_bytes

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir

__all__ = [
    "check_weights_beside",
    "count_weights",
    "data_file",
    "ports",
    "read",
    "requirements",
    "weight_places",
    "write",
]

_ALIGNMENT = 64
# Weights from `_LARGE` bytes on begin on a page, so that a runtime can map them into memory; onnx-ir has the same limit.
_PAGE, _LARGE = 4096, 1 << 20
# Numbers of dtypes in onnx.TensorProto -> names in a manifest.
_WEIGHT_DTYPES = {1: "f32", 10: "f16", 16: "bf16", 2: "int8", 3: "int8"}
_PORT_DTYPES = {1: "f32", 6: "i32", 7: "i64", 9: "boolean", 10: "f16"}
# Constants of fewer bytes are not weights, but axes, shapes and the like.
_SMALL = 1024
# The oldest ONNX Runtime that runs ONNX's own operators up to opset 18, and the oldest that run others; all were tried.
_OLDEST_RUNTIME = (1, 15)
_OLDEST_RUNTIMES = {
    ("com.microsoft", "MatMulNBits", 4): (1, 17),
    ("com.microsoft", "MatMulNBits", 8): (1, 22),
}


def data_file(path: Path) -> Path:
    """The .data file with the weights of a graph."""
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
            raise ConversionError(f"{name} has {source.final_size} bytes, but its graph describes {tensor.nbytes}")
        value.const_value = ir.ExternalTensor(
            data.name, offset, source.final_size, tensor.dtype, shape=tensor.shape, name=name
        )
    if len(copies) != len(weights):
        raise ConversionError(f"{len(weights) - len(copies)} weights got lost while {path.name} was written")
    record = write_bytes(data, b"", copies, end)
    path.write_bytes(ir.to_proto(model).SerializeToString(deterministic=True))
    return record


def count_weights(path: Path) -> dict[str, int]:
    """Count the weight values of a graph by dtype, as found in the file.

    Constants with at least two dimensions and 1 KiB are counted, but not the scales and zero points of compressed weights,
    which are vectors or have an innermost dimension of 1.
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
                dtype, count = "int4", 2 * prod(constant.dims)  # two codes in a byte, separated after the look-up
        counts[dtype] = counts.get(dtype, 0) + count
    return dict(sorted(counts.items()))


def requirements(path: Path) -> OnnxRequirements:
    """What a runtime must support to run a graph, as found in the file.

    Raises:
        ConversionError: if it is not known which runtime an operator of the graph needs.
    """
    model = read(path)
    opsets = {item.domain: item.version for item in model.opset_import}
    oldest = _OLDEST_RUNTIME
    for node in model.graph.node:
        if node.domain:
            key = (node.domain, node.op_type, _numbers(node).get("bits", 0))
            if key not in _OLDEST_RUNTIMES:
                raise ConversionError(f"{path.name}: no ONNX Runtime is known that runs {node.domain} {node.op_type}")
            oldest = max(oldest, _OLDEST_RUNTIMES[key])
    return OnnxRequirements(opset=opsets.pop(""), domains=opsets, onnxruntime=".".join(map(str, oldest)))


def read(path: Path) -> onnx.ModelProto:
    """Read a graph without its weights."""
    import onnx

    return onnx.load(path, load_external_data=False)


def check_weights_beside(path: Path) -> None:
    """Refuse a graph whose weights lie in another file than its own .data file, which a stranger may have chosen.

    Raises:
        BadInputError: if it is so, or the file is not ONNX.
    """
    from google.protobuf.message import DecodeError

    try:
        model = read(path)
    except DecodeError as error:
        raise BadInputError(f"{path} is not ONNX ({error}): fetch the artifact again") from error
    for tensor in model.graph.initializer:
        for entry in tensor.external_data:
            if entry.key == "location" and entry.value != data_file(path).name:
                raise BadInputError(
                    f"{path}: weight {tensor.name} lies in {entry.value} instead of {data_file(path).name}: convert again"
                )


def weight_places(path: Path) -> dict[str, tuple[int, int]]:
    """Places of a graph's constants in its .data file: name -> (offset, size) in bytes, in the order of the graph."""
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
    """Number of bytes of a constant, in the graph or in the .data file."""
    places = {entry.key: entry.value for entry in constant.external_data}
    return int(places["length"]) if places else len(constant.raw_data)
