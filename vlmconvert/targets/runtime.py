"""The interface of the runtimes that compute finished graphs."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

__all__ = ["Graph", "Runtime", "Value"]

# A numpy array in the memory of the host, or a tensor of the runtime, which may be in the memory of a device.
Value = Any


class Graph(Protocol):
    """A compiled graph, which keeps its state between calls."""

    @property
    def outputs(self) -> Sequence[str]:
        """Names of the outputs."""
        ...

    def __call__(self, values: Mapping[str, Value]) -> dict[str, Value]:
        """Run the graph.

        Args:
            values: inputs by name; values that are not inputs of the graph are ignored.

        Returns:
            The outputs by name; the next call may overwrite them.
        """
        ...

    def reset(self) -> None:
        """Empty the state, to begin a new sequence."""
        ...


class Runtime(Protocol):
    """A runtime that computes graphs on one device."""

    device: str

    def open(self, file: Path, shared: Collection[str] = ()) -> Graph:
        """Compile a graph.

        Args:
            file: file of the graph.
            shared: names of outputs that another graph takes unchanged; they may stay on the device.

        Raises:
            BadInputError: if the runtime cannot compile the graph.
        """
        ...

    def to_host(self, value: Value) -> np.ndarray:
        """Copy a value into an array of the host that the next call does not overwrite."""
        ...
