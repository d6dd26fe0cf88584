"""A decoder that takes embeddings: its components for any text model whose layers transformers names as Llama's.

The token embeddings are a graph of their own, so that a runtime can put what it likes among them.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from manifests.errors import BadInputError
from passes.split import Block, Component, HostStep, Kind
from vlmconvert.families.ports import float_port, int_port, kinds_by_name

__all__ = [
    "TEXT_MODELS",
    "check_text_model",
    "decoder_inputs",
    "language_model",
    "next_decoder_inputs",
    "text_embeddings",
]

# Text models whose layers can be streamed, each with a test.
TEXT_MODELS = ("llama", "mistral", "qwen2", "qwen3")

# Frequencies that transformers chooses anew for every length.
_CHANGING_POSITIONS = ("dynamic", "longrope")

_MODULES = "vlmconvert.families.decoder_modules"
_PREFIX = "model.language_model."


def text_embeddings(config: dict[str, Any]) -> Component:
    """`input_ids` [batch, sequence] -> `inputs_embeds` [batch, sequence, width].

    Raises:
        BadInputError: if a token that stands for images or videos has no embedding.
    """
    rows = config["text_config"]["vocab_size"]
    for name in ("image_token_index", "video_token_index"):
        if config.get(name, 0) >= rows > 0:
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
        stems={"openvino": "openvino_text_embeddings_model", "onnx": "embed_tokens"},
        kinds=kinds_by_name(
            Kind("text_embeddings", f"{_MODULES}:text_embeddings", (input_ids,), (inputs_embeds,), dims)
        ),
        blocks=(
            Block(
                "embed_tokens",
                "text_embeddings",
                {"weight": f"{_PREFIX}embed_tokens.weight"},
                {"input_ids": "input_ids"},
                {"inputs_embeds": "inputs_embeds"},
                role="embeddings",
            ),
        ),
        inputs=(input_ids,),
        outputs=(inputs_embeds,),
    )


def language_model(config: dict[str, Any], host_step: HostStep) -> Component:
    """`inputs_embeds`, `attention_mask`, `position_ids` and the cache -> `logits`.

    Args:
        config: the completed config.
        host_step: puts image features among the text embeddings.

    Raises:
        BadInputError: if the text model's layers cannot be streamed.
    """
    text = config["text_config"]
    width, heads, head_dim = text["hidden_size"], _key_value_heads(text), _head_dim(text)
    inputs_embeds = _embeds(config)
    attention_mask = int_port("attention_mask", "batch", "total_sequence")
    position_ids = int_port("position_ids", "batch", "sequence")
    hidden_states = float_port("hidden_states", "batch", "sequence", width)
    causal_mask = float_port("causal_mask", "batch", 1, "sequence", "total_sequence")
    cos, sin = (float_port(name, "batch", "sequence", head_dim) for name in ("cos", "sin"))
    past = tuple(float_port(f"past_{part}", "batch", heads, "past_sequence", head_dim) for part in ("key", "value"))
    present = tuple(
        float_port(f"present_{part}", "batch", heads, "total_sequence", head_dim) for part in ("key", "value")
    )
    logits = float_port("logits", "batch", "sequence", text["vocab_size"])
    dims = {"batch": 2, "sequence": 3, "past_sequence": 4, "total_sequence": 7}
    kinds = kinds_by_name(
        Kind(
            "positions",
            f"{_MODULES}:positions",
            (attention_mask, position_ids),
            (causal_mask, cos, sin),
            dims,
            {"sliding_window": _sliding_window(text)},
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
            "positions",
            "positions",
            {},
            {"attention_mask": "attention_mask", "position_ids": "position_ids"},
            {name: name for name in ("causal_mask", "cos", "sin")},
            role="glue",
        )
    ]
    state: dict[str, str] = {}
    for index in range(text["num_hidden_layers"]):
        name = f"layers.{index}"
        ports = {port: port for port in ("causal_mask", "cos", "sin")}
        ports["hidden_states"] = "hidden_states" if index else "inputs_embeds"
        outputs = {"hidden_states": "hidden_states"}
        for part in ("key", "value"):
            ports[f"past_{part}"] = f"past_key_values.{index}.{part}"
            outputs[f"present_{part}"] = f"present.{index}.{part}"
            state[f"past_key_values.{index}.{part}"] = f"present.{index}.{part}"
        tensors = {f"layer.{parameter}": f"{_PREFIX}{name}.{parameter}" for parameter in _layer_parameters(text)}
        blocks.append(Block(name, "decoder_layer", tensors, ports, outputs))
    head = f"{_PREFIX}embed_tokens.weight" if config["tie_word_embeddings"] else "lm_head.weight"
    blocks.append(
        Block(
            "lm_head",
            "lm_head",
            {"norm.weight": f"{_PREFIX}norm.weight", "lm_head.weight": head},
            {"hidden_states": "hidden_states"},
            {"logits": "logits"},
            role="head",
        )
    )
    return Component(
        name="language_model",
        side="language",
        role="language model",
        stems={"openvino": "openvino_language_model", "onnx": "decoder_model_merged"},
        kinds=kinds,
        blocks=tuple(blocks),
        inputs=(inputs_embeds, attention_mask, position_ids, int_port("beam_idx", "batch", dtype="i32")),
        outputs=(logits,),
        state=state,
        logits=True,
        host_step=host_step,
    )


def decoder_inputs(processed: dict[str, np.ndarray], config: dict[str, Any]) -> dict[str, np.ndarray]:
    """What text alone gives: `input_ids`, `attention_mask`, `position_ids` [batch, sequence], and an empty cache.

    Args:
        processed: with input_ids and attention_mask [batch, sequence].
        config: the completed config.
    """
    text = config["text_config"]
    values = {name: processed[name].astype(np.int64) for name in ("input_ids", "attention_mask")}
    values["position_ids"] = np.clip(np.cumsum(values["attention_mask"], axis=1) - 1, 0, None)
    cache = np.zeros((len(values["input_ids"]), _key_value_heads(text), 0, _head_dim(text)), np.float32)
    names = (
        f"past_key_values.{index}.{part}" for index in range(text["num_hidden_layers"]) for part in ("key", "value")
    )
    return values | dict.fromkeys(names, cache)


def next_decoder_inputs(previous: dict[str, np.ndarray], tokens: np.ndarray) -> dict[str, np.ndarray]:
    """The inputs for the token after `previous`: tokens [batch] join the sequence."""
    one = np.ones((tokens.size, 1), np.int64)
    return {
        "input_ids": tokens.reshape(-1, 1).astype(np.int64),
        "attention_mask": np.concatenate((previous["attention_mask"], one), axis=1),
        "position_ids": previous["position_ids"][:, -1:] + 1,
    }


def check_text_model(config: dict[str, Any]) -> None:
    """Refuse a text model that cannot be streamed.

    Raises:
        BadInputError: naming what stands in the way.
    """
    text = config["text_config"]
    if text["model_type"] not in TEXT_MODELS:
        raise BadInputError(
            f"the text model is a {text['model_type']}, whose layers cannot be streamed: "
            f"vlmconvert takes {', '.join(TEXT_MODELS)}"
        )
    if len(set(text.get("layer_types") or ())) > 1:
        raise BadInputError(
            f"the layers of the {text['model_type']} text model are of several kinds "
            f"({', '.join(sorted(set(text['layer_types'])))}), which cannot be streamed: use a model with one kind"
        )
    rope_type = (text.get("rope_parameters") or {}).get("rope_type")
    if rope_type in _CHANGING_POSITIONS:
        raise BadInputError(
            f"the text model's rotary positions change with the length of the prompt (rope_type {rope_type}), which a graph "
            "cannot: use a checkpoint with another rope_type"
        )
    if text["num_hidden_layers"] < 1:
        raise BadInputError(
            "the text model has no layers (num_hidden_layers of text_config in config.json): mend the config"
        )
    heads, shared = text["num_attention_heads"], _key_value_heads(text)
    if not 0 < shared <= heads or heads % shared:
        raise BadInputError(
            f"{heads} attention heads of the text model cannot share {shared} heads of keys and values (num_key_value_heads of "
            "text_config in config.json): mend the config"
        )


def _layer_parameters(text: dict[str, Any]) -> Iterator[str]:
    """Parameters of one decoder layer, named as in transformers."""
    kind = text["model_type"]
    for part in "qkvo":
        yield f"self_attn.{part}_proj.weight"
        if (text.get("attention_bias") and kind in {"llama", "qwen3"}) or (kind == "qwen2" and part != "o"):
            yield f"self_attn.{part}_proj.bias"
    if kind == "qwen3":
        yield from (f"self_attn.{part}_norm.weight" for part in "qk")
    for part in ("gate", "up", "down"):
        yield f"mlp.{part}_proj.weight"
        if text.get("mlp_bias") and kind == "llama":
            yield f"mlp.{part}_proj.bias"
    yield from (f"{norm}.weight" for norm in ("input_layernorm", "post_attention_layernorm"))


def _sliding_window(text: dict[str, Any]) -> int | None:
    kinds = set(text.get("layer_types") or ())
    slides = "sliding_attention" in kinds if kinds else text["model_type"] == "mistral"
    window: int | None = text.get("sliding_window") if slides else None
    return window


def _key_value_heads(text: dict[str, Any]) -> int:
    heads: int = text.get("num_key_value_heads") or text["num_attention_heads"]
    return heads


def _head_dim(text: dict[str, Any]) -> int:
    return int(text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"])


def _ids() -> Any:
    return int_port("input_ids", "batch", "sequence")


def _embeds(config: dict[str, Any]) -> Any:
    return float_port("inputs_embeds", "batch", "sequence", config["text_config"]["hidden_size"])
