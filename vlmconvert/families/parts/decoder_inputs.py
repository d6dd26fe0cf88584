"""Inputs of a decoder that takes embeddings: those for a prompt, and those for each further token."""

from __future__ import annotations

from typing import Any

import numpy as np

from vlmconvert.families.parts.decoder import cache_shape

__all__ = ["decoder_inputs", "next_decoder_inputs"]


def decoder_inputs(processed: dict[str, np.ndarray], config: dict[str, Any]) -> dict[str, np.ndarray]:
    """Inputs for a prompt: `input_ids`, `attention_mask`, `position_ids` [batch, sequence], and an empty cache.

    Args:
        processed: outputs of the processor, among them input_ids and attention_mask [batch, sequence].
        config: the completed config.
    """
    text = config["text_config"]
    values = {name: processed[name].astype(np.int64) for name in ("input_ids", "attention_mask")}
    values["position_ids"] = np.clip(np.cumsum(values["attention_mask"], axis=1) - 1, 0, None)
    heads, head_dim = cache_shape(text)
    cache = np.zeros((len(values["input_ids"]), heads, 0, head_dim), np.float32)
    names = (
        f"past_key_values.{index}.{part}" for index in range(text["num_hidden_layers"]) for part in ("key", "value")
    )
    return values | dict.fromkeys(names, cache)


def next_decoder_inputs(previous: dict[str, np.ndarray], tokens: np.ndarray) -> dict[str, np.ndarray]:
    """The inputs for one further token.

    Args:
        previous: inputs of the previous call.
        tokens: the token that is appended to each sequence, [batch].
    """
    one = np.ones((tokens.size, 1), np.int64)
    return {
        "input_ids": tokens.reshape(-1, 1).astype(np.int64),
        "attention_mask": np.concatenate((previous["attention_mask"], one), axis=1),
        "position_ids": previous["position_ids"][:, -1:] + 1,
    }
