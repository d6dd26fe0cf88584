"""Checksums of the blocks in a finished IR, so that damaged bytes can be traced to a block."""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from xml.etree import ElementTree

from manifests.errors import ConversionError
from passes.export.names import block_prefixes
from passes.vocabulary import Component

__all__ = ["block_checksums", "block_constants", "block_owner", "checksums"]

_CHUNK = 1 << 18
_THREADS = 2


def block_constants(xml: Path, component: Component) -> dict[str, list[tuple[int, int]]]:
    """Places of each block's constants in the .bin file: (offset, size) in bytes, in the order of the graph.

    The name of a node begins with a prefix of its block (`block_prefixes`). Constants that quantization adds have other
    names; such a constant belongs to the block of the first node with such a prefix that its value reaches.

    Raises:
        ConversionError: if a constant reaches no node of a block.
    """
    tree = ElementTree.parse(xml)
    owner = block_owner(component)
    names = {layer.attrib["id"]: layer.attrib["name"] for layer in tree.iterfind("layers/layer")}
    readers: dict[str, list[str]] = {}
    for edge in tree.iterfind("edges/edge"):
        readers.setdefault(edge.attrib["from-layer"], []).append(edge.attrib["to-layer"])
    found: dict[str, list[tuple[int, int]]] = {}
    for layer in tree.iterfind("layers/layer[@type='Const']"):
        block, reached = None, deque([layer.attrib["id"]])
        seen: set[str] = set()
        while reached and block is None:
            node = reached.popleft()
            block = owner(names[node])
            reached += [reader for reader in readers.get(node, []) if reader not in seen]
            seen.update(reached)
        if block is None:
            raise ConversionError(f"{xml.name}: constant {layer.attrib['name']} belongs to no block")
        data = layer.find("data")
        assert data is not None
        found.setdefault(block, []).append((int(data.attrib["offset"]), int(data.attrib["size"])))
    return {block.name: found[block.name] for block in component.blocks if block.name in found}


def block_checksums(xml: Path, component: Component) -> dict[str, str]:
    """CRC-32 over the constants of each block, which are read in small pieces.

    They tell which block is damaged; whether a file is damaged at all, its SHA-256 tells.

    Raises:
        ConversionError: if a constant reaches no node of a block.
    """
    return checksums(xml.with_suffix(".bin"), block_constants(xml, component))


def checksums(binary: Path, constants: Mapping[str, list[tuple[int, int]]]) -> dict[str, str]:
    """CRC-32 over the pieces (offset, size) of a file that belong to each block, as 8 hexadecimal digits."""

    def checksum_of(places: list[tuple[int, int]]) -> str:
        checksum = 0
        buffer = memoryview(bytearray(_CHUNK))
        with binary.open("rb", buffering=0) as stream:
            for offset, size in places:
                stream.seek(offset)
                while size and (read := stream.readinto(buffer[: min(size, _CHUNK)])):
                    checksum = zlib.crc32(buffer[:read], checksum)
                    size -= read
        return f"{checksum:08x}"

    with ThreadPoolExecutor(_THREADS) as threads:
        return dict(zip(constants, threads.map(checksum_of, constants.values()), strict=True))


def block_owner(component: Component) -> Callable[[str], str | None]:
    """A function that takes the name of a node, and returns the name of its block, or None if it belongs to none."""
    prefixes = {prefix: block.name for block in component.blocks for prefix in block_prefixes(block)}

    def owner(name: str) -> str | None:
        matches = [prefix for prefix in prefixes if name.startswith(prefix)]
        return prefixes[max(matches, key=len)] if matches else None

    return owner
