"""mllama's language model.

The vision encoder computes the keys and values of the cross-attention layers, so the language model has no k/v
projections for them, and its state is the cache of the self-attention layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from passes.vocabulary import Block, Component, Kind, kinds_by_name
from vlmconvert.families.mllama.ports import cross_key_value, cross_key_values
from vlmconvert.families.parts.ports import float_port, int_port

if TYPE_CHECKING:
    from manifests.model import Port

__all__ = ["language_model"]

_MODULES = "vlmconvert.families.mllama.modules"
_MODEL = "model.language_model"
_MASKS = ("cross_attention_mask", "full_text_row_masked_out_mask")


def language_model(config: dict[str, Any]) -> Component:
    """The language model: text, and the cross-attention keys and values of the images -> `logits`.

    Args:
        config: the completed config.
    """
    text = config["text_config"]
    inputs = (
        int_port("input_ids", "batch", "sequence"),
        int_port("attention_mask", "batch", "total_sequence"),
        int_port("position_ids", "batch", "sequence"),
        float_port("cross_attention_mask", "batch", 1, "sequence", "vision_sequence"),
        float_port("full_text_row_masked_out_mask", "batch", 1, "sequence", 1),
    )
    logits = float_port("logits", "batch", "sequence", text["vocab_size"])
    crossing = set(text["cross_attention_layers"])
    layers = range(text["num_hidden_layers"])
    return Component(
        name="language_model",
        side="language",
        role="language model",
        kinds=kinds_by_name(*_kinds(text, inputs, logits)),
        blocks=(
            Block(
                "embed_tokens",
                "text_embeddings",
                {"embed_tokens": f"{_MODEL}.embed_tokens"},
                {"input_ids": "input_ids"},
                {"hidden_states": "hidden_states"},
                role="embeddings",
            ),
            Block(
                "positions",
                "positions",
                {},
                {"attention_mask": "attention_mask", "position_ids": "position_ids"},
                {name: name for name in ("causal_mask", "cos", "sin")},
                role="glue",
            ),
            *(_cross_attention_layer(index) if index in crossing else _self_attention_layer(index) for index in layers),
            Block(
                "lm_head",
                "lm_head",
                {"norm": f"{_MODEL}.norm", "lm_head": "lm_head"},
                {"hidden_states": "hidden_states"},
                {"logits": "logits"},
                role="head",
            ),
        ),
        inputs=(*inputs, int_port("beam_idx", "batch", dtype="i32"), *cross_key_values(text)),
        outputs=(logits,),
        state={
            f"past_key_values.{index}.{part}": f"present.{index}.{part}"
            for index in layers
            if index not in crossing
            for part in ("key", "value")
        },
        logits=True,
    )


def _kinds(text: dict[str, Any], inputs: tuple[Port, ...], logits: Port) -> Iterator[Kind]:
    input_ids, attention_mask, position_ids, *masks = inputs
    heads, width = text["num_key_value_heads"], text["hidden_size"]
    head_dim = width // text["num_attention_heads"]
    hidden_states = float_port("hidden_states", "batch", "sequence", width)
    causal_mask = float_port("causal_mask", "batch", 1, "sequence", "total_sequence")
    cos, sin = (float_port(name, "batch", "sequence", head_dim) for name in ("cos", "sin"))
    past = (float_port(f"past_{part}", "batch", heads, "past_sequence", head_dim) for part in ("key", "value"))
    present = (float_port(f"present_{part}", "batch", heads, "total_sequence", head_dim) for part in ("key", "value"))
    dims = {"batch": 2, "sequence": 3, "past_sequence": 4, "total_sequence": 7, "vision_sequence": 5}
    yield Kind("text_embeddings", f"{_MODULES}:text_embeddings", (input_ids,), (hidden_states,), dims)
    yield Kind("positions", f"{_MODULES}:positions", (attention_mask, position_ids), (causal_mask, cos, sin), dims)
    yield Kind(
        "self_attention_layer",
        f"{_MODULES}:self_attention_layer",
        (hidden_states, causal_mask, cos, sin, *past),
        (hidden_states, *present),
        dims,
    )
    yield Kind(
        "cross_attention_layer",
        f"{_MODULES}:cross_attention_layer",
        (hidden_states, *masks, cross_key_value("key", text), cross_key_value("value", text)),
        (hidden_states,),
        dims,
    )
    yield Kind("lm_head", f"{_MODULES}:lm_head", (hidden_states,), (logits,), dims)


def _self_attention_layer(index: int) -> Block:
    cache = {f"past_{part}": f"past_key_values.{index}.{part}" for part in ("key", "value")}
    return Block(
        f"layers.{index}",
        "self_attention_layer",
        {"": f"{_MODEL}.layers.{index}"},
        {name: name for name in ("causal_mask", "cos", "sin", "hidden_states")} | cache,
        {"hidden_states": "hidden_states"}
        | {f"present_{part}": f"present.{index}.{part}" for part in ("key", "value")},
    )


def _cross_attention_layer(index: int) -> Block:
    cross = {part: f"cross_attn_key_values.{index}.{part}" for part in ("key", "value")}
    return Block(
        f"layers.{index}",
        "cross_attention_layer",
        {"": f"{_MODEL}.layers.{index}"},
        {name: name for name in ("hidden_states", *_MASKS)} | cross,
        {"hidden_states": "hidden_states"},
    )
