"""Tables with a row for each token of the vocabulary, of which embeddings and LM head are so large that they are taken in pieces."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise

from passes.vocabulary import Block

__all__ = ["PIECE", "large_table", "pieces"]

# Maximum size of a piece in bytes, as float32.
PIECE = 1 << 28
# Tables with fewer rows are those of positions.
_LEAST_ROWS = 256


def large_table(block: Block, shapes: Mapping[str, tuple[int, ...]]) -> str | None:
    """The tensor of a block that is taken in pieces; None if the block is small, or its role is another one.

    Args:
        block: the block.
        shapes: name of each of its tensors -> shape.
    """
    if block.role not in {"embeddings", "head"}:
        return None
    large = [
        name
        for name, shape in shapes.items()
        if len(shape) == 2 and shape[0] >= _LEAST_ROWS and 4 * shape[0] * shape[1] > PIECE
    ]
    return large[0] if len(large) == 1 else None


def pieces(shape: tuple[int, ...]) -> list[tuple[int, int]]:
    """The pieces of a table [rows, columns]: the first and the last (exclusive) row of each; their sizes are almost equal."""
    rows, columns = shape
    count = -(-4 * rows * columns // PIECE)
    return list(pairwise(rows * number // count for number in range(count + 1)))
