"""Values of stored weights: reading them as bits, converting them to float32, and checking that they are finite."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from itertools import repeat

import numpy as np

from manifests.errors import BadInputError
from passes.checkpoint import Checkpoint
from passes.export.safetensors import CHUNK, raw_chunks
from passes.header import TensorInfo

__all__ = ["INFINITY", "MAGNITUDE", "check_finite", "nonfinite", "to_float32", "value_bits"]

_BITS = {"BF16": np.uint16, "F16": np.uint16, "F32": np.uint32}
# Infinity and NaN have all bits of the exponent set: without the sign bit, they are the values from `INFINITY` on.
INFINITY = {"BF16": 0x7F80, "F16": 0x7C00, "F32": 0x7F800000}
MAGNITUDE = {"BF16": 0x7FFF, "F16": 0x7FFF, "F32": 0x7FFFFFFF}


def check_finite(checkpoint: Checkpoint, name: str, chunk: np.ndarray) -> None:
    """Refuse NaN and infinity in some bytes of a tensor.

    Raises:
        BadInputError: with the name of the tensor, if the bytes hold one of them.
    """
    dtype = checkpoint.tensors[name].dtype
    bits = chunk.view(_BITS[dtype])
    if (bits & bits.dtype.type(MAGNITUDE[dtype])).max(initial=0) >= INFINITY[dtype]:
        raise nonfinite(checkpoint, name)


def nonfinite(checkpoint: Checkpoint, name: str) -> BadInputError:
    """The error for a tensor that holds NaN or infinity."""
    file = checkpoint.folder / checkpoint.tensors[name].file
    return BadInputError(
        f"{file}: tensor {name} holds NaN or infinity: give an intact checkpoint, or convert this one with "
        "--allow-nonfinite"
    )


def value_bits(checkpoint: Checkpoint, info: TensorInfo) -> Iterator[np.ndarray]:
    """Read a matrix in runs of rows: the bits of the values [rows, columns] as unsigned integers, valid until the next run."""
    row_size = info.byte_size // info.shape[0]
    buffer = np.empty(max(CHUNK // row_size, 1) * row_size, np.uint8)
    for chunk in raw_chunks(checkpoint.folder, info, repeat(buffer)):
        yield chunk.view(_BITS[info.dtype]).reshape(-1, info.shape[1])


def to_float32(bits: np.ndarray, dtype: str) -> np.ndarray:
    """Convert the bits of values of a dtype to float32, in new memory."""
    if dtype == "BF16":
        # bfloat16 is the upper half of a float32.
        wide = bits.astype(np.uint32)
        wide <<= 16
        return wide.view(np.float32)
    if dtype == "F16":
        return np.take(_float16_values(), bits)
    return bits.view(np.float32).copy()


@cache
def _float16_values() -> np.ndarray:
    """All 65536 float16 values as float32, for look-up by their bits, which is faster than numpy's conversion."""
    return np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)
