"""Writing safetensors files without holding a tensor in memory: only names, dtypes and shapes must be known at the start."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, cycle
from pathlib import Path

import numpy as np

from manifests.errors import BadInputError
from manifests.files import CHUNKS_AHEAD, write_hashed
from manifests.model import FileRecord
from passes.header import TensorInfo

__all__ = ["CHUNK", "Entry", "file_size", "raw_chunks", "ring", "split_into_shards", "write_safetensors"]

# Size of a chunk in bytes: small enough to stay in a core's cache from reading to hashing.
CHUNK = 1 << 18
_ALIGNMENT = 8


@dataclass(frozen=True)
class Entry:
    """One tensor of a file to be written; `dtype` and `size` (in bytes) as in `passes.checkpoint.TensorInfo`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    size: int


def write_safetensors(path: Path, entries: Sequence[Entry], chunks: Iterable[bytes | memoryview]) -> FileRecord:
    """Write one safetensors file.

    Args:
        path: the file to write.
        entries: the tensors, in the order of their bytes.
        chunks: the bytes of all tensors, one after the other; `manifests.files.write_hashed` says how long the memory of a
            chunk must stay valid.

    Returns:
        The file's record, hashed while it was written.
    """
    header = _header(entries)
    return write_hashed(path, chain([header], chunks), len(header) + sum(entry.size for entry in entries))


def file_size(entries: Sequence[Entry]) -> int:
    """Number of bytes of the file that `write_safetensors` writes for these tensors."""
    return len(_header(entries)) + sum(entry.size for entry in entries)


def _header(entries: Sequence[Entry]) -> bytes:
    table: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for entry in entries:
        table[entry.name] = {
            "dtype": entry.dtype,
            "shape": list(entry.shape),
            "data_offsets": [offset, offset + entry.size],
        }
        offset += entry.size
    text = json.dumps(table, separators=(",", ":")).encode()
    text += b" " * (-len(text) % _ALIGNMENT)
    return struct.pack("<Q", len(text)) + text


def split_into_shards(sizes: Sequence[int], limit: int) -> list[slice]:
    """Divide items into consecutive runs of at most `limit` bytes; an item larger than that is a run of its own."""
    runs: list[slice] = []
    first = total = 0
    for index, size in enumerate(sizes):
        if total and total + size > limit:
            runs.append(slice(first, index))
            first, total = index, 0
        total += size
    return [*runs, slice(first, len(sizes))]


def ring(size: int) -> Iterator[np.ndarray]:
    """Byte buffers to fill in turn for `write_hashed`: allocating new memory for each chunk would take most of the time."""
    return cycle([np.empty(size, np.uint8) for _ in range(CHUNKS_AHEAD + 2)])


def raw_chunks(folder: Path, info: TensorInfo, buffers: Iterator[np.ndarray]) -> Iterator[np.ndarray]:
    """Read the bytes of a stored tensor, in views of `buffers` that hold whole values.

    Raises:
        BadInputError: if the file ends inside the tensor.
    """
    with (folder / info.file).open("rb", buffering=0) as stream:
        stream.seek(info.offset)
        left = info.byte_size
        while left:
            buffer = next(buffers)
            chunk = buffer[: min(left, buffer.size)]
            if stream.readinto(chunk) != chunk.size:  # type: ignore[arg-type]
                raise BadInputError(f"{folder / info.file} ended early, so it changed while it was read: convert again")
            left -= chunk.size
            yield chunk
