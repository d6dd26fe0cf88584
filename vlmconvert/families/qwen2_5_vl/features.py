"""Qwen2.5-VL's host step: the windows within which patches attend to each other."""

from __future__ import annotations

from typing import Any

import numpy as np

from vlmconvert.families.parts.grids import attention_mask, grids_of, window_index
from vlmconvert.families.qwen2_vl import features

__all__ = ["tower_inputs"]


def tower_inputs(values: dict[str, np.ndarray], config: dict[str, Any]) -> dict[str, np.ndarray]:
    """The order of windows, the masks of windows and of whole images or frames, and the angles of positions."""
    made = features.tower_inputs(values, config)
    if not made:
        return {}
    vision = config["vision_config"]
    merge = vision["spatial_merge_size"]
    order, sizes = window_index(grids_of(values), merge, vision["window_size"] // merge // vision["patch_size"])
    return made | {"window_index": order, "window_attention_mask": attention_mask([size * merge**2 for size in sizes])}
