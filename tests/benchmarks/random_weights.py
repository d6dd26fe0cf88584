"""Writing random bf16 weights shard by shard, without holding them in memory, and the command line of what does so."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import click
import torch
from safetensors.torch import save_file

__all__ = ["command", "write_random_weights"]

_SHARD = 500_000_000  # bytes


def write_random_weights(
    folder: Path, shapes: Mapping[str, torch.Size], on_hub: Mapping[str, str], seed: int = 0
) -> None:
    """Write shards and their index.

    Args:
        folder: to write to.
        shapes: of the tensors, by their in-memory names.
        on_hub: in-memory prefix -> prefix on the hub.
        seed: of the values, drawn with a deviation of 0.02; norms are one.
    """
    generator = torch.Generator().manual_seed(seed)
    shard: dict[str, torch.Tensor] = {}
    weight_map: dict[str, str] = {}
    size = total = number = 0

    def flush() -> None:
        nonlocal size, number
        number += 1
        file = f"model-{number:05d}.safetensors"
        save_file(shard, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(shard, file))
        shard.clear()
        size = 0

    for name, shape in shapes.items():
        prefix = next(prefix for prefix in on_hub if name.startswith(prefix))
        shard[on_hub[prefix] + name.removeprefix(prefix)] = _values(name, shape, generator)
        size += 2 * shape.numel()
        total += 2 * shape.numel()
        if size >= _SHARD:
            flush()
    flush()
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))


def _values(name: str, shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    if "norm" in name and name.endswith("weight"):
        return torch.ones(shape, dtype=torch.bfloat16)
    if "gate" in name.rpartition(".")[2]:
        return torch.full(shape, 0.5, dtype=torch.bfloat16)
    return (torch.randn(shape, generator=generator) * 0.02).to(torch.bfloat16)


def command(write: Callable[..., None]) -> click.Command:
    """A command for a function that takes a folder and numbers with defaults: each number is an option."""

    @click.command(help=write.__doc__)
    @click.argument("folder", type=click.Path(path_type=Path))
    def main(folder: Path, **numbers: int) -> None:
        write(folder, **numbers)

    for name, parameter in list(inspect.signature(write).parameters.items())[1:]:
        main = click.option(f"--{name.replace('_', '-')}", default=parameter.default, show_default=True)(main)
    return main
