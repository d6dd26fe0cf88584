"""Activations on disk: the named arrays of one sample in one safetensors file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

__all__ = ["BlockInputs", "activation_names", "read_activations", "write_activations"]

# Where a block finds its inputs for one sample: port -> (file, name in the file).
BlockInputs = Mapping[str, tuple[Path, str]]


def activation_names(path: Path) -> frozenset[str]:
    """Names of the arrays that a sample has; none if there is no such file."""
    from safetensors import safe_open

    if not path.exists():
        return frozenset()
    with safe_open(path, framework="np") as file:
        return frozenset(file.keys())


def read_activations(inputs: BlockInputs) -> dict[str, np.ndarray]:
    """Read the inputs of one block for one sample."""
    from safetensors import safe_open

    values = {}
    for port, (path, name) in inputs.items():
        with safe_open(path, framework="np") as file:
            values[port] = file.get_tensor(name)
    return values


def write_activations(path: Path, values: Mapping[str, np.ndarray]) -> None:
    """Write the arrays of one sample; every array is copied, so views of a reused buffer are safe."""
    from safetensors.numpy import save_file

    save_file({name: np.ascontiguousarray(value) for name, value in values.items()}, path)
