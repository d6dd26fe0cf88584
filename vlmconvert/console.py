"""Output on the terminal: progress goes to standard error; tables and results go to standard output."""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

__all__ = ["Reporter", "format_size", "format_time"]

_LOG_INTERVAL = 10.0  # seconds between two progress lines of one stage, where output is not a terminal
_LOG_WIDTH = 200  # characters that a table may be wide, where output is not a terminal


def format_size(size: float) -> str:
    """A number of bytes with a unit: 14.2 MB, 5.23 GB."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:.3g} {unit}"
    return f"{size:.0f} B"


def format_time(seconds: float) -> str:
    """A time in words: 40 seconds, 3 minutes, 2.5 hours."""
    if seconds < 90:
        return f"{seconds:.0f} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 5400 else f"{seconds / 3600:.1f} hours"


class _Console(Console):
    """A console that stays silent once nobody reads its output any more, instead of ending the program."""

    def on_broken_pipe(self) -> None:
        """See rich."""
        self.quiet = True
        with open(os.devnull, "w", encoding="utf-8") as nowhere:
            os.dup2(nowhere.fileno(), self.file.fileno())


class Reporter:
    """Shows progress and results: progress bars on a terminal, plain lines elsewhere.

    Args:
        quiet: show nothing at all.
    """

    def __init__(self, quiet: bool = False) -> None:
        # With explicit files, the consoles keep their streams when other code redirects sys.stdout for a while.
        self.out, self.err = (
            _Console(file=file, width=None if file.isatty() else _LOG_WIDTH, quiet=quiet)
            for file in (sys.stdout, sys.stderr)
        )
        self._lock = threading.Lock()
        self._bars: Progress | None = None
        self._running = 0

    def log(self, text: str) -> None:
        """Print one line of progress to standard error."""
        self.err.print(text, highlight=False, markup=False, soft_wrap=True)

    def table(self, table: Table) -> None:
        """Print a table to standard output."""
        self.out.print(table)

    def say(self, text: str) -> None:
        """Print one line of the result to standard output."""
        self.out.print(text, highlight=False, markup=False, soft_wrap=True)

    @contextmanager
    def stage(self, title: str, total: int | None = None) -> Iterator[Callable[[str], None]]:
        """Show the progress of one stage of work, and at its end how long it took; several may run at a time.

        Args:
            title: name of the stage.
            total: number of steps; None if the stage is not divided into steps.

        Yields:
            A function to call with a label after each step.
        """
        start = time.monotonic()
        steps = self._bar(title, total) if self.err.is_terminal else self._lines(title, total)
        with steps as step:
            yield step
        self.log(f"{title}: {time.monotonic() - start:.1f} s")

    @contextmanager
    def _bar(self, title: str, total: int | None) -> Iterator[Callable[[str], None]]:
        """A bar below those of the stages that already run, since a terminal can have only one live display."""
        with self._lock:
            self._running += 1
            if self._bars is None:
                columns = (
                    TextColumn("{task.description}"),
                    BarColumn(),
                    MofNCompleteColumn(),
                    TextColumn("{task.fields[label]}"),
                    TimeElapsedColumn(),
                    TimeRemainingColumn(),
                )
                self._bars = Progress(*columns, console=self.err, transient=True)
                self._bars.start()
            bars = self._bars
        task = bars.add_task(title, total=total, label="")
        try:
            yield lambda label: bars.update(task, advance=1, label=label)
        finally:
            with self._lock:
                bars.remove_task(task)
                self._running -= 1
                if not self._running:
                    bars.stop()
                    self._bars = None

    @contextmanager
    def _lines(self, title: str, total: int | None) -> Iterator[Callable[[str], None]]:
        """A line from time to time."""
        start = said = time.monotonic()
        done = 0
        self.log(f"{title} ..." if total is None else f"{title}: {total} steps ...")

        def step(label: str) -> None:
            nonlocal done, said
            done += 1
            now = time.monotonic()
            if now - said < _LOG_INTERVAL:
                return
            said = now
            if total is None:
                self.log(f"{title}: {label}")
            else:
                left = (now - start) / done * (total - done)
                self.log(f"{title}: {done}/{total} {label}, about {left:.0f} s left")

        yield step
