"""Segments of large files, kept in the store until the files are complete: an interrupted run goes on where it stopped."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

from passes.export.safetensors import CHUNK, raw_chunks, ring, split_into_shards
from passes.header import TensorInfo
from passes.store import Store, digest
from passes.tensor_pass import MadeTensor, chunks_of

__all__ = ["SEGMENT", "Segments"]

# Maximum size of a segment in bytes, unless it is a single tensor: what an interrupted run makes again.
SEGMENT = 1 << 28
_FILE = "segment.bin"


class Segments:
    """Runs of tensors whose bytes are made once, whatever interrupts the run that writes them into files.

    Args:
        store: keeps the segments.
        key: digest of everything that determines the tensors' values.
    """

    def __init__(self, store: Store, key: str) -> None:
        self._store, self._key = store, key
        self._kept: list[str] = []

    def chunks(self, tensors: Sequence[MadeTensor]) -> Iterator[memoryview]:
        """The bytes of tensors, one after the other; see `MadeTensor.chunks`."""
        buffers = ring(CHUNK)
        for run in split_into_shards([tensor.entry.size for tensor in tensors], SEGMENT):
            segment = tensors[run]
            names = [tensor.entry.name for tensor in segment]
            key = digest("segment", 1, self._key, names)
            what = f"segment of {len(names)} tensors, from {names[0]}"
            folder = self._store.get_or_make(key, partial(_write, segment), what)
            self._kept.append(key)
            size = sum(tensor.entry.size for tensor in segment)
            for chunk in raw_chunks(folder, TensorInfo(_FILE, "U8", (size,), 0), buffers):
                yield chunk.data

    def discard(self) -> None:
        """Remove the segments from the store."""
        for key in self._kept:
            self._store.remove(key)


def _write(tensors: Sequence[MadeTensor], folder: Path) -> None:
    with (folder / _FILE).open("wb") as stream:
        stream.writelines(chunks_of(tensors))
