"""The components of a decoder that takes embeddings, for every text model whose layers have the same names as Llama's.

The token embeddings are a separate graph, so that a runtime can insert image features among the embeddings.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from manifests.errors import BadInputError
from passes.vocabulary import Block, Component, HostStep, Kind, kinds_by_name
from vlmconvert.families.parts.ports import float_port, int_port

if TYPE_CHECKING:
    from manifests.model import Port

__all__ = [
    "TEXT_MODELS",
    "cache_shape",
    "check_text_model",
    "language_model",
    "text_embeddings",
]

# Text models that can be converted layer by layer; each of them has a test.
TEXT_MODELS = ("llama", "mistral", "qwen2", "qwen3")

# Types of rotary embeddings (RoPE) whose frequencies transformers chooses again for every length of the sequence.
_CHANGING_POSITIONS = ("dynamic", "longrope")

# Types of layers: those that attend to all earlier positions, and those that attend to a window of them.
_LAYER_TYPES = ("full_attention", "sliding_attention")

_MODULES = "vlmconvert.families.parts.decoder_modules"
_MODEL = "model.language_model"


def text_embeddings(
    config: dict[str, Any], *placeholders: str, module: str = f"{_MODULES}:text_embeddings", model: str = _MODEL
) -> Component:
    """`input_ids` [batch, sequence] -> `inputs_embeds` [batch, sequence, width].

    Args:
        config: the completed config.
        placeholders: keys of the config whose values are the tokens that mark images or videos.
        module: `Kind.module` of the embeddings.
        model: in-memory name of the text model.

    Raises:
        BadInputError: if one of these tokens has no row in the embedding table.
    """
    rows = config["text_config"]["vocab_size"]
    for name in placeholders:
        if config[name] >= rows > 0:
            raise BadInputError(
                f"config.json has {name} {config[name]}, and the vocabulary of its text_config ends at {rows - 1}: give the "
                "checkpoint whose embeddings have a row for that token"
            )
    input_ids, inputs_embeds = _ids(), _embeds(config)
    dims = {"batch": 2, "sequence": 3}
    return Component(
        name="text_embeddings",
        side="language",
        role="token embeddings",
        kinds=kinds_by_name(Kind("text_embeddings", module, (input_ids,), (inputs_embeds,), dims)),
        blocks=(
            Block(
                "embed_tokens",
                "text_embeddings",
                {"": f"{model}.embed_tokens"},
                {"input_ids": "input_ids"},
                {"inputs_embeds": "inputs_embeds"},
                role="embeddings",
            ),
        ),
        inputs=(input_ids,),
        outputs=(inputs_embeds,),
    )


def language_model(
    config: dict[str, Any],
    host_step: HostStep,
    positions: str = f"{_MODULES}:positions",
    *more: Port,
    position_axes: int = 0,
    model: str = _MODEL,
) -> Component:
    """`inputs_embeds`, `attention_mask`, `position_ids` and the cache -> `logits`.

    Args:
        config: the completed config.
        host_step: host step that inserts image features among the text embeddings.
        positions: `Kind.module` of the mask and the rotary positions; called with `layer_type` and `sliding_window`.
        more: further inputs of that module.
        position_axes: number of positions of a token, such as time, height and width; 0 for the one that is no axis.
        model: in-memory name of the text model.
    """
    text = config["text_config"]
    width = text["hidden_size"]
    heads, head_dim = cache_shape(text)
    inputs_embeds = _embeds(config)
    attention_mask = int_port("attention_mask", "batch", "total_sequence")
    axes = (position_axes,) if position_axes else ()
    position_ids = int_port("position_ids", *axes, "batch", "sequence")
    hidden_states = float_port("hidden_states", "batch", "sequence", width)
    causal_mask = float_port("causal_mask", "batch", 1, "sequence", "total_sequence")
    cos, sin = (float_port(name, "batch", "sequence", head_dim) for name in ("cos", "sin"))
    past = tuple(float_port(f"past_{part}", "batch", heads, "past_sequence", head_dim) for part in ("key", "value"))
    present = tuple(
        float_port(f"present_{part}", "batch", heads, "total_sequence", head_dim) for part in ("key", "value")
    )
    logits = float_port("logits", "batch", "sequence", text["vocab_size"])
    dims = {"batch": 2, "sequence": 3, "past_sequence": 4, "total_sequence": 7}
    every = layer_types(text)
    # Layers of one type share the mask; a type that is not the only one has values of its own.
    named = {kind: f"{kind}." if len(set(every)) > 1 else "" for kind in dict.fromkeys(every)}
    kinds = kinds_by_name(
        *(
            Kind(
                f"{prefix}positions",
                positions,
                (attention_mask, position_ids, *more),
                (causal_mask, cos, sin),
                dims,
                {"layer_type": layer_type, "sliding_window": _sliding_window(text, layer_type)},
            )
            for layer_type, prefix in named.items()
        ),
        Kind(
            "decoder_layer",
            f"{_MODULES}:decoder_layer",
            (hidden_states, causal_mask, cos, sin, *past),
            (hidden_states, *present),
            dims,
        ),
        Kind("lm_head", f"{_MODULES}:lm_head", (hidden_states,), (logits,), dims),
    )
    blocks = [
        Block(
            f"{prefix}positions",
            f"{prefix}positions",
            {},
            {port.name: port.name for port in (attention_mask, position_ids, *more)},
            {name: f"{prefix}{name}" for name in ("causal_mask", "cos", "sin")},
            role="glue",
        )
        for prefix in named.values()
    ]
    state: dict[str, str] = {}
    for index in range(text["num_hidden_layers"]):
        name = f"layers.{index}"
        ports = {port: f"{named[every[index]]}{port}" for port in ("causal_mask", "cos", "sin")}
        ports["hidden_states"] = "hidden_states" if index else "inputs_embeds"
        outputs = {"hidden_states": "hidden_states"}
        for part in ("key", "value"):
            ports[f"past_{part}"] = f"past_key_values.{index}.{part}"
            outputs[f"present_{part}"] = f"present.{index}.{part}"
            state[f"past_key_values.{index}.{part}"] = f"present.{index}.{part}"
        blocks.append(Block(name, "decoder_layer", {"layer": f"{model}.{name}"}, ports, outputs))
    head = f"{model}.embed_tokens" if config["tie_word_embeddings"] else "lm_head"
    blocks.append(
        Block(
            "lm_head",
            "lm_head",
            {"norm": f"{model}.norm", "lm_head": head},
            {"hidden_states": "hidden_states"},
            {"logits": "logits"},
            role="head",
        )
    )
    return Component(
        name="language_model",
        side="language",
        role="language model",
        kinds=kinds,
        blocks=tuple(blocks),
        inputs=(inputs_embeds, attention_mask, position_ids, *more, int_port("beam_idx", "batch", dtype="i32")),
        outputs=(logits,),
        state=state,
        logits=True,
        host_step=host_step,
    )


def check_text_model(config: dict[str, Any], known: tuple[str, ...] = TEXT_MODELS) -> None:
    """Refuse a text model that cannot be converted layer by layer.

    Args:
        config: the completed config.
        known: model types of the text models that can be.

    Raises:
        BadInputError: if the model type, its layers, its rotary positions or its heads are not supported.
    """
    text = config["text_config"]
    if text["model_type"] not in known:
        raise BadInputError(
            f"the text model is a {text['model_type']}, which cannot be converted layer by layer: "
            f"use a checkpoint with {', '.join(known)}"
        )
    if others := sorted(set(layer_types(text)) - set(_LAYER_TYPES)):
        raise BadInputError(
            f"layers of the {text['model_type']} text model are of the type {others[0]} (layer_types of text_config in config.json), which "
            f"vlmconvert cannot convert: use a model with layers of the types {' and '.join(_LAYER_TYPES)}"
        )
    # Where types of layers differ in their positions, there are parameters for each type.
    rope = text.get("rope_parameters") or {}
    rope_types = {str(part.get("rope_type")) for part in (rope, *rope.values()) if isinstance(part, dict)}
    for rope_type in sorted(rope_types & set(_CHANGING_POSITIONS)):
        raise BadInputError(
            f"the frequencies of the text model's rotary embeddings change with the length of the prompt (rope_type {rope_type}), which "
            "a graph cannot do: use a checkpoint with another rope_type"
        )
    if text["num_hidden_layers"] < 1:
        raise BadInputError(
            "the text model has no layers (num_hidden_layers of text_config in config.json): copy config.json from the model's page"
        )
    heads = text["num_attention_heads"]
    shared = text.get("num_key_value_heads") or heads
    if not 0 < shared <= heads or heads % shared:
        raise BadInputError(
            f"{heads} attention heads of the text model cannot share {shared} heads of keys and values (num_key_value_heads of "
            "text_config in config.json): copy config.json from the model's page"
        )


def layer_types(text: dict[str, Any]) -> list[str]:
    """The type of attention of each layer, by transformers' names."""
    sliding = text["model_type"] == "mistral" and text.get("sliding_window")
    return text.get("layer_types") or [_LAYER_TYPES[bool(sliding)]] * text["num_hidden_layers"]


def _sliding_window(text: dict[str, Any], layer_type: str) -> int | None:
    window: int | None = text.get("sliding_window") if layer_type == "sliding_attention" else None
    return window


def cache_shape(text: dict[str, Any]) -> tuple[int, int]:
    """Number of key-value heads of a text model, and the width of a head."""
    heads = text.get("num_key_value_heads") or text["num_attention_heads"]
    return int(heads), int(text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"])


def _ids() -> Any:
    return int_port("input_ids", "batch", "sequence")


def _embeds(config: dict[str, Any]) -> Any:
    return float_port("inputs_embeds", "batch", "sequence", config["text_config"]["hidden_size"])
