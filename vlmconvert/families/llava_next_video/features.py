"""LLaVA-NeXT-Video's host steps: which features are pooled, projected, and placed among the text embeddings."""

from __future__ import annotations

from typing import Any

import numpy as np

from vlmconvert.families.llava.features import place_features
from vlmconvert.families.llava_next.features import pack_features
from vlmconvert.families.parts.vision_tower import patch_tokens

__all__ = ["frames_to_pool", "merge_features", "to_project"]


def frames_to_pool(values: dict[str, np.ndarray], _config: dict[str, Any]) -> dict[str, np.ndarray]:
    """The features of the video frames, which are pooled; nothing if the prompt has no videos."""
    if "last_hidden_state" not in values:
        return {}
    frames = values["last_hidden_state"][int(values["patches"][0]) :]
    return {"video_hidden_states": frames} if len(frames) else {}


def to_project(values: dict[str, np.ndarray], _config: dict[str, Any]) -> dict[str, np.ndarray]:
    """The features of the image patches and the pooled features of the frames as one sequence [1, tokens, width]."""
    if "last_hidden_state" not in values:
        return {}
    parts = [values["last_hidden_state"][: int(values["patches"][0])]]
    if "pooled_hidden_states" in values:
        parts.append(values["pooled_hidden_states"])
    return {"image_features": np.concatenate([part.reshape(-1, part.shape[-1]) for part in parts])[None]}


def merge_features(values: dict[str, np.ndarray], config: dict[str, Any]) -> dict[str, np.ndarray]:
    """Replace the image tokens by packed image features, and the video tokens by video features."""
    merged = {"inputs_embeds": values["inputs_embeds"]}
    if "hidden_states" not in values:
        return merged
    features = values["hidden_states"][0]
    of_images = int(values["patches"][0]) * patch_tokens(config)
    if of_images:
        patches = features[:of_images].reshape(-1, patch_tokens(config), features.shape[-1])
        packed = pack_features(patches, values["image_sizes"], config)
        merged = place_features(values, packed, config["image_token_index"], "image")
    if len(features) > of_images:
        merged = place_features(values | merged, features[of_images:], config["video_token_index"], "video")
    return merged
