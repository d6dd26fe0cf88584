"""Hashing files, and writing them so that a name never stands for half a file."""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

from manifests.model import FileRecord

__all__ = ["CHUNKS_AHEAD", "file_record", "sha256_file", "write_atomically", "write_hashed"]

# Chunks that `write_hashed` may still be hashing when it asks for the next one.
CHUNKS_AHEAD = 4


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


def write_hashed(path: Path, chunks: Iterable[bytes | memoryview], size: int) -> FileRecord:
    """Write `chunks` of `size` bytes together, while another thread hashes what was written.

    The memory of a chunk may be used again when `CHUNKS_AHEAD` + 1 others have followed it.
    """
    checksum = hashlib.sha256()
    with path.open("wb") as stream, ThreadPoolExecutor(1) as thread:
        if size:
            # Makes writing several times faster, and a full disk fails here.
            os.posix_fallocate(stream.fileno(), 0, size)
        hashed: deque[Future[None]] = deque()
        for data in chunks:
            if len(hashed) == CHUNKS_AHEAD:
                hashed.popleft().result()
            hashed.append(thread.submit(checksum.update, data))
            stream.write(data)
    return FileRecord(path=path.name, size=size, sha256=checksum.hexdigest())
