"""LLaVA-NeXT's host step: the features of an image's patches are joined to one grid, with a newline after every row."""

from __future__ import annotations

from typing import Any

import numpy as np

from vlmconvert.families.llava.features import place_features
from vlmconvert.families.parts.vision_tower import patch_side

__all__ = ["best_resolution", "flat_patches", "merge_features", "pack_features"]


def merge_features(values: dict[str, np.ndarray], config: dict[str, Any]) -> dict[str, np.ndarray]:
    """Replace the image tokens by packed image features; embeddings without images stay unchanged."""
    if "image_features" not in values:
        return {"inputs_embeds": values["inputs_embeds"]}
    packed = pack_features(values["image_features"], values["image_sizes"], config)
    return place_features(values, packed, config["image_token_index"], "image")


def best_resolution(height: int, width: int, config: dict[str, Any]) -> tuple[int, int]:
    """The best resolution (height, width) in `image_grid_pinpoints` for an image of a size in pixels.

    The best one keeps most of the image and, among equals, has the least padding (LLaVA-NeXT's rule, as in transformers'
    `select_best_resolution`).
    """

    def merit(resolution: list[int]) -> tuple[int, int]:
        high, wide = resolution
        scale = min(wide / width, high / height)
        effective = min(int(width * scale) * int(height * scale), width * height)
        return effective, effective - high * wide

    high, wide = max(config["image_grid_pinpoints"], key=merit)
    return high, wide


def _grid(image_size: np.ndarray, config: dict[str, Any]) -> tuple[int, int]:
    """Numbers of rows and columns of patches that an image is cut into; one more patch shows the whole image."""
    size = config["vision_config"]["image_size"]
    high, wide = best_resolution(int(image_size[0]), int(image_size[1]), config)
    return -(-high // size), -(-wide // size)


def flat_patches(pixel_values: np.ndarray, image_sizes: np.ndarray, config: dict[str, Any]) -> np.ndarray:
    """The patches of all images, without padding patches.

    Args:
        pixel_values: [images, patches, channels, size, size].
        image_sizes: [images, 2] (height, width).
        config: the completed config.

    Returns:
        [patches of all images, channels, size, size], float32.
    """
    counts = [1 + rows * columns for rows, columns in (_grid(size, config) for size in image_sizes)]
    return np.concatenate([image[:count] for image, count in zip(pixel_values, counts, strict=True)]).astype(np.float32)


def pack_features(features: np.ndarray, image_sizes: np.ndarray, config: dict[str, Any]) -> np.ndarray:
    """Pack the features of each image: those of the whole image, then the joined grid of its patches without padding.

    A newline embedding follows every row of the grid.

    Args:
        features: [patches of all images, tokens, width].
        image_sizes: [images, 2] (height, width).
        config: the completed config, with `image_newline`.

    Returns:
        [tokens of all images, width].
    """
    side = patch_side(config["vision_config"])
    newline = np.asarray(config["image_newline"], features.dtype)
    packed = []
    first = 0
    for image_size in image_sizes:
        rows, columns = _grid(image_size, config)
        whole, patches = features[first], features[first + 1 : first + 1 + rows * columns]
        first += 1 + rows * columns
        picture = patches.reshape(rows, columns, side, side, -1).swapaxes(1, 2)
        picture = _without_padding(picture.reshape(rows * side, columns * side, -1), image_size)
        ends = np.broadcast_to(newline, (len(picture), 1, newline.size))
        packed += [whole, np.concatenate((picture, ends), axis=1).reshape(-1, newline.size)]
    return np.concatenate(packed)


def _without_padding(picture: np.ndarray, image_size: np.ndarray) -> np.ndarray:
    """Cut off the borders of a grid that are padding, because its aspect ratio is not the image's."""
    height, width = (int(length) for length in image_size)
    high, wide = picture.shape[:2]
    # transformers rounds to seven digits; the same rounding cuts the same borders.
    if width / height > wide / high:
        padding = (high - int(round(height * (wide / width), 7))) // 2
        return picture[padding : high - padding]
    padding = (wide - int(round(width * (high / height), 7))) // 2
    return picture[:, padding : wide - padding]
