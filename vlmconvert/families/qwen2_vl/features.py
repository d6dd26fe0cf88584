"""Qwen-VL's host steps: positions and masks of a tower over grids, and features in the place of image and video tokens."""

from __future__ import annotations

from typing import Any

import numpy as np

from vlmconvert.families.llava.features import place_features
from vlmconvert.families.parts.grid_tower import ROPE_THETA, tower_width
from vlmconvert.families.parts.grids import attention_mask, grids_of, rotary_positions

__all__ = ["frame_lengths", "merge_features", "rotary_pos_emb", "tower_inputs"]


def tower_inputs(values: dict[str, np.ndarray], config: dict[str, Any]) -> dict[str, np.ndarray]:
    """The mask with which patches attend to those of their image or frame, and the angles of their positions."""
    if "patch_embeds" not in values:
        return {}
    grids = grids_of(values)
    return {
        "vision_attention_mask": attention_mask(frame_lengths(grids)),
        "rotary_pos_emb": rotary_pos_emb(grids, config),
    }


def frame_lengths(grids: np.ndarray) -> list[int]:
    """Number of patches of each image, and of each moment of each video."""
    return [high * wide for time, high, wide in grids.tolist() for _ in range(time)]


def rotary_pos_emb(grids: np.ndarray, config: dict[str, Any]) -> np.ndarray:
    """See `rotary_positions`."""
    vision = config["vision_config"]
    width = tower_width(vision) // vision["num_heads"]
    return rotary_positions(grids, vision["spatial_merge_size"], width, ROPE_THETA)


def merge_features(values: dict[str, np.ndarray], config: dict[str, Any]) -> dict[str, np.ndarray]:
    """Replace image and video tokens by features [features of images, then of videos; width]."""
    merged = {"inputs_embeds": values["inputs_embeds"]}
    if "image_features" not in values:
        return merged
    features = values["image_features"]
    of_images = int(values["image_grid_thw"].prod(axis=1).sum()) // config["vision_config"]["spatial_merge_size"] ** 2
    for part, name in ((features[:of_images], "image"), (features[of_images:], "video")):
        if len(part):
            merged = place_features(values | merged, part, config[f"{name}_token_id"], name)
    return merged
