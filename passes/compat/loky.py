"""Undocumented behaviour of loky, and of joblib's copy of it, on which vlmconvert relies."""

from __future__ import annotations

import multiprocessing
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from loky import ProcessPoolExecutor

__all__ = ["end_processes", "worker_number"]


def worker_number() -> int | None:
    """Number of this process, from 1, in the order in which joblib started its workers; None if it is not such a worker."""
    kind, _, number = multiprocessing.current_process().name.rpartition("-")
    return int(number) if kind == "LokyProcess" and number.isdigit() else None


def end_processes(pool: ProcessPoolExecutor, wait: bool) -> None:
    """End the processes of a pool: kill them at once, or if `wait`, let them finish their work and exit by themselves."""
    pool.shutdown(wait=wait, kill_workers=not wait)
