"""The header of a safetensors file: names, dtypes, shapes and places of its tensors, checked as the safetensors library does."""

from __future__ import annotations

import json
import struct
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from manifests.errors import BadInputError

__all__ = ["FLOAT_DTYPES", "TensorInfo", "read_header"]

FLOAT_DTYPES = ("F32", "F16", "BF16")
# Bits of a value of every dtype that the format has.
_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("BOOL", "I8", "U8", "F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
# The library takes 100 MB, but Python's objects for that much JSON would take several gigabytes of memory; the header of a
# file with 100000 tensors has 15 MB.
_HEADER_LIMIT = 32_000_000


@dataclass(frozen=True)
class TensorInfo:
    """Place of one tensor: `dtype` as the format calls it, such as BF16; `offset` counts bytes from the start of the file."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def size(self) -> int:
        """Number of values."""
        return prod(self.shape)

    @property
    def byte_size(self) -> int:
        """Number of bytes."""
        return self.size * _BITS[self.dtype] // 8


def read_header(folder: Path, file: str, dtypes: Sequence[str] | None = None) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file.

    Args:
        folder: the folder of the file.
        file: name of the file.
        dtypes: accepted dtypes; None accepts all that the format has.

    Raises:
        BadInputError: if the file is damaged, or holds a tensor of another dtype.
    """
    path = folder / file
    start, header = _parse(path)
    tensors = {}
    for name, entry in header.items():
        dtype = entry.get("dtype") if isinstance(entry, dict) else None
        if dtypes is not None and dtype not in dtypes:
            raise BadInputError(
                f"{path}: tensor {name} has dtype {dtype}, expected {', '.join(dtypes[:-1])} or {dtypes[-1]}: "
                "convert the checkpoint again"
            )
        tensors[name] = _checked(path, name, entry, start)
    _check_places(path, start, tensors)
    return tensors


def _parse(path: Path) -> tuple[int, dict[str, Any]]:
    """Where the tensors' bytes start, and the header without its metadata.

    Raises:
        BadInputError: if the file has no header.
    """
    damaged = f"{path} is not a whole safetensors file"
    size = path.stat().st_size
    with path.open("rb") as stream:
        prefix = stream.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= length <= min(_HEADER_LIMIT, size - 8):
            raise BadInputError(f"{damaged} (header of {length} bytes in a file of {size}): fetch the file again")
        text = stream.read(length)
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_without_repetition)
    except (ValueError, RecursionError) as error:
        raise BadInputError(f"{damaged} (its header is not JSON: {error}): fetch the file again") from error
    if not isinstance(header, dict):
        raise BadInputError(f"{damaged} (its header is not an object): fetch the file again")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise BadInputError(f"{damaged} (its metadata are not texts): fetch the file again")
    return 8 + length, header


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        raise ValueError(f"{Counter(name for name, _ in pairs).most_common(1)[0][0]} is there twice")
    return entries


def _checked(path: Path, name: str, entry: Any, start: int) -> TensorInfo:
    """The place of one tensor.

    Raises:
        BadInputError: if its entry is malformed, or its shape does not fit its bytes.
    """
    try:
        dtype, shape, (first, last) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        whole = all(type(number) is int and number >= 0 for number in (*shape, first, last))
        if dtype not in _BITS or not whole:
            raise ValueError
    except (KeyError, TypeError, ValueError) as error:
        raise BadInputError(
            f"{path} is not a whole safetensors file (entry {name} is malformed): fetch the file again"
        ) from error
    info = TensorInfo(path.name, dtype, shape, start + first)
    if 8 * (last - first) != info.size * _BITS[dtype]:
        raise BadInputError(
            f"{path}: tensor {name} of shape {list(shape)} takes {info.byte_size} bytes as {dtype}, "
            f"and its header gives {last - first}: fetch the file again"
        )
    return info


def _check_places(path: Path, start: int, tensors: dict[str, TensorInfo]) -> None:
    """Refuse a file whose tensors overlap, or leave bytes between them or at its end.

    Raises:
        BadInputError: with the name of the tensor.
    """
    end = start
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].byte_size)):
        if info.offset != end:
            what = "overlaps the one before it" if info.offset < end else "comes after a hole"
            raise BadInputError(f"{path}: tensor {name} {what}: fetch the file again")
        end += info.byte_size
    if path.stat().st_size != end:
        raise BadInputError(
            f"{path} has {path.stat().st_size} bytes, but its header describes {end}: fetch the file again"
        )
