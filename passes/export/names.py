"""Names of nodes and tensors in a stitched graph, by which a block can be found in a finished artifact."""

from __future__ import annotations

from collections.abc import Callable

from passes.vocabulary import Block, Component

__all__ = ["block_names", "block_prefixes", "tensor_name"]


def block_prefixes(block: Block) -> tuple[str, ...]:
    """Prefixes of the names of a block's nodes in the stitched graph; the block need not be bound."""
    return (f"{block.name}/", *(name.removesuffix(".weight") for name in block.weights.values()))


def block_names(block: Block) -> Callable[[str], str]:
    """A function that makes the name of a block's node unique in the component.

    A name that begins with one of the block's tensor prefixes stays; any other gets the block's name as a prefix.
    """
    own, *modules = block_prefixes(block)

    def rename(name: str) -> str:
        return name if name.startswith(tuple(modules)) else f"{own}{name}"

    return rename


def tensor_name(component: Component, block: Block, port: str) -> str:
    """Name in the graph of the value that a block makes at a port.

    An output of the graph has only the output's own name, by which runtimes find it; other values have the names of block
    and port.
    """
    value = block.outputs[port]
    last = next(other for other in reversed(component.blocks) if value in other.outputs.values())
    if last.name == block.name and any(output.name == value for output in component.outputs):
        return value
    return f"{block.name}.{port}"
