"""LLaVA: a vision tower with a projector, whose features take the places of image tokens among the text embeddings."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from manifests.errors import BadInputError
from passes.export.ascend_family import AscendFamily, VisionStack
from passes.split import Component, HostStep
from vlmconvert.families.decoder import (
    check_text_model,
    decoder_inputs,
    language_model,
    next_decoder_inputs,
    text_embeddings,
)
from vlmconvert.families.vision_tower import patch_tokens, vision_embeddings

if TYPE_CHECKING:
    from passes.validate.protocol import Model

__all__ = [
    "ARCHITECTURE",
    "ASCEND",
    "CONFIG_TENSORS",
    "PROCESSOR_FILES",
    "PROCESSOR_OUTPUTS",
    "TOKENIZER_GRAPHS",
    "calibration_sizes",
    "components",
    "image_tokens",
    "inputs",
    "merge_features",
    "next_inputs",
    "place_features",
    "reference",
]

ARCHITECTURE = "LlavaForConditionalGeneration"
# Alternatives in the order of preference; one of each must be there.
PROCESSOR_FILES = (
    ("preprocessor_config.json", "processor_config.json"),
    ("tokenizer.json",),
    ("tokenizer_config.json",),
)
PROCESSOR_OUTPUTS = ("input_ids", "attention_mask", "pixel_values")
# Entries of the config -> the tensors that runtimes expect there.
CONFIG_TENSORS: dict[str, str] = {}
# Whether OpenVINO's runtimes expect the tokenizer as graphs.
TOKENIZER_GRAPHS = True
# What Ascend runtimes make of it.
ASCEND = AscendFamily(
    script="llava",
    frames=8,
    dtypes=("float16", "bfloat16"),
    runtimes=("mindie", "vllm-ascend"),
    name_prefixes=("vision_tower.", "multi_modal_projector.", "language_model.model.", "language_model.lm_head."),
    vision_stacks=(
        VisionStack(
            "vision_tower.vision_model.encoder.layers",
            output="out_proj",
            model_types=("clip_vision_model", "siglip_vision_model"),
        ),
    ),
    projector=("multi_modal_projector.linear_1", "multi_modal_projector.linear_2"),
)


def components(config: dict[str, Any]) -> tuple[Component, ...]:
    """Vision and text embeddings and the language model that a config (as transformers completes it) implies."""
    check_text_model(config)
    step = HostStep(f"{__name__}:merge_features", ("input_ids", "inputs_embeds", "image_features"), ("inputs_embeds",))
    return (vision_embeddings(config, project=True), text_embeddings(config), language_model(config, step))


def inputs(processed: dict[str, np.ndarray], config: dict[str, Any]) -> dict[str, np.ndarray]:
    """All inputs of the components for a prompt.

    Args:
        processed: what the processor gives: input_ids and attention_mask [batch, sequence], with images also pixel_values
            [images, channels, size, size].
        config: the completed config.

    Returns:
        Arrays named as the components' inputs, with an empty cache.
    """
    values = decoder_inputs(processed, config)
    if "pixel_values" in processed:
        values["pixel_values"] = processed["pixel_values"].astype(np.float32)
    return values


next_inputs = next_decoder_inputs


def merge_features(values: dict[str, np.ndarray], config: dict[str, Any]) -> dict[str, np.ndarray]:
    """Put image features [images, tokens, width] in the places of image tokens; a prompt without images stays as it is."""
    if "image_features" not in values:
        return {"inputs_embeds": values["inputs_embeds"]}
    features = values["image_features"]
    return place_features(values, features.reshape(-1, features.shape[-1]), config["image_token_index"], "image")


def place_features(values: dict[str, np.ndarray], features: np.ndarray, token: int, what: str) -> dict[str, np.ndarray]:
    """Put features [tokens, width] in the places of a token, row by row.

    Raises:
        BadInputError: if there are more features than places, or fewer.
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


def calibration_sizes(config: dict[str, Any]) -> list[tuple[int, int]]:
    """Image sizes that the processor treats differently."""
    size = config["vision_config"]["image_size"]
    return [(size, size)]


def image_tokens(config: dict[str, Any]) -> int:
    """Most tokens of an image in a prompt."""
    return patch_tokens(config)


def reference(folder: Path) -> Model:
    """The checkpoint in torch."""
    from vlmconvert.families.llava_reference import Reference

    return Reference(folder, ARCHITECTURE, "image_features")
