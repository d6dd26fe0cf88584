"""Wall time, peak memory and disk space of a command."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

__all__ = ["Measured", "measure"]


class Measured(NamedTuple):
    """What a command took.

    Attributes:
        seconds: wall time.
        memory: peak of the resident memory of its process tree, in bytes.
        disk: maximum number of bytes by which free disk space shrank.
        own: peak of that part of the memory that is not pages of files, in bytes.
    """

    seconds: float
    memory: int
    disk: int
    own: int


def measure(command: list[str], folder: Path = Path()) -> Measured:
    """Run a command.

    Args:
        command: the command line.
        folder: a folder on the disk whose free space is looked at.
    """
    if sys.platform != "linux":
        raise SystemExit("memory is read from /proc: run this benchmark on Linux")
    os.sync()  # what an earlier run wrote must not be on its way to the disk during this one
    peak = own = disk = 0
    free = shutil.disk_usage(folder).free
    start = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    ended = threading.Event()

    def sample() -> None:
        nonlocal peak, own, disk
        while not ended.wait(0.05):
            peak = max(peak, _tree(process.pid, _resident))
            own = max(own, _tree(process.pid, _anonymous))
            disk = max(disk, free - shutil.disk_usage(folder).free)

    watcher = threading.Thread(target=sample)
    watcher.start()
    _, errors = process.communicate()
    ended.set()
    watcher.join()
    if process.returncode:
        raise SystemExit(errors.decode()[-2000:])
    return Measured(time.monotonic() - start, peak, disk, own)


def _tree(pid: int, of: Callable[[Path], int]) -> int:
    """The sum of a figure over a process and all below it, straight from /proc, so that watching takes no core."""
    folder = Path(f"/proc/{pid}")
    try:
        found = of(folder)
        children = [child for task in (folder / "task").iterdir() for child in (task / "children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return found + sum(_tree(int(child), of) for child in children)


def _resident(folder: Path) -> int:
    return int((folder / "statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _anonymous(folder: Path) -> int:
    lines = (folder / "status").read_text().splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")), 0)
