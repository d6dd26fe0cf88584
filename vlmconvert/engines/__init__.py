"""The runtimes that compute finished graphs, one file each, behind one interface."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

__all__ = ["Engine", "Graph", "Value", "open_engine"]

# An array on the host, or a tensor of the engine's own, which may lie on a device.
Value = Any


class Graph(Protocol):
    """One graph, ready to run; it keeps its inputs and its state between calls."""

    def __call__(self, values: Mapping[str, Value]) -> dict[str, Value]:
        """Run the graph.

        Args:
            values: inputs by name; one that is left out, or the very object of the last call, keeps its value.

        Returns:
            The outputs by name, which the next call may overwrite.
        """
        ...

    def reset(self) -> None:
        """Begin a new sequence: empty the state."""
        ...


class Engine(Protocol):
    """A runtime on one device; `suffix` ends the names of its graphs."""

    device: str
    suffix: str

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


def open_engine(
    target: str, device: str = "CPU", ov_config: Mapping[str, Any] | None = None, cache_dir: Path | None = None
) -> Engine:
    """The engine of a target.

    Args:
        target: as in the manifest.
        device: a device name of the runtime.
        ov_config: options of the runtime.
        cache_dir: where OpenVINO keeps compiled models.

    Raises:
        BadInputError: if the runtime does not have the device.
    """
    from vlmconvert.engines.openvino import OpenvinoEngine

    return OpenvinoEngine(device, ov_config, cache_dir)
