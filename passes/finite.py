"""Hashing the files of a checkpoint and, on the way, checking that no weight is NaN, infinite or too large for its target."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from manifests.errors import BadInputError
from manifests.model import FileRecord
from passes.header import TensorInfo

__all__ = ["HALF", "Bound", "hash_weights"]

# The least number that float16 rounds to infinity.
HALF = 65520.0
_CHUNK = 1 << 20
_BITS: dict[str, np.dtype[Any]] = {"BF16": np.dtype("u2"), "F16": np.dtype("u2"), "F32": np.dtype("u4")}


@dataclass(frozen=True)
class Bound:
    """What the values of a tensor must be.

    Attributes:
        info: place of the tensor.
        below: the least magnitude that is too large; infinity refuses only NaN and infinity.
        mend: end of the error message.
    """

    info: TensorInfo
    mend: str
    below: float = math.inf


def hash_weights(folder: Path, file: str, bounds: Mapping[str, Bound]) -> FileRecord:
    """Hash a file, and check the values of tensors in it; it is read once.

    Args:
        folder: the checkpoint.
        file: name of the file.
        bounds: name of each tensor that is checked -> what its values must be.

    Raises:
        BadInputError: with the name of the tensor and the index of its first value that is out of bounds.
    """
    checksum = hashlib.sha256()
    path = folder / file
    size = path.stat().st_size
    position = 0
    with path.open("rb", buffering=0) as stream:
        buffer = np.empty(_CHUNK, np.uint8)

        def chunk(count: int) -> np.ndarray:
            data = buffer[: min(count, _CHUNK)]
            if stream.readinto(data) != data.size:  # type: ignore[arg-type]
                raise BadInputError(f"{path} ended early, so it changed while it was read: convert again")
            checksum.update(data.data)
            return data

        for name, bound in sorted(bounds.items(), key=lambda item: item[1].info.offset):
            info = bound.info
            while position < info.offset:
                position += chunk(info.offset - position).size
            end = info.offset + info.byte_size
            while position < end:
                bits = chunk(end - position).view(_BITS[info.dtype])
                if not _largest(bits, info.dtype) < bound.below:
                    first = (position - info.offset) // bits.itemsize
                    raise _out_of_bounds(path, name, bound, bits, first)
                position += bits.nbytes
        while position < size:
            position += chunk(size - position).size
    return FileRecord(path=file, size=size, sha256=checksum.hexdigest())


def _largest(bits: np.ndarray, dtype: str) -> float:
    """The largest magnitude, or NaN if one of the values is NaN."""
    # Without the sign, the order of the bits is that of the values; infinity and NaN come last.
    magnitude = np.bitwise_and(bits, bits.dtype.type(np.iinfo(bits.dtype).max >> 1)).max()
    return float(_values(np.array([magnitude]), dtype)[0])


def _values(bits: np.ndarray, dtype: str) -> np.ndarray:
    """The values of some bits as float32."""
    if dtype == "BF16":  # the upper half of a float32
        return (bits.astype(np.uint32) << 16).view(np.float32)
    return bits.view(np.float16).astype(np.float32) if dtype == "F16" else bits.view(np.float32)


def _out_of_bounds(path: Path, name: str, bound: Bound, bits: np.ndarray, first: int) -> BadInputError:
    """The error for a value in a run of a tensor's values that begins at the flat index `first`."""
    values = _values(bits, bound.info.dtype)
    place = int(np.flatnonzero(~(np.abs(values) < bound.below))[0])
    index = [int(number) for number in np.unravel_index(first + place, bound.info.shape)]
    what = f"{values[place]:g}, beyond the range of float16" if math.isfinite(values[place]) else "NaN or infinity"
    return BadInputError(f"{path}: tensor {name} holds {what}, first at {index}: {bound.mend}")
