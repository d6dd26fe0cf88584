"""The files of a checkpoint with their hashes, on which the keys of all results in the store depend."""

from __future__ import annotations

import os
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from manifests.errors import ConversionError
from manifests.files import sha256_file
from manifests.model import FileRecord
from passes.checkpoint import Checkpoint
from passes.export.template import VERSION
from passes.finite import Bound, hash_weights
from passes.processor_files import source_names
from passes.store import digest, library_versions
from vlmconvert.console import Reporter, format_size
from vlmconvert.families.opened import OpenedModel

__all__ = ["Source", "hash_source", "source_sizes"]


@dataclass(frozen=True)
class Source:
    """A checkpoint's files.

    Attributes:
        folder: the checkpoint.
        files: path, size and SHA-256 of each file that a conversion reads.
        times: for each file, when it was changed last, in nanoseconds since the epoch.
    """

    folder: Path
    files: tuple[FileRecord, ...]
    times: tuple[int, ...]

    def identity(self, model: OpenedModel) -> str:
        """Digest of everything that all results depend on: the weights, the traces and the library versions."""
        read = {"config.json", *model.checkpoint.weight_files}
        hashes = [record.sha256 for record in self.files if record.path in read]
        return digest(hashes, VERSION, model.templates.folder.name, library_versions())

    def check_unchanged(self) -> None:
        """Find out whether the checkpoint is still what the results were made from.

        Raises:
            ConversionError: with the file that has vanished or changed.
        """
        for record, time in zip(self.files, self.times, strict=True):
            path = self.folder / record.path
            try:
                status = path.stat()
                same = status.st_size == record.size
                if same and status.st_mtime_ns != time:
                    same = sha256_file(path) == record.sha256
            except OSError as error:
                raise ConversionError(
                    f"{path} cannot be read any more ({error.strerror}): put it back and run the same command again, which "
                    "goes on from here"
                ) from None
            if not same:
                raise ConversionError(f"{path} has changed since the conversion began: run the same command again")


def source_sizes(checkpoint: Checkpoint) -> dict[str, int]:
    """Path -> bytes of each file that a conversion reads."""
    return {name: (checkpoint.folder / name).stat().st_size for name in source_names(checkpoint)}


def hash_source(checkpoint: Checkpoint, reporter: Reporter, bounds: Mapping[str, Bound] | None = None) -> Source:
    """Hash all files of a checkpoint, several at a time, and check the values of its tensors on the way.

    Args:
        checkpoint: the checkpoint.
        reporter: shows progress.
        bounds: name of each tensor that is checked -> what its values must be.

    Raises:
        BadInputError: if a value is out of bounds.
    """
    of_file: dict[str, dict[str, Bound]] = {file: {} for file in checkpoint.weight_files}
    for tensor, bound in (bounds or {}).items():
        of_file[bound.info.file][tensor] = bound
    sizes = source_sizes(checkpoint)
    folder = checkpoint.folder
    times = tuple((folder / name).stat().st_mtime_ns for name in sizes)
    with (
        ThreadPoolExecutor(os.cpu_count() or 1) as threads,
        reporter.stage(f"hashing {format_size(sum(sizes.values()))} of the checkpoint", len(sizes)) as step,
    ):
        pending = {name: threads.submit(hash_weights, folder, name, of_file.get(name, {})) for name in sizes}
        records = []
        for name, future in pending.items():
            records.append(future.result())
            step(name)
    return Source(folder, tuple(records), times)
