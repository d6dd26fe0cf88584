"""Qwen3-VL's host steps: learned positions of patches, and features that enter embeddings and first layers of the text model."""

from __future__ import annotations

from typing import Any

import numpy as np

from vlmconvert.families.parts.grids import grids_of, interpolation
from vlmconvert.families.qwen2_vl import features

__all__ = ["merge_features", "position_indices", "tower_inputs"]


def position_indices(values: dict[str, np.ndarray], config: dict[str, Any]) -> dict[str, np.ndarray]:
    """The entries of the table of positions around each patch."""
    return {"position_indices": _interpolation(values, config)[0]} if "image_grid_thw" in values else {}


def tower_inputs(values: dict[str, np.ndarray], config: dict[str, Any]) -> dict[str, np.ndarray]:
    """Patch embeddings with their positions, the mask, and the angles of positions."""
    made = features.tower_inputs(values, config)
    if "position_embeds" not in values:
        return {}
    positions = (values["position_embeds"] * _interpolation(values, config)[1][..., None]).sum(axis=0)
    return made | {"patch_embeds": values["patch_embeds"] + positions}


def _interpolation(values: dict[str, np.ndarray], config: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    vision = config["vision_config"]
    side = round(vision["num_position_embeddings"] ** 0.5)
    return interpolation(grids_of(values), vision["spatial_merge_size"], side)


def merge_features(values: dict[str, np.ndarray], config: dict[str, Any]) -> dict[str, np.ndarray]:
    """Replace image and video tokens by features, and put the features of layers in the order of these tokens.

    Returns:
        inputs_embeds; visual_pos_masks [batch, sequence], true at tokens of images and videos, or one false column if there are
        none; deepstack_visual_embeds [layers, such tokens, width].
    """
    merged = features.merge_features(values, config)
    ids, embeds = values["input_ids"], values["inputs_embeds"]
    if "deepstack_features" not in values:
        layers = len(config["vision_config"]["deepstack_visual_indexes"])
        return merged | {
            "visual_pos_masks": np.zeros((len(ids), 1), bool),
            "deepstack_visual_embeds": np.zeros((layers, 1, embeds.shape[-1]), np.float32),
        }
    # Features of images come first, those of videos follow; in the prompt they may take turns.
    images, videos = (ids == config[name] for name in ("image_token_id", "video_token_id"))
    order = np.zeros(ids.shape, np.int64)
    order[images] = np.arange(images.sum())
    order[videos] = np.arange(images.sum(), images.sum() + videos.sum())
    places = images | videos
    return merged | {
        "visual_pos_masks": places,
        "deepstack_visual_embeds": np.ascontiguousarray(values["deepstack_features"][:, order[places]]),
    }
