"""mllama's vision encoder, which returns the keys and values of every cross-attention layer, before `repeat_kv`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from passes.vocabulary import Block, Component, Kind, kinds_by_name
from vlmconvert.families.mllama.ports import cross_key_value, cross_key_values
from vlmconvert.families.parts.ports import float_port, int_port, renamed

if TYPE_CHECKING:
    from manifests.model import Port

__all__ = ["vision_encoder"]

_MODULES = "vlmconvert.families.mllama.modules"
_MODEL = "model.vision_model"


def vision_encoder(config: dict[str, Any]) -> Component:
    """The vision encoder: tiles of images -> projected features, and keys and values of every cross-attention layer.

    Args:
        config: the completed config.
    """
    vision, text = config["vision_config"], config["text_config"]
    tiles, size = vision["max_num_tiles"], vision["image_size"]
    inputs = (
        float_port("pixel_values", "batch", "num_images", tiles, vision["num_channels"], size, size),
        int_port("aspect_ratio_ids", "batch", "num_images"),
        int_port("aspect_ratio_mask", "batch", "num_images", tiles),
    )
    states = float_port("cross_attention_states", "tiles", "patches", text["hidden_size"])
    return Component(
        name="vision_encoder",
        side="vision",
        role="vision encoder with the cross-attention keys and values",
        kinds=kinds_by_name(*_kinds(config, inputs, states)),
        blocks=(
            _embeddings(inputs),
            *_local_layers(vision),
            _global_embeddings(vision),
            *_layers("global_transformer", vision["num_global_layers"], "vision_global_layer"),
            _projector(vision),
            *(_cross_attention(index) for index in text["cross_attention_layers"]),
        ),
        inputs=inputs,
        outputs=(states, *cross_key_values(text)),
    )


def _kinds(config: dict[str, Any], inputs: tuple[Port, ...], states: Port) -> Iterator[Kind]:
    vision, text = config["vision_config"], config["text_config"]
    _, aspect_ratio_ids, _ = inputs
    hidden_states = float_port("hidden_states", "images", "positions", vision["hidden_size"])
    mask = float_port("attention_mask", "images", 1, "positions", "positions")
    intermediate = (renamed(hidden_states, _intermediate(index)) for index in vision["intermediate_layers_indices"])
    images = {"batch": 2, "num_images": 3}
    positions = {"images": 6, "positions": vision["max_num_tiles"] * _padded_patches(vision)}
    yield Kind("vision_embeddings", f"{_MODULES}:vision_embeddings", inputs, (hidden_states, mask), images)
    for name, is_gated in (("vision_layer", False), ("vision_global_layer", True)):
        yield Kind(
            name,
            f"{_MODULES}:vision_layer",
            (hidden_states, mask),
            (hidden_states,),
            {"images": 2, "positions": 24},
            {"is_gated": is_gated},
        )
    yield Kind(
        "vision_global_embeddings",
        f"{_MODULES}:vision_global_embeddings",
        (hidden_states, aspect_ratio_ids),
        (hidden_states,),
        positions | images,
    )
    yield Kind(
        "multi_modal_projector",
        f"{_MODULES}:multi_modal_projector",
        (hidden_states, *intermediate),
        (states,),
        positions,
    )
    yield Kind(
        "cross_attention_key_value",
        f"{_MODULES}:cross_attention_key_value",
        (states, aspect_ratio_ids),
        (cross_key_value("key", text), cross_key_value("value", text)),
        {"tiles": 6, "patches": 5} | images,
    )


def _embeddings(inputs: tuple[Port, ...]) -> Block:
    return Block(
        "embeddings",
        "vision_embeddings",
        _parts(
            _MODEL,
            "class_embedding",
            "patch_embedding",
            "gated_positional_embedding",
            "pre_tile_positional_embedding",
            "layernorm_pre",
        ),
        {port.name: port.name for port in inputs},
        {"hidden_states": "hidden_states", "attention_mask": "attention_mask"},
        role="embeddings",
    )


def _local_layers(vision: dict[str, Any]) -> Iterator[Block]:
    """The layers whose attention stays inside a tile.

    The projector also takes the hidden states that some of them return, so these outputs have names of their own.
    """
    return _layers("transformer", vision["num_hidden_layers"], "vision_layer", vision["intermediate_layers_indices"])


def _layers(stack: str, count: int, kind: str, intermediate: tuple[int, ...] = ()) -> Iterator[Block]:
    for index in range(count):
        name = f"{stack}.layers.{index}"
        yield Block(
            name,
            kind,
            {"": f"{_MODEL}.{name}"},
            {"hidden_states": _returned(index - 1, intermediate), "attention_mask": "attention_mask"},
            {"hidden_states": _returned(index, intermediate)},
        )


def _global_embeddings(vision: dict[str, Any]) -> Block:
    last = _returned(vision["num_hidden_layers"] - 1, vision["intermediate_layers_indices"])
    return Block(
        "global_embeddings",
        "vision_global_embeddings",
        _parts(_MODEL, "layernorm_post", "post_tile_positional_embedding"),
        {"hidden_states": last, "aspect_ratio_ids": "aspect_ratio_ids"},
        {"hidden_states": "hidden_states"},
        role="embeddings",
    )


def _projector(vision: dict[str, Any]) -> Block:
    intermediate = [_intermediate(index) for index in vision["intermediate_layers_indices"]]
    return Block(
        "multi_modal_projector",
        "multi_modal_projector",
        {"": "model.multi_modal_projector"},
        {name: name for name in ("hidden_states", *intermediate)},
        {"cross_attention_states": "cross_attention_states"},
    )


def _cross_attention(index: int) -> Block:
    """The keys and values of one cross-attention layer of the language model."""
    return Block(
        f"cross_attention.{index}",
        "cross_attention_key_value",
        _parts(f"model.language_model.layers.{index}.cross_attn", "k_proj", "v_proj", "k_norm"),
        {"cross_attention_states": "cross_attention_states", "aspect_ratio_ids": "aspect_ratio_ids"},
        {part: f"cross_attn_key_values.{index}.{part}" for part in ("key", "value")},
    )


def _parts(prefix: str, *names: str) -> dict[str, str]:
    """`Block.weights` of a block whose submodules have the same names as in the checkpoint."""
    return {name: f"{prefix}.{name}" for name in names}


def _intermediate(index: int) -> str:
    return f"intermediate.{index}"


def _returned(index: int, intermediate: tuple[int, ...]) -> str:
    """Name of the hidden states that a local layer returns."""
    return _intermediate(index) if index in intermediate else "hidden_states"


def _padded_patches(vision: dict[str, Any]) -> int:
    """Number of patches of one tile and its class token, rounded up to a multiple of 8 as in the model."""
    patches = (vision["image_size"] // vision["patch_size"]) ** 2 + 1
    return (patches + 7) // 8 * 8
