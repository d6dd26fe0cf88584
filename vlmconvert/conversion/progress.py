"""Progress of work that other processes, other threads or libraries do: it is seen in what they leave on the disk."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path

from passes.vocabulary import Block, Component
from vlmconvert.console import Reporter, format_size

__all__ = ["PERCENT", "ChainProgress", "files_made", "growth"]

# Number of steps of a stage that `growth` follows.
PERCENT = 100
_INTERVAL = 0.5  # seconds


def files_made(folder: Path, pattern: str, step: Callable[[str], None]) -> Callable[[], None]:
    """A function that calls `step` with the name of each file in a folder that is new since its last call."""
    known: set[str] = set()

    def look() -> None:
        for name in sorted({path.stem for path in folder.glob(pattern)} - known):
            known.add(name)
            step(name)

    return look


@contextmanager
def growth(folder: Path, expected: int, step: Callable[[str], None]) -> Iterator[None]:
    """Call `step` for each percent by which the files in a folder grow during the `with` block.

    Args:
        folder: the folder.
        expected: bytes that the files are expected to have at the end.
        step: called with the size that has been reached.
    """
    ended = threading.Event()

    def look() -> None:
        said = 0
        while not ended.wait(_INTERVAL):
            try:
                size = sum(path.stat().st_size for path in folder.iterdir() if path.is_file())
            except OSError:  # a file has been renamed meanwhile; if the folder is gone, who writes into it says so
                continue
            while said < min(PERCENT - 1, PERCENT * size // max(1, expected)):
                said += 1
                step(format_size(size))

    watcher = threading.Thread(target=look, daemon=True)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()


class ChainProgress:
    """The progress of the float chain: one stage for each component, which begins with its first block that is computed.

    Args:
        reporter: shows the stages.
        counts: name of a component -> number of samples that flow through it.
    """

    def __init__(self, reporter: Reporter, counts: Mapping[str, int]) -> None:
        self._reporter, self._counts = reporter, counts
        self._running = ExitStack()
        self._component = ""
        self._step: Callable[[str], None] = lambda label: None

    def step(self, component: Component, block: Block) -> None:
        """Say that a block has been computed on one sample."""
        if component.name != self._component:
            self.close()
            names = [other.name for other in component.blocks]
            total = (len(names) - names.index(block.name)) * self._counts[component.name]
            title = f"{component.name.replace('_', ' ')}: activations"
            self._step = self._running.enter_context(self._reporter.stage(title, total))
            self._component = component.name
        self._step(block.name)

    def close(self) -> None:
        """End the stage that is running."""
        self._running.close()
        self._component = ""
