"""Images and videos as grids of patches of any size, and the positions that their patches have in tower and language model.

The patches of all grids are one sequence. Within a grid, time comes first, then squares of patches that become one feature, row by
row, and in each square its patches, row by row. A *grid* is (time, height, width), in patches.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from manifests.errors import BadInputError

__all__ = [
    "attention_mask",
    "grid_positions",
    "grids_of",
    "interpolation",
    "multimodal_positions",
    "rotary_positions",
    "window_index",
]

# The lowest float16: with it, the mask stays finite on devices that compute in half precision.
_MASKED = -65504.0

Arrays = dict[str, np.ndarray]


def grids_of(values: Mapping[str, np.ndarray]) -> np.ndarray:
    """The grids [images and videos, 3] of a prompt: first those of its images, then those of its videos."""
    return np.concatenate([values[name].reshape(-1, 3) for name in ("image_grid_thw", "video_grid_thw")])


def grid_positions(grids: np.ndarray, merge: int) -> np.ndarray:
    """Row and column [patches, 2] of each patch in its grid.

    Args:
        grids: [grids, 3].
        merge: side of the squares of patches that become one feature.
    """
    parts = [np.empty((0, 2), np.int64)]
    for time, high, wide in grids.tolist():
        rows, columns = np.indices((high, wide)).reshape(2, high // merge, merge, wide // merge, merge).swapaxes(2, 3)
        parts += [np.stack((rows.ravel(), columns.ravel()), axis=1)] * time
    return np.concatenate(parts)


def rotary_positions(grids: np.ndarray, merge: int, width: int, theta: float) -> np.ndarray:
    """Angles [patches, width / 2] of the rotary position embedding of each patch, float32: those of its row, then of its column.

    Args:
        grids: [grids, 3].
        merge: see `grid_positions`.
        width: width of an attention head, a multiple of 4.
        theta: base of the frequencies.
    """
    exponents = np.arange(0, width // 2, 2, dtype=np.float32) / np.float32(width // 2)
    frequencies = np.float32(1.0) / np.power(np.float32(theta), exponents, dtype=np.float32)
    positions = grid_positions(grids, merge).astype(np.float32)
    return (positions[:, :, None] * frequencies).reshape(len(positions), width // 2)


def attention_mask(lengths: Sequence[int]) -> np.ndarray:
    """The mask [1, patches, patches] that attention adds, 0 or -65504: patches attend to those of their part of the sequence.

    Args:
        lengths: number of patches of each part.
    """
    part = np.repeat(np.arange(len(lengths)), lengths)
    return np.where(part[:, None] == part, np.float32(0), np.float32(_MASKED))[None]


def window_index(grids: np.ndarray, merge: int, side: int) -> tuple[np.ndarray, list[int]]:
    """The order in which features stand window by window, and the number of features of each window.

    Args:
        grids: [grids, 3].
        merge: see `grid_positions`.
        side: side of a window in features; windows at the edges are smaller.

    Returns:
        The features' numbers [features], int64, and the sizes of the windows.
    """
    order, sizes = [np.empty(0, np.int64)], []
    first = 0
    for time, high, wide in grids.tolist():
        rows, columns = high // merge, wide // merge
        numbers = np.arange(first, first + time * rows * columns).reshape(time, rows, columns)
        for frame in numbers:
            for row in range(0, rows, side):
                for column in range(0, columns, side):
                    window = frame[row : row + side, column : column + side]
                    order.append(window.ravel())
                    sizes.append(window.size)
        first += numbers.size
    return np.concatenate(order), sizes


def interpolation(grids: np.ndarray, merge: int, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Between which entries of a square table of position embeddings each patch lies, if the table is stretched over its grid.

    Args:
        grids: [grids, 3].
        merge: see `grid_positions`.
        side: rows and columns of the table.

    Returns:
        Numbers of the four entries around each patch [4, patches], int64, and their weights [4, patches], float32, which are
        those of a bilinear interpolation with aligned corners.
    """
    positions = grid_positions(grids, merge)
    lengths = np.concatenate(
        [np.empty((0, 2), np.int64), *(np.tile((h, w), (t * h * w, 1)) for t, h, w in grids.tolist())]
    )
    exact = positions.astype(np.float32) * np.float32(side - 1) / np.maximum(lengths - 1, 1).astype(np.float32)
    lower = np.floor(exact)
    share = exact - lower
    near = lower.astype(np.int64)
    far = np.minimum(near + 1, side - 1)
    corners = [(row, column) for row in (0, 1) for column in (0, 1)]
    entries = [(near, far)[row][:, 0] * side + (near, far)[column][:, 1] for row, column in corners]
    weights = [(1 - share, share)[row][:, 0] * (1 - share, share)[column][:, 1] for row, column in corners]
    return np.stack(entries), np.stack(weights).astype(np.float32)


def multimodal_positions(
    values: Mapping[str, np.ndarray], grids: Mapping[int, Iterator[Sequence[Any]]], merge: int
) -> np.ndarray:
    """Positions in time, height and width of each token of a batch (M-RoPE; Wang et al., "Qwen2-VL", 2024).

    The three positions of a text token are equal, and one more than the largest before it. The features of an image or video have
    those of its grid; what follows continues after the longer side of the grid.

    Args:
        values: `input_ids` and `attention_mask` [batch, sequence].
        grids: token that marks a feature -> for each run of such tokens, in order, (time, height, width, positions between two
            points in time).
        merge: see `grid_positions`.

    Returns:
        [3, batch, sequence], int64; 0 for padding.

    Raises:
        BadInputError: if the prompt has another number of tokens than a grid has features.
    """
    ids = values["input_ids"]
    positions = np.zeros((3, *ids.shape), np.int64)
    for row, visible in enumerate(values["attention_mask"].astype(bool)):
        tokens = ids[row, visible]
        parts, position, place = [], 0, 0
        while place < len(tokens):
            if tokens[place] not in grids:
                parts.append(np.full((3, 1), position))
                position, place = position + 1, place + 1
                continue
            run = int(np.argmin(np.append(tokens[place:] == tokens[place], False)))
            grid = next(grids[int(tokens[place])], None)
            if grid is None or run != grid[0] * grid[1] * grid[2] // merge**2:
                found = "no image or video" if grid is None else f"a grid of {grid[0]} x {grid[1]} x {grid[2]} patches"
                raise BadInputError(
                    f"the prompt has {run} tokens of an image or video where there is {found}: use the processor of this checkpoint"
                )
            time, high, wide = np.indices((grid[0], grid[1] // merge, grid[2] // merge)).reshape(3, -1)
            moments = (time.astype(np.float32) * np.float32(grid[3])).astype(np.int64)
            parts.append(np.stack((moments, high, wide)) + position)
            position, place = position + max(grid[1], grid[2]) // merge, place + run
        positions[:, row, visible] = np.concatenate(parts, axis=1) if parts else 0
    return positions
