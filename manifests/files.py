"""Reading JSON, hashing files, and writing files so that a final name always belongs to a complete file."""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import stat
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar

from manifests.errors import BadInputError

if TYPE_CHECKING:
    from pydantic import BaseModel, ValidationError

    from manifests.model import FileRecord

Record = TypeVar("Record", bound="BaseModel")

__all__ = [
    "CHUNKS_AHEAD",
    "UNFINISHED",
    "checked_record",
    "file_record",
    "first_fault",
    "link_or_copy",
    "open_file",
    "read_json",
    "read_record",
    "remove_tree",
    "sha256_file",
    "sync_tree",
    "write_atomically",
    "write_hashed",
    "write_json",
]

# Prefix of the temporary names of files and folders that are still being written.
UNFINISHED = ".vlmconvert-"

# Number of chunks that `write_hashed` may still be hashing when it asks for the next one.
CHUNKS_AHEAD = 4

# Bytes of the largest JSON file that is read: Python's objects for its content may take twenty times as much memory.
_JSON_LIMIT = 64_000_000


def read_json(path: Path, mend: str = "fetch the file again", limit: int = _JSON_LIMIT) -> Any:
    """Read a JSON file.

    Args:
        path: the file.
        mend: end of the error message: what the user can do if the file is missing or unreadable.
        limit: maximum number of bytes of the file.

    Raises:
        BadInputError: if the file is missing, is not a regular file of at most `limit` bytes, or is not JSON.
    """
    try:
        if path.exists() and not path.is_file():  # a pipe would never end
            raise BadInputError(f"{path} is not a file: {mend}")
        if path.stat().st_size > limit:
            raise BadInputError(f"{path} has {path.stat().st_size} bytes, more than such a file can have: {mend}")
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadInputError(f"{path} is missing: {mend}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise BadInputError(f"{path} cannot be read as JSON ({error}): {mend}") from error


def open_file(path: Path) -> IO[bytes]:
    """Open a regular file for reading: a pipe would never end, and a device may be any.

    Raises:
        OSError: if it cannot be opened, or is not a regular file.
    """
    if path.exists() and not path.is_file():
        raise OSError("it is not a file")
    return path.open("rb")


def read_record(path: Path, kind: type[Record], what: str, mend: str) -> Record:
    """Read a JSON file that holds a data model.

    Args:
        path: the file.
        kind: the model.
        what: what the error calls the model, such as `a benchmark`.
        mend: end of the error message, as in `read_json`.

    Raises:
        BadInputError: if the file is missing, is not JSON or does not fit the model.
    """
    return checked_record(read_json(path, mend), path, kind, what, mend)


def checked_record(content: Any, path: Path, kind: type[Record], what: str, mend: str) -> Record:
    """Make a data model of the content of a JSON file; see `read_record`."""
    from pydantic import ValidationError

    try:
        return kind.model_validate(content)
    except ValidationError as error:
        raise BadInputError(f"{path} is not {what} ({first_fault(error)}): {mend}") from error


def first_fault(error: ValidationError) -> str:
    """Describe the first error of a failed validation for the user: which key is wrong, and what is wrong with it."""
    first = error.errors()[0]
    key = ".".join(map(str, first["loc"]))
    known = {"extra_forbidden": "is unknown", "missing": "is missing", "too_short": "is empty"}
    if first["type"] in known:
        return f"{key} {known[first['type']]}"
    return f"{key}: {first['msg']}" if key else first["msg"]


def sha256_file(path: Path) -> str:
    """SHA-256 of a file, as 64 hexadecimal digits."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def file_record(path: Path, root: Path) -> FileRecord:
    """Size and SHA-256 of `path`, recorded under its path relative to `root`."""
    from manifests.model import FileRecord

    return FileRecord(path=path.relative_to(root).as_posix(), size=path.stat().st_size, sha256=sha256_file(path))


def link_or_copy(source: Path, target: Path) -> None:
    """Put a finished, read-only file in a second place: as a hard link where the file system has them, else as a copy."""
    try:
        target.hardlink_to(source)
    except OSError:
        shutil.copyfile(source, target)


def remove_tree(folder: Path) -> None:
    """Remove a folder of vlmconvert's own with all its content, also read-only files, which Windows refuses to remove."""

    def writable(function: Callable[[str], Any], path: str, _error: Any) -> None:
        os.chmod(path, stat.S_IRWXU)
        function(path)

    shutil.rmtree(folder, onerror=writable)


def sync_tree(folder: Path) -> None:
    """Make sure that a folder's files are on the disk, so that they survive a power cut.

    Raises:
        OSError: if they are not, because the disk is full or broken.
    """
    for path in folder.rglob("*"):
        if path.is_file():
            _sync(path)
    _sync_folders(folder)


def _sync_folders(folder: Path) -> None:
    """Make sure that the names in a folder, in its subfolders and in its parent are on the disk."""
    if os.name == "nt":  # Windows has no such call for folders
        return
    for path in (*(path for path in folder.rglob("*") if path.is_dir()), folder, folder.parent):
        _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_atomically(path: Path, text: str) -> None:
    """Write `text` under a temporary name, flush it to disk, and rename it to `path`.

    If `path` is a symbolic link, the link stays, and the file that it points to is replaced.
    """
    if path.exists() and not path.is_file():  # such as /dev/stdout, which no file may replace
        path.write_text(text, encoding="utf-8", newline="\n")
        return
    path = path.resolve()
    temporary = path.with_name(f"{UNFINISHED}{secrets.token_hex(8)}.tmp")
    try:
        with temporary.open("x", encoding="utf-8", newline="\n") as stream:  # the same bytes on every system
            stream.write(text)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> FileRecord:
    """Write indented JSON, and return the file's record."""
    write_atomically(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
    return file_record(path, path.parent)


def write_hashed(path: Path, chunks: Iterable[bytes | memoryview], size: int) -> FileRecord:
    """Write `chunks` to `path`, while another thread hashes them.

    The memory of a chunk may be reused once `CHUNKS_AHEAD` + 1 more chunks have been yielded.

    Args:
        path: the file to write.
        chunks: its content.
        size: number of bytes of all chunks together.

    Returns:
        The file's record, under the file's name without folders.
    """
    checksum = hashlib.sha256()
    with path.open("wb") as stream, ThreadPoolExecutor(1) as thread:
        if size and hasattr(os, "posix_fallocate"):
            # With the space reserved, writing is several times faster and a full disk fails at once; macOS and Windows
            # have no such call.
            os.posix_fallocate(stream.fileno(), 0, size)
        hashed: deque[Future[None]] = deque()
        for data in chunks:
            if len(hashed) == CHUNKS_AHEAD:
                hashed.popleft().result()
            hashed.append(thread.submit(checksum.update, data))
            stream.write(data)
    from manifests.model import FileRecord

    return FileRecord(path=path.name, size=size, sha256=checksum.hexdigest())
