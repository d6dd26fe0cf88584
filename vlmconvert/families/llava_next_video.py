"""LLaVA-NeXT-Video: LLaVA-NeXT that takes video frames too, whose features are pooled before they are projected.

As OpenVINO's runtimes expect them, vision tower, pooling and projector are graphs of their own.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from manifests.errors import BadInputError
from passes.split import Block, Component, HostStep, Kind
from vlmconvert.families.decoder import check_text_model, decoder_inputs, language_model, text_embeddings
from vlmconvert.families.llava import PROCESSOR_FILES, TOKENIZER_GRAPHS, next_inputs, place_features
from vlmconvert.families.llava_next import (
    ASCEND,
    CONFIG_TENSORS,
    calibration_sizes,
    check_grid,
    flat_patches,
    image_tokens,
    pack_features,
)
from vlmconvert.families.ports import float_port, kinds_by_name
from vlmconvert.families.vision_tower import (
    feature_width,
    patch_side,
    patch_tokens,
    projector_tensors,
    vision_embeddings,
)

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
    "frames_to_pool",
    "image_tokens",
    "inputs",
    "merge_features",
    "next_inputs",
    "reference",
    "to_project",
]

ARCHITECTURE = "LlavaNextVideoForConditionalGeneration"
PROCESSOR_OUTPUTS = ("input_ids", "attention_mask", "pixel_values", "image_sizes", "pixel_values_videos")
_MODULES = "vlmconvert.families.vision_tower_modules"
_POOLS = ("average", "max", "conv")


def components(config: dict[str, Any]) -> tuple[Component, ...]:
    """Vision tower, pooling, projector, text embeddings and language model that a config implies."""
    check_text_model(config)
    vision = vision_embeddings(config, project=False)
    check_grid(config)
    _check_pooling(config)
    step = HostStep(
        f"{__name__}:merge_features",
        ("input_ids", "inputs_embeds", "hidden_states", "image_sizes", "patches"),
        ("inputs_embeds",),
    )
    return (
        vision,
        _vision_resampler(config),
        _multi_modal_projector(config),
        text_embeddings(config),
        language_model(config, step),
    )


def _check_pooling(config: dict[str, Any]) -> None:
    mode, stride, side = config["spatial_pool_mode"], config["spatial_pool_stride"], patch_side(config["vision_config"])
    if mode not in _POOLS:
        raise BadInputError(f"config.json pools frames by {mode} (spatial_pool_mode): set it to {', '.join(_POOLS)}")
    if not 1 <= stride <= side:
        raise BadInputError(
            f"config.json pools frames of {side} x {side} features by {stride} (spatial_pool_stride): set it to 1 to {side}"
        )


def _vision_resampler(config: dict[str, Any]) -> Component:
    width = feature_width(config)
    frames = float_port("video_hidden_states", "frames", patch_tokens(config), width)
    pooled = float_port("pooled_hidden_states", "frames", _pooled_tokens(config), width)
    tensors = {}
    if config["spatial_pool_mode"] == "conv":
        tensors = {f"pool.{part}": f"model.vision_resampler.pool.{part}" for part in ("weight", "bias")}
    return Component(
        name="vision_resampler",
        side="vision",
        role="pooling of video frames",
        stems={"openvino": "openvino_vision_resampler_model", "onnx": "vision_resampler"},
        kinds=kinds_by_name(
            Kind("vision_resampler", f"{_MODULES}:vision_resampler", (frames,), (pooled,), {"frames": 2})
        ),
        blocks=(
            Block(
                "vision_resampler",
                "vision_resampler",
                tensors,
                {frames.name: frames.name},
                {pooled.name: pooled.name},
                role="layer" if tensors else "glue",
            ),
        ),
        inputs=(frames,),
        outputs=(pooled,),
        host_step=HostStep(f"{__name__}:frames_to_pool", ("last_hidden_state", "patches"), (frames.name,)),
        calibrated=False,
    )


def _multi_modal_projector(config: dict[str, Any]) -> Component:
    features = float_port("image_features", "images", "tokens", feature_width(config))
    projected = float_port("hidden_states", "images", "tokens", config["text_config"]["hidden_size"])
    return Component(
        name="multi_modal_projector",
        side="vision",
        role="projector",
        stems={"openvino": "openvino_multi_modal_projector_model", "onnx": "multi_modal_projector"},
        kinds=kinds_by_name(
            Kind(
                "multi_modal_projector",
                f"{_MODULES}:multi_modal_projector",
                (features,),
                (projected,),
                {"images": 2, "tokens": 3},
            )
        ),
        blocks=(
            Block(
                "multi_modal_projector",
                "multi_modal_projector",
                projector_tensors(config),
                {features.name: features.name},
                {projected.name: projected.name},
            ),
        ),
        inputs=(features,),
        outputs=(projected,),
        host_step=HostStep(
            f"{__name__}:to_project", ("last_hidden_state", "pooled_hidden_states", "patches"), (features.name,)
        ),
    )


def inputs(processed: dict[str, np.ndarray], config: dict[str, Any]) -> dict[str, np.ndarray]:
    """All inputs of the components for a prompt.

    Args:
        processed: as for LLaVA-NeXT; with videos also pixel_values_videos [videos, frames, channels, size, size].
        config: the completed config.

    Returns:
        Arrays named as the components' inputs, with an empty cache; pixel_values are the patches of all images, then the
        frames of all videos, and `patches` says how many are patches.
    """
    values = decoder_inputs(processed, config)
    pixels = []
    if "pixel_values" in processed:
        values["image_sizes"] = processed["image_sizes"].astype(np.int64)
        pixels.append(flat_patches(processed["pixel_values"], values["image_sizes"], config))
    values["patches"] = np.array([sum(len(item) for item in pixels)], np.int64)
    if "pixel_values_videos" in processed:
        videos = processed["pixel_values_videos"]
        pixels.append(videos.reshape(-1, *videos.shape[2:]).astype(np.float32))
    if pixels:
        values["pixel_values"] = np.concatenate(pixels)
    return values


def frames_to_pool(values: dict[str, np.ndarray], _config: dict[str, Any]) -> dict[str, np.ndarray]:
    """The features of video frames, if there are any."""
    if "last_hidden_state" not in values:
        return {}
    frames = values["last_hidden_state"][int(values["patches"][0]) :]
    return {"video_hidden_states": frames} if len(frames) else {}


def to_project(values: dict[str, np.ndarray], _config: dict[str, Any]) -> dict[str, np.ndarray]:
    """Features of the image patches and pooled ones of the frames as one sequence [1, tokens, width]."""
    if "last_hidden_state" not in values:
        return {}
    parts = [values["last_hidden_state"][: int(values["patches"][0])]]
    if "pooled_hidden_states" in values:
        parts.append(values["pooled_hidden_states"])
    return {"image_features": np.concatenate([part.reshape(-1, part.shape[-1]) for part in parts])[None]}


def merge_features(values: dict[str, np.ndarray], config: dict[str, Any]) -> dict[str, np.ndarray]:
    """Put packed image features and video features in the places of their tokens."""
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


def _pooled_tokens(config: dict[str, Any]) -> int:
    return int(patch_side(config["vision_config"]) // config["spatial_pool_stride"]) ** 2


def reference(folder: Path) -> Model:
    """The checkpoint in torch."""
    from vlmconvert.families.llava_reference import Reference

    return Reference(folder, ARCHITECTURE, "hidden_states", joined=True)
