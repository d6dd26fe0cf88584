"""Copying weights from file to file: they are converted and hashed in small pieces, whatever their size."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import chain, cycle
from pathlib import Path
from typing import IO, TYPE_CHECKING

from manifests.errors import ConversionError
from manifests.files import CHUNKS_AHEAD, write_hashed
from manifests.model import FileRecord

if TYPE_CHECKING:
    import numpy as np

__all__ = ["Rows", "WeightBytes", "write_bytes"]

# Size of a chunk in bytes: small enough to stay in a core's cache from reading to hashing.
_CHUNK = 1 << 18

_NUMPY = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "U8": "u1", "I8": "u1", "U4": "u1", "I4": "u1"}
_BITS = {"F32": 32, "F16": 16, "BF16": 16, "U8": 8, "I8": 8, "U4": 4, "I4": 4}
# A signed code becomes unsigned by its highest bit: q -> q + 8 in 4 bit, q -> q + 128 in 8 bit.
_SIGN = {"I8": 0x80, "I4": 0x88}


@dataclass(frozen=True)
class Rows:
    """How a matrix is widened: every value of a row of `columns` is repeated `repeat` times, and zeros fill up to `width`."""

    columns: int
    repeat: int
    width: int


@dataclass(frozen=True)
class WeightBytes:
    """Place of the bytes of one constant, and how they are changed while they are copied.

    Two 4-bit values are in one byte, the first one in the lower half.

    Attributes:
        file: the file that holds the bytes.
        offset: start of the bytes in the file.
        size: number of bytes.
        stored: dtype in the file, if the values are converted: F32, F16, BF16, U8, I8, U4 or I4.
        wanted: dtype to convert to: floats to F32 or F16, signed codes (I8, I4) to unsigned ones (U8, U4).
        rows: how the rows of a matrix are widened, if they are.
    """

    file: Path
    offset: int
    size: int
    stored: str = ""
    wanted: str = ""
    rows: Rows | None = None

    @property
    def final_size(self) -> int:
        """Number of bytes after the conversion."""
        if self.stored == self.wanted and self.rows is None:
            return self.size
        count = self.size * 8 // _BITS[self.stored]
        if self.rows is not None:
            count = count // self.rows.columns * self.rows.width
        return count * _BITS[self.wanted] // 8


def write_bytes(path: Path, small: bytes, copies: list[tuple[WeightBytes, int]], size: int) -> FileRecord:
    """Write `small` and every constant at its offset, while another thread hashes the bytes.

    Args:
        path: the file to write.
        small: the bytes at the start of the file.
        copies: the constants and their offsets in the file, ascending.
        size: number of bytes of the whole file.

    Raises:
        ConversionError: if a source file is too short, or a weight exceeds the range of float16.
    """
    return write_hashed(path, chain([small], _chunks(copies, len(small))), size)


def _chunks(copies: list[tuple[WeightBytes, int]], position: int) -> Iterator[bytes | memoryview]:
    """The bytes of the constants one after the other, with zeros in the gaps between them.

    The memory of a chunk is reused after `CHUNKS_AHEAD` + 1 more chunks: allocating new memory would take most of the time.
    """
    import numpy as np

    raw = np.empty(_CHUNK, np.uint8)
    buffers = cycle([np.empty(2 * _CHUNK, np.uint8) for _ in range(CHUNKS_AHEAD + 2)])
    for source, place in copies:
        yield bytes(place - position)
        position = place + source.final_size
        with source.file.open("rb", buffering=0) as file:
            file.seek(source.offset)
            if source.rows is not None:
                yield from _wider_rows(file, source)
                continue
            for first in range(0, source.size, _CHUNK):
                buffer = next(buffers)
                chunk = (buffer if source.stored == source.wanted else raw)[: min(_CHUNK, source.size - first)]
                if file.readinto(chunk) != chunk.size:  # type: ignore[arg-type]
                    raise _too_short(source)
                yield (chunk if source.stored == source.wanted else _convert(chunk, source, buffer)).data


def _wider_rows(file: IO[bytes], source: WeightBytes) -> Iterator[memoryview]:
    """The bytes of a matrix whose rows are widened; an even number of rows at a time, so that 4-bit values fill all bytes."""
    import numpy as np

    assert source.rows is not None
    rows, bits = source.rows, _BITS[source.stored]
    pair = 2 * rows.columns * bits // 8
    step = max(1, _CHUNK // max(pair, 2 * rows.width * _BITS[source.wanted] // 8)) * pair
    for first in range(0, source.size, step):
        data = file.read(min(step, source.size - first))
        if len(data) != min(step, source.size - first):
            raise _too_short(source)
        codes = np.frombuffer(data, np.uint8)
        if source.stored in _SIGN:
            codes = codes ^ np.uint8(_SIGN[source.stored])
        if bits == 4:
            codes = np.stack([codes & 15, codes >> 4], axis=1).reshape(-1)
        values = codes.view(_NUMPY[source.stored])
        values = values[: values.size // rows.columns * rows.columns].reshape(-1, rows.columns)
        wide = np.zeros((len(values), rows.width), _NUMPY[source.wanted])
        wide[:, : rows.columns * rows.repeat] = values.repeat(rows.repeat, axis=1)
        if _BITS[source.wanted] == 4:
            wide = wide.reshape(-1, 2)
            wide = wide[:, 0] | wide[:, 1] << 4
        yield wide.reshape(-1).view(np.uint8).data


def _too_short(source: WeightBytes) -> ConversionError:
    return ConversionError(f"{source.file} is shorter than its graph says: convert again")


def _convert(chunk: np.ndarray, source: WeightBytes, buffer: np.ndarray) -> np.ndarray:
    """The values of a chunk in the wanted dtype, at the start of `buffer`."""
    import numpy as np

    if source.stored in _SIGN:
        return np.bitwise_xor(chunk, _SIGN[source.stored], out=buffer[: chunk.size])
    values = chunk.view(_NUMPY[source.stored])
    result = buffer.view(_NUMPY[source.wanted])[: values.size]
    if source.stored == "BF16":
        np.take(_of_bfloat16(_NUMPY[source.wanted]), values, out=result, mode="clip")
    else:
        with np.errstate(over="ignore"):
            np.copyto(result, values, casting="unsafe")
    # Infinity and NaN have all bits of the exponent set; a check of the bits takes little time beside the conversion.
    if source.wanted == "F16" and np.bitwise_and(result.view(np.uint16), 0x7FFF).max() >= 0x7C00:
        raise ConversionError(
            f"a weight in {source.file.name} is beyond the range of float16: use fp32 instead of fp16"
        )
    return result


@cache
def _of_bfloat16(dtype: str) -> np.ndarray:
    """All 65536 bfloat16 values in another dtype, for look-up by their bits, which is faster than numpy's conversion."""
    import numpy as np

    # bfloat16 is the upper half of a float32.
    values = np.left_shift(np.arange(1 << 16, dtype=np.uint16), 16, dtype=np.uint32).view("<f4")
    with np.errstate(over="ignore"):
        return values.astype(dtype)
