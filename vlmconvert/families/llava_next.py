"""LLaVA-NeXT: LLaVA with images cut into patches at the best of several resolutions, and a newline after every row."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from manifests.errors import BadInputError
from passes.split import Component, HostStep
from vlmconvert.families.decoder import check_text_model, decoder_inputs, language_model, text_embeddings
from vlmconvert.families.llava import ASCEND as LLAVA_ASCEND
from vlmconvert.families.llava import PROCESSOR_FILES, TOKENIZER_GRAPHS, next_inputs, place_features
from vlmconvert.families.vision_tower import has_class, patch_side, patch_tokens, vision_embeddings

if TYPE_CHECKING:
    from passes.validate.protocol import Model

__all__ = [
    "ARCHITECTURE",
    "ASCEND",
    "CONFIG_TENSORS",
    "PROCESSOR_FILES",
    "PROCESSOR_OUTPUTS",
    "TOKENIZER_GRAPHS",
    "best_resolution",
    "calibration_sizes",
    "check_grid",
    "components",
    "flat_patches",
    "image_tokens",
    "inputs",
    "merge_features",
    "next_inputs",
    "pack_features",
    "reference",
]

ARCHITECTURE = "LlavaNextForConditionalGeneration"
PROCESSOR_OUTPUTS = ("input_ids", "attention_mask", "pixel_values", "image_sizes")
ASCEND = replace(LLAVA_ASCEND, names_text_model=True)
# OpenVINO's runtimes read the newline's embedding from the config.
CONFIG_TENSORS = {"image_newline": "model.image_newline"}


def components(config: dict[str, Any]) -> tuple[Component, ...]:
    """Vision and text embeddings and the language model that a config (as transformers completes it) implies."""
    check_text_model(config)
    vision = vision_embeddings(config, project=True)
    check_grid(config)
    step = HostStep(
        f"{__name__}:merge_features",
        ("input_ids", "inputs_embeds", "image_features", "image_sizes"),
        ("inputs_embeds",),
    )
    return (vision, text_embeddings(config), language_model(config, step))


def check_grid(config: dict[str, Any]) -> None:
    """Refuse a config by which no image can be packed, by us or by transformers.

    Raises:
        BadInputError: if there is no resolution, or the features of a patch do not fill its square.
    """
    resolutions = config["image_grid_pinpoints"]
    if not resolutions or not all(
        isinstance(pair, list | tuple) and len(pair) == 2 and min(pair) > 0 for pair in resolutions
    ):
        raise BadInputError(
            "config.json has no list of pairs, high and wide, to cut images by (image_grid_pinpoints): copy it from the model's "
            "page"
        )
    side = patch_side(config["vision_config"])
    if patch_tokens(config) != side * side:
        strategy = config["vision_feature_select_strategy"]
        raise BadInputError(
            f"config.json takes {patch_tokens(config)} features of a patch whose grid has {side} x {side} "
            f"(vision_feature_select_strategy {strategy}): set it to "
            f"{'default' if has_class(config['vision_config']) else 'full'}"
        )


def inputs(processed: dict[str, np.ndarray], config: dict[str, Any]) -> dict[str, np.ndarray]:
    """All inputs of the components for a prompt.

    Args:
        processed: what the processor gives: input_ids and attention_mask [batch, sequence], with images also pixel_values
            [images, patches, channels, size, size], padded to the most patches, and image_sizes [images, 2], high and wide.
        config: the completed config.

    Returns:
        Arrays named as the components' inputs, with an empty cache; pixel_values [patches of all images, channels, size, size].
    """
    values = decoder_inputs(processed, config)
    if "pixel_values" in processed:
        values["image_sizes"] = processed["image_sizes"].astype(np.int64)
        values["pixel_values"] = flat_patches(processed["pixel_values"], values["image_sizes"], config)
    return values


def merge_features(values: dict[str, np.ndarray], config: dict[str, Any]) -> dict[str, np.ndarray]:
    """Put packed image features in the places of image tokens; a prompt without images stays as it is."""
    if "image_features" not in values:
        return {"inputs_embeds": values["inputs_embeds"]}
    packed = pack_features(values["image_features"], values["image_sizes"], config)
    return place_features(values, packed, config["image_token_index"], "image")


def best_resolution(height: int, width: int, config: dict[str, Any]) -> tuple[int, int]:
    """The resolution (high, wide) of `image_grid_pinpoints` that keeps most of an image and wastes least (LLaVA-NeXT's rule)."""

    def merit(resolution: list[int]) -> tuple[int, int]:
        high, wide = resolution
        scale = min(wide / width, high / height)
        effective = min(int(width * scale) * int(height * scale), width * height)
        return effective, effective - high * wide

    high, wide = max(config["image_grid_pinpoints"], key=merit)
    return high, wide


def _grid(image_size: np.ndarray, config: dict[str, Any]) -> tuple[int, int]:
    """Rows and columns of patches that an image is cut into, beside the patch that shows it whole."""
    size = config["vision_config"]["image_size"]
    high, wide = best_resolution(int(image_size[0]), int(image_size[1]), config)
    return -(-high // size), -(-wide // size)


def flat_patches(pixel_values: np.ndarray, image_sizes: np.ndarray, config: dict[str, Any]) -> np.ndarray:
    """The patches of all images one after the other, without those that only pad; float32."""
    counts = [1 + rows * columns for rows, columns in (_grid(size, config) for size in image_sizes)]
    return np.concatenate([image[:count] for image, count in zip(pixel_values, counts, strict=True)]).astype(np.float32)


def pack_features(features: np.ndarray, image_sizes: np.ndarray, config: dict[str, Any]) -> np.ndarray:
    """Features of the whole image, then of its patches as one picture without its padding, a newline after every row.

    Args:
        features: [patches of all images, tokens, width].
        image_sizes: [images, 2], high and wide.
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
    """Cut the borders off that an image's aspect ratio left empty."""
    height, width = (int(length) for length in image_size)
    high, wide = picture.shape[:2]
    # Seven digits, as transformers rounds, so that both cut alike.
    if width / height > wide / high:
        padding = (high - int(round(height * (wide / width), 7))) // 2
        return picture[padding : high - padding]
    padding = (wide - int(round(width * (high / height), 7))) // 2
    return picture[:, padding : wide - padding]


def calibration_sizes(config: dict[str, Any]) -> list[tuple[int, int]]:
    """Image sizes (wide, high) that are cut into different grids; quantization must have seen them all."""
    return [(wide, high) for high, wide in config["image_grid_pinpoints"]]


def image_tokens(config: dict[str, Any]) -> int:
    """Most tokens of an image in a prompt: the whole image, its patches, and a newline after every row."""
    vision = config["vision_config"]
    side = patch_side(vision)
    grids = (
        (-(-high // vision["image_size"]), -(-wide // vision["image_size"]))
        for high, wide in config["image_grid_pinpoints"]
    )
    return patch_tokens(config) + max(rows * side * (columns * side + 1) for rows, columns in grids)


def reference(folder: Path) -> Model:
    """The checkpoint in torch."""
    from vlmconvert.families.llava_reference import Reference

    return Reference(folder, ARCHITECTURE, "image_features")
