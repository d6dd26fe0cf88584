"""Ports of the cross-attention keys and values, which the vision encoder computes and the language model takes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from vlmconvert.families.parts.ports import float_port, renamed

if TYPE_CHECKING:
    from manifests.model import Port

__all__ = ["cross_key_value", "cross_key_values"]


def cross_key_value(name: str, text: dict[str, Any]) -> Port:
    """A port [batch, key-value heads, image features, head_dim]."""
    head_dim = text["hidden_size"] // text["num_attention_heads"]
    return float_port(name, "batch", text["num_key_value_heads"], "vision_sequence", head_dim)


def cross_key_values(text: dict[str, Any]) -> list[Port]:
    """The ports of the keys and values of all cross-attention layers, in the order of the layers."""
    return [
        renamed(cross_key_value(part, text), f"cross_attn_key_values.{index}.{part}")
        for index in text["cross_attention_layers"]
        for part in ("key", "value")
    ]
