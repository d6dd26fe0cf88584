"""Temporary names say which process writes under them, so that what killed processes have left can be removed."""

from __future__ import annotations

import os
import re
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from manifests.files import UNFINISHED, remove_tree

__all__ = ["is_left", "remove_leftovers", "remove_own", "scratch_folder", "temporary_folder", "temporary_prefix"]

# Only characters that every library takes in a path.
_WRITER = re.compile(r"^(?P<pid>\d+)\.(?P<place>[\w-]*)\.")
_WEEK = 7 * 24 * 3600
# The temporary folders that this process has now.
_own: set[Path] = set()


@contextmanager
def temporary_folder(parent: Path, prefix: str) -> Iterator[Path]:
    """Make a folder with a temporary name, which is removed at the end if it still has that name.

    Args:
        parent: an existing folder.
        prefix: beginning of the name.
    """
    folder = Path(tempfile.mkdtemp(prefix=temporary_prefix(prefix), dir=parent))
    _own.add(folder)
    try:
        yield folder
    finally:
        with suppress(OSError):
            remove_tree(folder)
        _own.discard(folder)


@contextmanager
def scratch_folder() -> Iterator[Path]:
    """Make a temporary folder in the system's place for them, and remove those that killed processes have left there."""
    parent = Path(tempfile.gettempdir())
    remove_leftovers(parent, UNFINISHED)
    with temporary_folder(parent, UNFINISHED) as folder:
        yield folder


def remove_own() -> None:
    """Remove all temporary folders of this process, which is about to end without leaving their `with` blocks."""
    for folder in list(_own):
        with suppress(OSError):
            remove_tree(folder)


def temporary_prefix(prefix: str) -> str:
    """A prefix for temporary names of this process, which begins with `prefix`."""
    return f"{prefix}{os.getpid()}.{_place()}."


def remove_leftovers(folder: Path, prefix: str) -> int:
    """Remove the files and folders whose temporary names begin with `prefix`, and which no process writes any more.

    Returns:
        Number of files and folders removed.
    """
    removed = 0
    for path in folder.glob(f"{prefix}*.*.*") if folder.is_dir() else ():
        with suppress(OSError):  # of another user, or removed by another process
            if is_left(path, prefix):
                if path.is_dir() and not path.is_symlink():
                    remove_tree(path)
                else:
                    path.unlink()
                removed += 1
    return removed


def is_left(path: Path, prefix: str) -> bool:
    """Whether no process writes a file or folder any more whose temporary name begins with `prefix`.

    What another machine writes counts as left if it has not changed for a week.
    """
    import psutil

    match = _WRITER.match(path.name.removeprefix(prefix))
    if match is None:
        return False
    changed = path.stat().st_mtime
    if match["place"] != _place():
        return time.time() - changed > _WEEK
    try:
        # A process that began after the last change has only the same number.
        return bool(psutil.Process(int(match["pid"])).create_time() > changed + 1)
    except psutil.NoSuchProcess:
        return True


def _place() -> str:
    """The machine, and the container, in which process ids are unique."""
    host = re.sub(r"[^A-Za-z0-9-]", "_", socket.gethostname())
    try:
        return f"{host}_{os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return host
