"""Wall time and peak memory of a command."""

from __future__ import annotations

import os
import resource
import subprocess
import threading
import time
from pathlib import Path

__all__ = ["measure"]


def measure(command: list[str]) -> tuple[float, float]:
    """Run a command; returns wall time in seconds and peak memory of its process tree in bytes."""
    os.sync()  # what an earlier run wrote must not be on its way to the disk during this one
    peak = 0
    start = time.monotonic()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    ended = threading.Event()

    def sample() -> None:
        nonlocal peak
        while not ended.wait(0.05):
            peak = max(peak, resident_memory(process.pid))

    watcher = threading.Thread(target=sample)
    watcher.start()
    _, errors = process.communicate()
    ended.set()
    watcher.join()
    if process.returncode:
        raise SystemExit(errors.decode()[-2000:])
    return time.monotonic() - start, peak


def resident_memory(pid: int) -> int:
    """Bytes of a process and all below it, straight from /proc, so that the watching takes no core from the watched."""
    try:
        folder = Path(f"/proc/{pid}")
        pages = int((folder / "statm").read_text().split()[1])
        children = [child for task in (folder / "task").iterdir() for child in (task / "children").read_text().split()]
    except (FileNotFoundError, ProcessLookupError):
        return 0
    return pages * resource.getpagesize() + sum(resident_memory(int(child)) for child in children)
