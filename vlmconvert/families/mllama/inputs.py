"""Inputs of mllama's graphs: those for a prompt, and those for each further token."""

from __future__ import annotations

from typing import Any

import numpy as np

__all__ = ["inputs", "next_inputs"]

# The lowest float16: with it, the mask stays finite on devices that compute in half precision.
_MASKED = -65504.0


def inputs(processed: dict[str, np.ndarray], config: dict[str, Any]) -> dict[str, np.ndarray]:
    """The inputs of both components for a prompt; the vision encoder adds the cross-attention keys and values.

    Args:
        processed: outputs of the processor: input_ids and attention_mask [batch, sequence]; with images also
            cross_attention_mask [batch, sequence, images, tiles], pixel_values, aspect_ratio_ids and aspect_ratio_mask.
        config: the completed config.

    Returns:
        Arrays by the names of the components' inputs, with an empty cache. The cross-attention mask is additive, with
        values 0 and -65504. As in transformers, a token before the first image attends to all image features, and
        full_text_row_masked_out_mask then sets the result to zero.
    """
    vision, text = config["vision_config"], config["text_config"]
    values = {name: processed[name].astype(np.int64) for name in ("input_ids", "attention_mask")}
    values["position_ids"] = np.clip(np.cumsum(values["attention_mask"], axis=1) - 1, 0, None)
    batch, sequence = values["input_ids"].shape
    if "pixel_values" in processed:
        values["pixel_values"] = processed["pixel_values"].astype(np.float32)
        for name in ("aspect_ratio_ids", "aspect_ratio_mask"):
            values[name] = processed[name].astype(np.int64)
        patches = (vision["image_size"] // vision["patch_size"]) ** 2 + 1
        visible = processed["cross_attention_mask"].reshape(batch, 1, sequence, -1).repeat(patches, axis=3) != 0
        row_mask = visible.any(axis=3, keepdims=True)
        values["cross_attention_mask"] = np.where(visible | ~row_mask, 0.0, _MASKED).astype(np.float32)
        values["full_text_row_masked_out_mask"] = row_mask.astype(np.float32)
    else:
        values |= _text_only_inputs(batch, sequence, text)
    head_dim = text["hidden_size"] // text["num_attention_heads"]
    cache = np.zeros((batch, text["num_key_value_heads"], 0, head_dim), np.float32)
    for index in range(text["num_hidden_layers"]):
        if index not in text["cross_attention_layers"]:
            values |= {f"past_key_values.{index}.{part}": cache for part in ("key", "value")}
    return values


def _text_only_inputs(batch: int, sequence: int, text: dict[str, Any]) -> dict[str, np.ndarray]:
    """The cross-attention inputs of a prompt without images.

    transformers skips the cross-attention layers of such a prompt. In the graph, the values of zero make the output of
    the attention zero, and the row mask makes that of the MLP zero, so that these layers return their input unchanged.
    """
    head_dim = text["hidden_size"] // text["num_attention_heads"]
    nothing = np.zeros((batch, text["num_key_value_heads"], 1, head_dim), np.float32)
    return {
        "cross_attention_mask": np.zeros((batch, 1, sequence, 1), np.float32),
        "full_text_row_masked_out_mask": np.zeros((batch, 1, sequence, 1), np.float32),
        **{
            f"cross_attn_key_values.{index}.{part}": nothing
            for index in text["cross_attention_layers"]
            for part in ("key", "value")
        },
    }


def next_inputs(previous: dict[str, np.ndarray], tokens: np.ndarray) -> dict[str, np.ndarray]:
    """The language model's inputs for one further token; the images stay the same.

    Args:
        previous: inputs and outputs of the previous call.
        tokens: the token that is appended to each sequence, [batch].
    """
    values = dict(previous)
    values["input_ids"] = tokens.reshape(-1, 1).astype(np.int64)
    one = np.ones((tokens.size, 1), np.int64)
    values["attention_mask"] = np.concatenate((previous["attention_mask"], one), axis=1)
    values["position_ids"] = previous["position_ids"][:, -1:] + 1
    for name in ("cross_attention_mask", "full_text_row_masked_out_mask"):
        values[name] = previous[name][:, :, -1:]
    return values
