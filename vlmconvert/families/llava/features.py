"""LLaVA's host step: image features replace the image tokens among the text embeddings."""

from __future__ import annotations

from typing import Any

import numpy as np

from manifests.errors import BadInputError

__all__ = ["merge_features", "merge_images", "place_features"]


def merge_features(values: dict[str, np.ndarray], config: dict[str, Any]) -> dict[str, np.ndarray]:
    """See `merge_images`."""
    return merge_images(values, config["image_token_index"])


def merge_images(values: dict[str, np.ndarray], token: int) -> dict[str, np.ndarray]:
    """Replace an image token by image features [images, tokens, width]; embeddings without images stay unchanged."""
    if "image_features" not in values:
        return {"inputs_embeds": values["inputs_embeds"]}
    features = values["image_features"]
    return place_features(values, features.reshape(-1, features.shape[-1]), token, "image")


def place_features(values: dict[str, np.ndarray], features: np.ndarray, token: int, what: str) -> dict[str, np.ndarray]:
    """Replace the embeddings of a placeholder token by features, one sequence of the batch after the other.

    Args:
        values: `input_ids` [batch, sequence] and `inputs_embeds` [batch, sequence, width].
        features: [tokens, width].
        token: id of the placeholder token.
        what: `image` or `video`, for the error.

    Raises:
        BadInputError: if the number of placeholder tokens is not the number of features.
    """
    places = values["input_ids"] == token
    if places.sum() != len(features):
        raise BadInputError(
            f"the prompt has {places.sum()} {what} tokens, and there are features for {len(features)}: "
            "use the processor of this checkpoint"
        )
    merged = values["inputs_embeds"].copy()
    merged[places] = features
    return {"inputs_embeds": merged}
