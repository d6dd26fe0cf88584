"""Temporary names say which process writes under them, so that what killed processes have left can be removed."""

from __future__ import annotations

import os
import re
import socket
import time
from contextlib import suppress
from pathlib import Path

from manifests.files import remove_tree

__all__ = ["is_left", "remove_leftovers", "temporary_prefix"]

# Only characters that every library takes in a path.
_WRITER = re.compile(r"^(?P<pid>\d+)\.(?P<place>[\w-]*)\.")
_WEEK = 7 * 24 * 3600


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
