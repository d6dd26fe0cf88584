"""The runtimes that compute finished graphs, one file each, behind one interface."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

__all__ = ["Engine", "Graph", "Value"]

# An array on the host, or a tensor of the engine's own, which may lie on a device.
Value = Any


class Graph(Protocol):
    """One graph, ready to run; it keeps its state between calls."""

    def __call__(self, values: Mapping[str, Value]) -> dict[str, Value]:
        """Run the graph.

        Args:
            values: inputs by name; others are left aside.

        Returns:
            The outputs by name, which the next call may overwrite.
        """
        ...

    def reset(self) -> None:
        """Begin a new sequence: empty the state."""
        ...


class Engine(Protocol):
    """A runtime on one device."""

    device: str

    def open(self, file: Path, shared: Collection[str] = ()) -> Graph:
        """Get a graph ready.

        Args:
            file: the graph.
            shared: outputs that another graph takes as they are; they may stay on the device.

        Raises:
            BadInputError: if the runtime cannot take it.
        """
        ...

    def to_host(self, value: Value) -> np.ndarray:
        """A value as an array that the next call does not overwrite."""
        ...
