"""Undocumented behaviour of loky, and of joblib's copy of it, on which vlmconvert relies."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from loky import ProcessPoolExecutor

__all__ = ["end_processes", "end_with_parent", "worker_number"]

_INTERVAL = 0.5  # seconds


def worker_number() -> int | None:
    """Number of this process, from 1, in the order in which joblib started its workers; None if it is not such a worker."""
    kind, _, number = multiprocessing.current_process().name.rpartition("-")
    return int(number) if kind == "LokyProcess" and number.isdigit() else None


def end_processes(pool: ProcessPoolExecutor, wait: bool) -> None:
    """End the processes of a pool: kill them at once, or if `wait`, let them finish their work and exit by themselves."""
    pool.shutdown(wait=wait, kill_workers=not wait)


def end_with_parent() -> None:
    """Initialize a worker process: it ends when its parent does, however that ends, and leaves signals from a terminal to it.

    loky's workers wait for work of a parent that was killed until their time is over, and finish what they work on.
    """
    for name in ("SIGINT", "SIGHUP"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(_INTERVAL)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
