"""A CLIP or SigLIP vision tower as blocks, up to the layers whose hidden states LLaVA uses."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from manifests.errors import BadInputError
from passes.vocabulary import Block, Component, Kind, kinds_by_name
from vlmconvert.families.parts.ports import float_port, renamed

if TYPE_CHECKING:
    from manifests.model import Port

__all__ = [
    "PROJECTOR_WEIGHTS",
    "VISION_TOWERS",
    "check_tower",
    "feature_width",
    "has_class",
    "patch_side",
    "patch_tokens",
    "vision_component",
    "vision_embeddings",
]

# Vision towers that can be converted layer by layer; each of them has a test.
VISION_TOWERS = ("clip_vision_model", "siglip_vision_model")

_MODULES = "vlmconvert.families.parts.vision_tower_modules"
_TOWER = "model.vision_tower"
# `Block.weights` of the projector's block.
PROJECTOR_WEIGHTS = {"": "model.multi_modal_projector"}


def vision_embeddings(config: dict[str, Any], project: bool) -> Component:
    """`pixel_values` [images, channels, size, size] -> features [images, tokens, width].

    Args:
        config: the completed config.
        project: whether the component ends with the projector. Its output is called `image_features` with the
            projector, and `last_hidden_state` without it.

    Raises:
        BadInputError: if the vision tower is not supported or lacks a chosen layer, or the image size is smaller than a
            patch.
    """
    chosen = _chosen_layers(config)
    features = (
        float_port("image_features", "images", patch_tokens(config), config["text_config"]["hidden_size"])
        if project
        else float_port("last_hidden_state", "images", patch_tokens(config), feature_width(config))
    )
    last = "select_and_project" if project else "select_features"
    return vision_component(
        config,
        chosen,
        f"{_MODULES}:{last}",
        PROJECTOR_WEIGHTS if project else {},
        features,
        "multi_modal_projector" if project else "select_features",
    )


def vision_component(
    config: dict[str, Any], chosen: list[int], module: str, weights: dict[str, str], features: Port, name: str
) -> Component:
    """A vision tower whose chosen hidden states a last block turns into features.

    Args:
        config: the completed config.
        chosen: numbers of the hidden states that the last block takes: 0 enters the first layer, 1 leaves it, and so on.
        module: see `Kind.module`; the kind is called after the function.
        weights: `Block.weights` of the last block; without any it is no layer.
        features: the output.
        name: name of the last block.

    Raises:
        BadInputError: if the vision tower is not supported, or the image size is smaller than a patch.
    """
    vision = config["vision_config"]
    check_tower(vision)
    size, width = vision["image_size"], vision["hidden_size"]
    pixel_values = float_port("pixel_values", "images", vision.get("num_channels", 3), size, size)
    hidden_states = float_port("hidden_states", "images", _positions(vision), width)
    dims = {"images": 2}
    taken = tuple(renamed(hidden_states, f"hidden_states.{number}") for number in range(len(chosen)))
    last = module.rpartition(":")[2]
    kinds = kinds_by_name(
        Kind("vision_embeddings", f"{_MODULES}:vision_embeddings", (pixel_values,), (hidden_states,), dims),
        Kind("vision_layer", f"{_MODULES}:vision_layer", (hidden_states,), (hidden_states,), dims),
        Kind(last, module, taken, (features,), dims),
    )
    embeddings = {"": f"{_TOWER}.embeddings"}
    if has_class(vision):
        embeddings["pre_layrnorm"] = f"{_TOWER}.pre_layrnorm"
    blocks = [
        Block(
            "embeddings",
            "vision_embeddings",
            embeddings,
            {"pixel_values": "pixel_values"},
            {"hidden_states": "hidden_states.0"},
            role="embeddings",
        )
    ]
    for index in range(max(chosen)):
        blocks.append(
            Block(
                f"layers.{index}",
                "vision_layer",
                {"layer": f"{_TOWER}.encoder.layers.{index}"},
                {"hidden_states": f"hidden_states.{index}"},
                {"hidden_states": f"hidden_states.{index + 1}"},
            )
        )
    blocks.append(
        Block(
            name,
            last,
            weights,
            {port.name: f"hidden_states.{layer}" for port, layer in zip(taken, chosen, strict=True)},
            {features.name: features.name},
            role="layer" if weights else "glue",
        )
    )
    return Component(
        name="vision_embeddings",
        side="vision",
        role="vision tower with the projector" if weights else "vision tower",
        kinds=kinds,
        blocks=tuple(blocks),
        inputs=(pixel_values,),
        outputs=(features,),
        aliases={"image_features": "last_hidden_state"} if weights else {},
    )


def feature_width(config: dict[str, Any]) -> int:
    """Width of the features that enter the projector."""
    return int(config["vision_config"]["hidden_size"]) * len(_chosen_layers(config))


def patch_tokens(config: dict[str, Any]) -> int:
    """Number of features that the vision tower returns for one image, patch or video frame."""
    return _positions(config["vision_config"]) - (config["vision_feature_select_strategy"] == "default")


def _chosen_layers(config: dict[str, Any]) -> list[int]:
    """Numbers of the hidden states that the projector takes: 0 enters the first layer, 1 leaves it, and so on."""
    vision, chosen = config["vision_config"], config["vision_feature_layer"]
    check_tower(vision)
    count = vision["num_hidden_layers"] + 1
    layers = chosen if isinstance(chosen, list) else [chosen]
    if not layers:
        raise BadInputError(
            "config.json takes no hidden state of the vision tower (vision_feature_layer): copy config.json from the model's page"
        )
    for layer in layers:
        if not -count <= layer < count:
            raise BadInputError(
                f"config.json takes hidden state {layer} of the vision tower (vision_feature_layer), which has {count}: "
                "copy config.json from the model's page"
            )
    return [layer % count for layer in layers]


def check_tower(vision: dict[str, Any], known: tuple[str, ...] = VISION_TOWERS) -> None:
    """Refuse a vision tower that cannot be converted layer by layer.

    Args:
        vision: the vision config.
        known: model types of the towers that can be.

    Raises:
        BadInputError: if its model type is not supported, or its images are smaller than a patch.
    """
    if vision["model_type"] not in known:
        raise BadInputError(
            f"the vision tower is a {vision['model_type']}, which cannot be converted layer by layer: "
            f"use a checkpoint with {', '.join(known)}"
        )
    size, patch = vision["image_size"], vision["patch_size"]
    if not 0 < patch <= size:
        raise BadInputError(
            f"config.json cuts images of {size} x {size} into patches of {patch} x {patch} "
            "(image_size and patch_size of vision_config): copy config.json from the model's page"
        )


def has_class(vision: dict[str, Any]) -> bool:
    """Whether the tower has a class token: a feature for the whole image, before the features of its patches."""
    return bool(vision["model_type"] == "clip_vision_model")


def patch_side(vision: dict[str, Any]) -> int:
    """Width and height of an image, counted in patches of the vision tower."""
    return int(vision["image_size"] // vision["patch_size"])


def _positions(vision: dict[str, Any]) -> int:
    return patch_side(vision) ** 2 + has_class(vision)
