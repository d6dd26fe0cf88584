"""Checksums of the blocks in a finished ONNX graph, as `passes.export.checksums` for OpenVINO."""

from __future__ import annotations

from pathlib import Path

from manifests.errors import ConversionError
from passes.export.checksums import block_owner, checksums
from passes.onnx.file import data_file, weight_places
from passes.vocabulary import Component

__all__ = ["block_checksums", "block_constants"]


def block_constants(path: Path, component: Component) -> dict[str, list[tuple[int, int]]]:
    """Places of each block's constants in the .data file: (offset, size) in bytes, in the order of the graph.

    Raises:
        ConversionError: if the name of a constant does not begin with a prefix of a block (`block_prefixes`).
    """
    owner = block_owner(component)
    found: dict[str, list[tuple[int, int]]] = {}
    for name, place in weight_places(path).items():
        block = owner(name)
        if block is None:
            raise ConversionError(f"{path.name}: constant {name} belongs to no block")
        found.setdefault(block, []).append(place)
    return {block.name: found[block.name] for block in component.blocks if block.name in found}


def block_checksums(path: Path, component: Component) -> dict[str, str]:
    """CRC-32 over the constants of each block, read in small pieces.

    Raises:
        ConversionError: if the name of a constant does not begin with a prefix of a block (`block_prefixes`).
    """
    return checksums(data_file(path), block_constants(path, component))
