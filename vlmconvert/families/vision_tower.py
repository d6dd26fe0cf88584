"""A CLIP or SigLIP vision tower with LLaVA's choice of layers, as blocks."""

from __future__ import annotations

from typing import Any

from manifests.errors import BadInputError
from passes.split import Block, Component, Kind
from vlmconvert.families.ports import float_port, kinds_by_name

__all__ = [
    "VISION_TOWERS",
    "feature_width",
    "has_class",
    "patch_side",
    "patch_tokens",
    "projector_tensors",
    "vision_embeddings",
]

# Vision towers whose layers can be streamed, each with a test.
VISION_TOWERS = ("clip_vision_model", "siglip_vision_model")

_MODULES = "vlmconvert.families.vision_tower_modules"
_PREFIX = "model.vision_tower."


def vision_embeddings(config: dict[str, Any], project: bool) -> Component:
    """`pixel_values` [images, channels, size, size] -> features [images, tokens, width].

    Args:
        config: the completed config.
        project: whether the projector is part of it; then the output is called `image_features`, else `last_hidden_state`.

    Raises:
        BadInputError: if the tower's layers cannot be streamed, it does not have a chosen layer, or an image has no patches.
    """
    vision = config["vision_config"]
    chosen = _chosen_layers(config)
    _check_sizes(vision)
    size, width = vision["image_size"], vision["hidden_size"]
    pixel_values = float_port("pixel_values", "images", vision.get("num_channels", 3), size, size)
    hidden_states = float_port("hidden_states", "images", _positions(vision), width)
    features = (
        float_port("image_features", "images", patch_tokens(config), config["text_config"]["hidden_size"])
        if project
        else float_port("last_hidden_state", "images", patch_tokens(config), feature_width(config))
    )
    dims = {"images": 2}
    taken = tuple(hidden_states.model_copy(update={"name": f"hidden_states.{number}"}) for number in range(len(chosen)))
    last = "select_and_project" if project else "select_features"
    kinds = kinds_by_name(
        Kind("vision_embeddings", f"{_MODULES}:vision_embeddings", (pixel_values,), (hidden_states,), dims),
        Kind("vision_layer", f"{_MODULES}:vision_layer", (hidden_states,), (hidden_states,), dims),
        Kind(last, f"{_MODULES}:{last}", taken, (features,), dims),
    )
    blocks = [
        Block(
            "embeddings",
            "vision_embeddings",
            _embedding_tensors(vision),
            {"pixel_values": "pixel_values"},
            {"hidden_states": "hidden_states.0"},
            role="embeddings",
        )
    ]
    for index in range(max(chosen)):
        tensors = {f"layer.{name}": f"{_PREFIX}encoder.layers.{index}.{name}" for name in _LAYER}
        blocks.append(
            Block(
                f"layers.{index}",
                "vision_layer",
                tensors,
                {"hidden_states": f"hidden_states.{index}"},
                {"hidden_states": f"hidden_states.{index + 1}"},
            )
        )
    blocks.append(
        Block(
            "multi_modal_projector" if project else "select_features",
            last,
            projector_tensors(config) if project else {},
            {port.name: f"hidden_states.{layer}" for port, layer in zip(taken, chosen, strict=True)},
            {features.name: features.name},
            role="layer" if project else "glue",
        )
    )
    return Component(
        name="vision_embeddings",
        side="vision",
        role="vision tower with the projector" if project else "vision tower",
        stems={"openvino": "openvino_vision_embeddings_model", "onnx": "vision_encoder"},
        kinds=kinds,
        blocks=tuple(blocks),
        inputs=(pixel_values,),
        outputs=(features,),
        aliases={"image_features": "last_hidden_state"} if project else {},
    )


def projector_tensors(config: dict[str, Any]) -> dict[str, str]:
    """The projector's parameters and their tensors."""
    parts = ("weight", "bias") if config["multimodal_projector_bias"] else ("weight",)
    names = [f"linear_{number}.{part}" for number in (1, 2) for part in parts]
    return {name: f"model.multi_modal_projector.{name}" for name in names}


def feature_width(config: dict[str, Any]) -> int:
    """Width of the features that enter the projector."""
    return int(config["vision_config"]["hidden_size"]) * len(_chosen_layers(config))


def patch_tokens(config: dict[str, Any]) -> int:
    """Tokens of an image, a patch or a frame as they leave the vision tower."""
    return _positions(config["vision_config"]) - (config["vision_feature_select_strategy"] == "default")


_LAYER = tuple(
    f"{module}.{part}"
    for module in (
        "layer_norm1",
        *(f"self_attn.{name}_proj" for name in ("q", "k", "v", "out")),
        "layer_norm2",
        "mlp.fc1",
        "mlp.fc2",
    )
    for part in ("weight", "bias")
)


def _embedding_tensors(vision: dict[str, Any]) -> dict[str, str]:
    names = ["patch_embedding.weight", "position_embedding.weight"]
    names.append("class_embedding" if has_class(vision) else "patch_embedding.bias")
    tensors = {name: f"{_PREFIX}embeddings.{name}" for name in names}
    if has_class(vision):
        tensors |= {name: f"{_PREFIX}{name}" for name in ("pre_layrnorm.weight", "pre_layrnorm.bias")}
    return tensors


def _chosen_layers(config: dict[str, Any]) -> list[int]:
    """Numbers of the hidden states that are taken: 0 is what enters the first layer, 1 what leaves it."""
    vision, chosen = config["vision_config"], config["vision_feature_layer"]
    if vision["model_type"] not in VISION_TOWERS:
        raise BadInputError(
            f"the vision tower is a {vision['model_type']}, whose layers cannot be streamed: "
            f"vlmconvert takes {', '.join(VISION_TOWERS)}"
        )
    count = vision["num_hidden_layers"] + 1
    layers = chosen if isinstance(chosen, list) else [chosen]
    if not layers:
        raise BadInputError(
            "config.json takes no hidden state of the vision tower (vision_feature_layer): mend the config"
        )
    for layer in layers:
        if not -count <= layer < count:
            raise BadInputError(
                f"config.json takes hidden state {layer} of the vision tower (vision_feature_layer), which has {count}: "
                "mend the config"
            )
    return [layer % count for layer in layers]


def _check_sizes(vision: dict[str, Any]) -> None:
    size, patch = vision["image_size"], vision["patch_size"]
    if not 0 < patch <= size:
        raise BadInputError(
            f"config.json cuts images of {size} x {size} into patches of {patch} x {patch} "
            "(image_size and patch_size of vision_config): mend the config"
        )


def has_class(vision: dict[str, Any]) -> bool:
    """Whether the tower has a feature for the whole image, before those of its patches."""
    return bool(vision["model_type"] == "clip_vision_model")


def patch_side(vision: dict[str, Any]) -> int:
    """How many patches of the vision tower an image is wide and high."""
    return int(vision["image_size"] // vision["patch_size"])


def _positions(vision: dict[str, Any]) -> int:
    return patch_side(vision) ** 2 + has_class(vision)
