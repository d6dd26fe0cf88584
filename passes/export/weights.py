"""Weights on their way from file to file: converted and hashed in small pieces, so that memory use does not depend on their size."""

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

# Small enough for a chunk to stay in a core's cache from reading to hashing.
_CHUNK = 1 << 18

_NUMPY = {"F32": "<f4", "F16": "<f2", "BF16": "<u2", "U8": "u1", "I8": "u1", "U4": "u1", "I4": "u1"}
_BITS = {"F32": 32, "F16": 16, "BF16": 16, "U8": 8, "I8": 8, "U4": 4, "I4": 4}
# A signed code becomes unsigned by its highest bit: q -> q + 8 in 4 bit, q -> q + 128 in 8 bit.
_SIGN = {"I8": 0x80, "I4": 0x88}


@dataclass(frozen=True)
class Rows:
    """How a matrix gets wider on the way: every value `repeat` times, then zeros up to `width` values a row."""

    columns: int
    repeat: int
    width: int


@dataclass(frozen=True)
class WeightBytes:
    """Where the bytes of one constant lie: `size` bytes from `offset` of `file`.

    `stored` and `wanted` are empty unless the values are to be changed on the way: floats (F32, F16, BF16) are converted,
    signed codes (I8, I4) moved to the unsigned range (U8, U4). 4-bit values lie two in a byte, the first in the lower half.
    """

    file: Path
    offset: int
    size: int
    stored: str = ""
    wanted: str = ""
    rows: Rows | None = None

    @property
    def final_size(self) -> int:
        """Bytes after the conversion."""
        if self.stored == self.wanted and self.rows is None:
            return self.size
        count = self.size * 8 // _BITS[self.stored]
        if self.rows is not None:
            count = count // self.rows.columns * self.rows.width
        return count * _BITS[self.wanted] // 8


def write_bytes(path: Path, small: bytes, copies: list[tuple[WeightBytes, int]], size: int) -> FileRecord:
    """Write `small` and every constant at its place, while another thread hashes what was written.

    Args:
        path: the file to write.
        small: what the file begins with.
        copies: the constants and their offsets, ascending.
        size: of the whole file.

    Raises:
        ConversionError: if a source is too short, or a weight is beyond the range of float16.
    """
    return write_hashed(path, chain([small], _chunks(copies, len(small))), size)


def _chunks(copies: list[tuple[WeightBytes, int]], position: int) -> Iterator[bytes | memoryview]:
    """The bytes of the constants one after the other, with the gaps between their places filled.

    A chunk is overwritten when `CHUNKS_AHEAD` + 1 others have followed it: fresh memory for each would take longer than the rest.
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
    """The bytes of a matrix whose rows get wider; an even number of rows at a time, so that 4-bit values end with a byte."""
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
    return ConversionError(f"{source.file} is shorter than its graph says")


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
    # Infinity and NaN have all bits of the exponent set; on the bits, the check takes no time beside the conversion.
    if source.wanted == "F16" and np.bitwise_and(result.view(np.uint16), 0x7FFF).max() >= 0x7C00:
        raise ConversionError(
            f"a weight in {source.file.name} is beyond the range of float16: use fp32 instead of fp16"
        )
    return result


@cache
def _of_bfloat16(dtype: str) -> np.ndarray:
    """What each of the 65536 values of bfloat16 is in another dtype; to look them up is faster than to convert in numpy."""
    import numpy as np

    # bfloat16 is the upper half of a float32.
    values = np.left_shift(np.arange(1 << 16, dtype=np.uint16), 16, dtype=np.uint32).view("<f4")
    with np.errstate(over="ignore"):
        return values.astype(dtype)
