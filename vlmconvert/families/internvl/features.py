"""InternVL's host step: the features of tiles replace the image tokens among the text embeddings."""

from __future__ import annotations

from typing import Any

import numpy as np

from vlmconvert.families.llava.features import place_features

__all__ = ["merge_features"]


def merge_features(values: dict[str, np.ndarray], config: dict[str, Any]) -> dict[str, np.ndarray]:
    """Replace the image tokens by features [tiles, tokens, width]; embeddings without images stay unchanged."""
    if "image_features" not in values:
        return {"inputs_embeds": values["inputs_embeds"]}
    features = values["image_features"]
    return place_features(values, features.reshape(-1, features.shape[-1]), config["image_token_id"], "image")
