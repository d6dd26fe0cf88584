"""Hashing files, and writing them so that a name never stands for half a file."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from manifests.model import FileRecord

__all__ = ["file_record", "sha256_file", "write_atomically"]


def sha256_file(path: Path) -> str:
    """SHA-256 of a file, as 64 hexadecimal digits."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def file_record(path: Path, root: Path) -> FileRecord:
    """The record of `path`, named relative to `root`."""
    return FileRecord(path=path.relative_to(root).as_posix(), size=path.stat().st_size, sha256=sha256_file(path))


def write_atomically(path: Path, text: str) -> None:
    """Write `text` under a temporary name, flush it to the disk, and rename it to `path`."""
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, path)
