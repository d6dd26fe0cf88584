"""Limits for work on files that may come from a stranger: the kernel ends a process that computes for too long."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

__all__ = ["run_limited"]

T = TypeVar("T")
_MEMORY = 1 << 30
# The stacks of the threads that libraries start for each core count as memory, too.
_OF_A_CORE = 16 << 20


def run_limited(seconds: float, function: Callable[..., T], *arguments: object) -> T:
    """Run a function in this process with limits, where the system has them; meant for a process of its own.

    If it takes more time on the processor than `seconds`, the kernel ends the process, even inside of a library. The waiting
    of a busy machine does not count.

    Args:
        seconds: maximum number of seconds.
        function: the function.
        arguments: its arguments.

    Raises:
        MemoryError: if it takes a gigabyte more than the process had before.
    """
    with _memory_limited(), _time_limited(seconds):
        return function(*arguments)


@contextmanager
def _time_limited(seconds: float) -> Iterator[None]:
    if not hasattr(signal, "setitimer"):
        yield
        return
    signal.signal(signal.SIGPROF, signal.SIG_DFL)  # which ends the process
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


@contextmanager
def _memory_limited() -> Iterator[None]:
    if sys.platform != "linux":
        yield
        return
    import resource

    used = int(Path("/proc/self/statm").read_text().split()[5]) * resource.getpagesize()
    before, most = resource.getrlimit(resource.RLIMIT_DATA)
    wanted = used + _MEMORY + _OF_A_CORE * (os.cpu_count() or 1)
    if most != resource.RLIM_INFINITY:
        wanted = min(wanted, most)
    resource.setrlimit(resource.RLIMIT_DATA, (wanted, most))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (before, most))
