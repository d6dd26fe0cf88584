"""InternVL's host step: the features of tiles replace the image tokens among the text embeddings."""

from __future__ import annotations

from typing import Any

import numpy as np

from vlmconvert.families.llava.features import merge_images

__all__ = ["merge_features"]


def merge_features(values: dict[str, np.ndarray], config: dict[str, Any]) -> dict[str, np.ndarray]:
    """See `merge_images`; features are [tiles, tokens, width]."""
    return merge_images(values, config["image_token_id"])
