"""Inputs of Idefics3's vision tower: the tiles of all images, and the positions of their patches."""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["patch_positions", "tile_inputs"]


def tile_inputs(processed: dict[str, np.ndarray], config: dict[str, Any]) -> dict[str, np.ndarray]:
    """The tiles of all images, without those that are padding, and what is known of their patches; see `Idefics3.inputs`."""
    vision = config["vision_config"]
    patch = vision["patch_size"]
    side = vision["image_size"] // patch
    pixels = processed["pixel_values"].astype(np.float32)
    pixels = pixels.reshape(-1, *pixels.shape[2:])
    real: np.ndarray = (pixels != 0).reshape(len(pixels), -1).max(axis=1)
    real[0] |= not real.any()  # as transformers does
    mask = processed.get("pixel_attention_mask")
    if mask is None:
        visible = np.ones((len(pixels), side, side), bool)
    else:
        mask = mask.reshape(-1, *mask.shape[2:])[:, : side * patch, : side * patch]
        visible = (mask.reshape(len(mask), side, patch, side, patch) != 0).max(axis=(2, 4))
    return {
        "pixel_values": pixels[real],
        "patch_attention_mask": visible[real],
        "patch_position_ids": patch_positions(visible[real]),
    }


def patch_positions(visible: np.ndarray) -> np.ndarray:
    """The position of each patch among those of a whole tile, over which the visible part is stretched.

    transformers compares numbers of float32 that its processor rounds in its own way. For 19, 25, 29 and some larger numbers of
    rows, which no published model has, it places the last patches of a whole tile one position off.

    Args:
        visible: [tiles, rows, columns], as many rows as columns.

    Returns:
        [tiles, patches], int64; 0 for patches that are not visible.
    """
    side = visible.shape[1]
    edges = (np.arange(1, side) / side).astype(np.float32)

    def places(counts: np.ndarray) -> np.ndarray:
        steps = np.float32(1) / np.maximum(counts, 1).astype(np.float32)
        shares = np.minimum(np.arange(side, dtype=np.float32) * steps[:, None], np.float32(1 - 1e-6))
        return np.searchsorted(edges, shares, side="right")

    rows, columns = places(visible[:, :, 0].sum(axis=1)), places(visible[:, 0].sum(axis=1))
    numbers = rows[:, :, None] * side + columns[:, None, :]
    return np.where(visible, numbers, 0).reshape(len(visible), -1).astype(np.int64)
