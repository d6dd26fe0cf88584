"""Tensors in safetensors files of limited size, with an index that maps each tensor to its file."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from manifests.files import write_json
from manifests.model import FileRecord
from passes.export.safetensors import Entry, file_size, split_into_shards, write_safetensors
from passes.export.segments import Segments
from passes.header import FLOAT_DTYPES, read_header
from passes.tensor_pass import MadeTensor, chunks_of

__all__ = ["Shards", "read_shards"]

_WEIGHT_DTYPES = {"I8": "int8", "F16": "f16", "BF16": "bf16", "F32": "f32"}


@dataclass(frozen=True)
class Shards:
    """Tensors divided into files; `write` writes them.

    Attributes:
        stem: first part of the files' names.
        shards: the tensors of each file, in the order of their bytes.
    """

    stem: str
    shards: tuple[tuple[MadeTensor, ...], ...]

    @classmethod
    def packed(cls, stem: str, groups: list[list[MadeTensor]], shard_size: int) -> Shards:
        """Divide tensors over files of at most `shard_size` bytes; the tensors of one group stay together."""
        runs = split_into_shards([sum(tensor.entry.size for tensor in group) for group in groups], shard_size)
        return cls(stem, tuple(tuple(_aligned(tensor for group in groups[run] for tensor in group)) for run in runs))

    @property
    def tensors(self) -> Iterator[MadeTensor]:
        """All tensors, in the order in which they are written."""
        for shard in self.shards:
            yield from shard

    @property
    def files(self) -> list[str]:
        """Names of the files, in order."""
        count = len(self.shards)
        if count == 1:
            return [f"{self.stem}.safetensors"]
        return [f"{self.stem}-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]

    @property
    def file_sizes(self) -> dict[str, int]:
        """Name of each file -> its size in bytes."""
        sizes = (file_size([tensor.entry for tensor in shard]) for shard in self.shards)
        return dict(zip(self.files, sizes, strict=True))

    def count_weights(self, apart: tuple[str, ...] = ()) -> dict[str, int]:
        """Number of weight values by dtype, as in a manifest.

        Args:
            apart: name endings of tensors that do not count as weights, such as scales.
        """
        counts: dict[str, int] = {}
        for tensor in self.tensors:
            if not tensor.entry.name.endswith(apart):
                dtype = _WEIGHT_DTYPES[tensor.entry.dtype]
                counts[dtype] = counts.get(dtype, 0) + int(np.prod(tensor.entry.shape, dtype=np.int64))
        return dict(sorted(counts.items()))

    def write(self, folder: Path, workers: int = 1, segments: Segments | None = None) -> list[FileRecord]:
        """Write the files, and the index if there are several.

        Args:
            folder: an existing folder.
            workers: number of files to write in parallel.
            segments: keeps what has been made of the files, so that another call goes on after an interruption.

        Returns:
            Records of the files, which were hashed while they were written.

        Raises:
            BadInputError: if a pass refuses a value, or a file of the checkpoint has changed.
        """
        from joblib import Parallel, delayed

        # Threads are enough: numpy computes, reads and hashes without the interpreter's lock.
        records: list[FileRecord] = Parallel(n_jobs=workers, prefer="threads")(
            delayed(_write)(folder / name, shard, segments) for name, shard in zip(self.files, self.shards, strict=True)
        )
        if len(self.shards) > 1:
            weight_map = {
                tensor.entry.name: name for name, shard in zip(self.files, self.shards, strict=True) for tensor in shard
            }
            total = sum(tensor.entry.size for tensor in self.tensors)
            index = {"metadata": {"total_size": total}, "weight_map": weight_map}
            records.append(write_json(folder / f"{self.stem}.safetensors.index.json", index))
        return records


def read_shards(folder: Path) -> Shards:
    """The tensors of a folder's safetensors files, read from the headers; the result cannot be written."""
    files = sorted(path.name for path in folder.glob("*.safetensors"))
    headers = (read_header(folder, file, (*FLOAT_DTYPES, "I8")) for file in files)
    return Shards(
        "",
        tuple(
            tuple(
                MadeTensor(Entry(name, info.dtype, info.shape, info.byte_size), lambda: (), "")
                for name, info in header.items()
            )
            for header in headers
        ),
    )


def _write(path: Path, shard: tuple[MadeTensor, ...], segments: Segments | None) -> FileRecord:
    chunks = chunks_of(shard) if segments is None else segments.chunks(shard)
    return write_safetensors(path, [tensor.entry for tensor in shard], chunks)


def _aligned(tensors: Iterable[MadeTensor]) -> Iterator[MadeTensor]:
    """Order tensors so that each starts at a multiple of the size of its values, as readers need it.

    Only tensors whose size is not a multiple of 4 bytes move, to the end, those of larger values first; scales stay before
    their codes.
    """
    odd = []
    for tensor in tensors:
        if tensor.entry.size % 4:
            odd.append(tensor)
        else:
            yield tensor
    yield from sorted(odd, key=lambda tensor: tensor.entry.size % 2)
