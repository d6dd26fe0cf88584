"""Blocks of a decoder as torch modules: transformers' own layers behind the ports that the families declare.

Every function returns a module on the meta device; `Block.weights` maps its parameters to the checkpoint's tensors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel

from passes.compat.transformers import LayerCache, use_sdpa

# The lowest float16: with it, the mask stays finite on devices that compute in half precision.
MASKED = -65504.0


class Positions(nn.Module):
    """The causal mask and the rotary position embedding, computed once for all layers of a type.

    Args:
        rotary_emb: transformers' rotary embedding of the model.
        sliding_window: number of positions that a token attends to, itself included; None for all positions.
    """

    def __init__(self, rotary_emb: nn.Module, sliding_window: int | None = None) -> None:
        super().__init__()
        self.rotary_emb = rotary_emb
        self.sliding_window = sliding_window

    def forward(self, attention_mask: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Additive mask [batch, 1, sequence, total] of 0 and -65504; cosine and sine [batch, sequence, head_dim]."""
        mask = additive_mask(attention_mask, position_ids.shape[-1], self.sliding_window)
        cos, sin = self.rotary_emb(mask, position_ids)
        return mask, cos, sin


def additive_mask(
    attention_mask: Tensor, sequence: int, sliding_window: int | None, same: Tensor | None = None
) -> Tensor:
    """The mask [batch, 1, sequence, total] that attention adds: 0 for positions that a token attends to, else -65504.

    OpenVINO's paged attention drops the mask, and finds a sliding window by the operations of which it is made: what is compared
    with a constant offset, and what it is combined with (`StateManagementPattern`, since OpenVINO 2025.4). So they stay as they are.

    Args:
        attention_mask: [batch, total], 0 for padding.
        sequence: number of tokens, the last of all positions.
        sliding_window: number of positions that a token attends to, itself included; None for all positions.
        same: [batch, 1, sequence, total], later positions that a token attends to as well, such as those of its image.
    """
    total = attention_mask.shape[1]
    columns = torch.arange(total)[None, None, None]
    rows = (torch.arange(sequence) + (total - sequence))[None, None, :, None]
    visible = columns <= rows
    if same is not None:
        visible = visible | same
    if sliding_window is not None:
        every = torch.ones((), dtype=torch.bool)
        visible = every & (every & (columns > rows + -sliding_window) & visible)
    visible = visible & attention_mask[:, None, None, :].to(torch.bool)
    visible = visible.expand(attention_mask.shape[0], 1, sequence, total)
    return torch.where(visible, 0.0, MASKED)[..., :total]


class DecoderLayer(nn.Module):
    """transformers' decoder layer with the cache as plain tensors."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(
        self, hidden_states: Tensor, causal_mask: Tensor, cos: Tensor, sin: Tensor, past_key: Tensor, past_value: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states [batch, sequence, width], and keys and values [batch, heads, total, head_dim]."""
        cache = LayerCache(past_key, past_value)
        hidden_states = self.layer(
            hidden_states, attention_mask=causal_mask, position_embeddings=(cos, sin), past_key_values=cache
        )
        return hidden_states, cache.keys, cache.values


class LmHead(nn.Module):
    """Final norm and LM head."""

    def __init__(self, norm: nn.Module, width: int, vocab_size: int) -> None:
        super().__init__()
        self.norm = norm
        self.lm_head = nn.Linear(width, vocab_size, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Logits [batch, sequence, vocabulary]."""
        return self.lm_head(self.norm(hidden_states))


def _text_model(config: dict[str, Any]) -> Any:
    """Transformers' model of the text config with a single layer."""
    text = dict(config["text_config"]) | {"num_hidden_layers": 1}
    if "layer_types" in text:
        text["layer_types"] = None
    text_config = AutoConfig.for_model(text.pop("model_type"), **text)
    use_sdpa(text_config)
    return AutoModel.from_config(text_config)


def text_embeddings(config: dict[str, Any]) -> nn.Module:
    """Token embeddings."""
    with torch.device("meta"):
        return _text_model(config).embed_tokens


def positions(config: dict[str, Any], layer_type: str, sliding_window: int | None) -> nn.Module:
    """See `Positions`."""
    with torch.device("meta"):
        rotary_emb = _text_model(config).rotary_emb
    # The module has no parameters, but its frequencies must have values, so it is made outside the meta device.
    return Positions(type(rotary_emb)(config=rotary_emb.config), sliding_window)


def decoder_layer(config: dict[str, Any]) -> nn.Module:
    """See `DecoderLayer`."""
    with torch.device("meta"):
        return DecoderLayer(_text_model(config).layers[0])


def lm_head(config: dict[str, Any]) -> nn.Module:
    """See `LmHead`."""
    text = config["text_config"]
    with torch.device("meta"):
        return LmHead(_text_model(config).norm, text["hidden_size"], text["vocab_size"])
