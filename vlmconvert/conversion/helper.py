"""A process for work that needs torch and transformers, whose memory is free again when the process ends."""

from __future__ import annotations

import gc
from collections.abc import Callable
from concurrent.futures import BrokenExecutor, Future, wait
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, TypeVar

from manifests.errors import BadInputError, ConversionError
from passes.compat.loky import end_processes, end_with_parent

if TYPE_CHECKING:
    from loky import ProcessPoolExecutor

__all__ = ["Helper"]

T = TypeVar("T")
_INTERVAL = 0.2  # seconds


class _DiedError(ConversionError):
    """The helper process has ended before its work was done."""


class Helper:
    """A helper process; use it as a context manager, which ends the process.

    Attributes:
        patient: whether the process may end by itself if it is idle, which takes a second with torch; otherwise it is
            killed. Libraries of torch's exporter leave semaphores behind in a process that is killed.
    """

    def __init__(self) -> None:
        self.patient = False
        self._pool: ProcessPoolExecutor | None = None
        self._latest: Future[Any] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def run(self, function: Callable[..., T], *arguments: Any, meanwhile: Callable[[], None] | None = None) -> T:
        """Run a function in the process, which is started if it is not running.

        Args:
            function: the function.
            arguments: its arguments.
            meanwhile: called here from time to time until the function has returned, and once after it.
        """
        from loky import (
            ProcessPoolExecutor,
        )  # unlike multiprocessing, loky does not import the caller's script in the new process

        if self._pool is None:
            self._pool = ProcessPoolExecutor(1, initializer=_start)
        self._latest = future = self._pool.submit(function, *arguments)
        if meanwhile is not None:
            while not wait([future], _INTERVAL).done:
                meanwhile()
            meanwhile()
        try:
            result: T = future.result()
        except BrokenExecutor as error:
            self.close()
            raise _DiedError(
                "the process that runs torch died; if the machine ran out of memory, close other programs and run the same "
                "command again, which goes on from here"
            ) from error
        return result

    def run_limited(self, too_much: str, function: Callable[..., T], *arguments: Any) -> T:
        """Run a function that limits its own time or memory with `passes.limits.run_limited`.

        Args:
            too_much: the error if the function takes more of them.
            function: the function.
            arguments: its arguments.

        Raises:
            BadInputError: with `too_much`.
        """
        try:
            return self.run(function, *arguments)
        except (_DiedError, MemoryError) as error:
            raise BadInputError(too_much) from error

    def close(self) -> None:
        """End the process."""
        if self._pool is not None:
            idle = self._latest is None or self._latest.done()
            end_processes(self._pool, self.patient and idle)
            self._pool = None


def _start() -> None:
    # The garbage collector takes a fifth of the time to import transformers; higher thresholds avoid this.
    gc.set_threshold(100_000, 50, 100)
    end_with_parent()
