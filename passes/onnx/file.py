"""ONNX files with their weights beside them: written, and read back for what they hold."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from manifests.errors import ConversionError
from manifests.model import FileRecord
from passes.export.weights import WeightBytes, write_bytes

if TYPE_CHECKING:
    import onnx_ir as ir

__all__ = ["data_file", "write"]

_ALIGNMENT = 64
# Large weights begin on a page, so that a runtime can map them into memory; the same limit as in onnx-ir.
_PAGE, _LARGE = 4096, 1 << 20


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
