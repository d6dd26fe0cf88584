"""Activations on disk: the named arrays of one sample in one safetensors file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np

__all__ = ["BlockInputs", "activation_names", "read_activations", "read_file", "write_activations"]

# Inputs of a block for one sample: port -> (safetensors file, name of the array in it).
BlockInputs = Mapping[str, tuple[Path, str]]


def activation_names(path: Path) -> frozenset[str]:
    """Names of the arrays in a sample's file; empty if the file does not exist."""
    from safetensors import safe_open

    if not path.exists():
        return frozenset()
    with safe_open(path, framework="np") as file:
        return frozenset(file.keys())


def read_file(path: Path) -> dict[str, np.ndarray]:
    """Read all arrays of one sample's file by name."""
    from safetensors.numpy import load_file

    arrays: dict[str, np.ndarray] = load_file(path)
    return arrays


def read_activations(inputs: BlockInputs) -> dict[str, np.ndarray]:
    """Read the inputs of one block for one sample: port -> array."""
    from safetensors import safe_open

    values = {}
    for port, (path, name) in inputs.items():
        with safe_open(path, framework="np") as file:
            values[port] = file.get_tensor(name)
    return values


def write_activations(path: Path, values: Mapping[str, np.ndarray]) -> None:
    """Write the arrays of one sample to a file; each is copied first, so views of a reused buffer are safe."""
    from safetensors.numpy import save_file

    save_file({name: np.ascontiguousarray(value) for name, value in values.items()}, path)
