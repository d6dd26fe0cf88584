"""What a person sees: the plan, progress, the last table. Progress goes to standard error, results to standard output."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

__all__ = ["Reporter", "format_size"]

_LOG_INTERVAL = 10.0  # seconds between two lines of one stage, without a terminal
_LOG_WIDTH = 200  # columns of a table, without a terminal


def format_size(size: float) -> str:
    """Bytes as a person reads them: 14.2 MB, 5.23 GB."""
    for unit, factor in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if size >= factor:
            return f"{size / factor:.3g} {unit}"
    return f"{size:.0f} B"


class Reporter:
    """rich progress on a terminal, plain lines elsewhere."""

    def __init__(self) -> None:
        # Naming the files keeps both apart from whatever redirects sys.stdout for a while.
        self.out, self.err = (
            Console(file=file, width=None if file.isatty() else _LOG_WIDTH) for file in (sys.stdout, sys.stderr)
        )

    def log(self, text: str) -> None:
        """One line of progress."""
        self.err.print(text, highlight=False, markup=False, soft_wrap=True)

    def table(self, table: Table) -> None:
        """A table on standard output."""
        self.out.print(table)

    def say(self, text: str) -> None:
        """One line of result."""
        self.out.print(text, highlight=False, markup=False, soft_wrap=True)

    @contextmanager
    def stage(self, title: str, total: int | None = None) -> Iterator[Callable[[str], None]]:
        """Show one stage of work; call the yielded function with a label after each of `total` steps."""
        start = time.monotonic()
        if self.err.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[label]}"),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
            )
            with Progress(*columns, console=self.err, transient=True) as progress:
                task = progress.add_task(title, total=total, label="")
                yield lambda label: progress.update(task, advance=1, label=label)
        else:
            done = 0
            said = start
            self.log(f"{title} ..." if total is None else f"{title}: {total} steps ...")

            def step(label: str) -> None:
                nonlocal done, said
                done += 1
                now = time.monotonic()
                if total and now - said >= _LOG_INTERVAL:
                    said = now
                    left = (now - start) / done * (total - done)
                    self.log(f"{title}: {done}/{total} {label}, about {left:.0f} s left")

            yield step
        self.log(f"{title}: {time.monotonic() - start:.1f} s")
