"""Blocks of Gemma 3 that other families do not have, as torch modules.

Every function returns a module on the meta device; `Block.weights` maps its parameters to the checkpoint's tensors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig
from transformers.models.gemma3.modeling_gemma3 import Gemma3MultiModalProjector, Gemma3RotaryEmbedding

from vlmconvert.families.parts.decoder_modules import additive_mask


class ScaledEmbeddings(nn.Embedding):
    """Token embeddings, multiplied by the square root of their width."""

    def forward(self, input_ids: Tensor) -> Tensor:
        """Embeddings [batch, sequence, width]."""
        return super().forward(input_ids) * self.embedding_dim**0.5


class Positions(nn.Module):
    """The mask and the rotary position embedding of the layers of one type.

    Args:
        rotary_emb: transformers' rotary embedding of the model.
        layer_type: full_attention or sliding_attention.
        sliding_window: number of positions that a token attends to, itself included; None for all positions.
    """

    def __init__(self, rotary_emb: nn.Module, layer_type: str, sliding_window: int | None) -> None:
        super().__init__()
        self.rotary_emb = rotary_emb
        self.layer_type, self.sliding_window = layer_type, sliding_window

    def forward(
        self, attention_mask: Tensor, position_ids: Tensor, token_type_ids: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Additive mask [batch, 1, sequence, total] of 0 and -65504; cosine and sine [batch, sequence, head_dim].

        `token_type_ids` [batch, sequence] is 1 at the tokens of images; those of one image attend to each other.
        """
        total, sequence = attention_mask.shape[1], position_ids.shape[1]
        image = torch.cat((attention_mask[:, : total - sequence] * 0, token_type_ids), dim=1)
        before = torch.cat((image[:, :1] * 0, image[:, :-1]), dim=1)
        number = torch.cumsum(image * (1 - before), dim=1) * image  # of its image, from 1; 0 for text
        own = number[:, total - sequence :]
        same = (own[:, None, :, None] == number[:, None, None, :]) & (own > 0)[:, None, :, None]
        mask = additive_mask(attention_mask, sequence, self.sliding_window, same)
        cos, sin = self.rotary_emb(mask, position_ids, self.layer_type)
        return mask, cos, sin


class PoolAndProject(nn.Module):
    """The norm after the vision tower, then the mean over squares of patches, a norm and a projection."""

    def __init__(self, config: Any) -> None:
        super().__init__()
        vision = config.vision_config
        self.norm = nn.LayerNorm(vision.hidden_size, eps=vision.layer_norm_eps)
        self.projector = Gemma3MultiModalProjector(config)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Features [images, tokens, width of the language model] of hidden states [images, patches, width]."""
        return self.projector(self.norm(hidden_states))


def _config(config: dict[str, Any]) -> Any:
    values = dict(config)
    return AutoConfig.for_model(values.pop("model_type"), **values)


def text_embeddings(config: dict[str, Any]) -> nn.Module:
    """See `ScaledEmbeddings`."""
    text = config["text_config"]
    with torch.device("meta"):
        return ScaledEmbeddings(text["vocab_size"], text["hidden_size"])


def positions(config: dict[str, Any], layer_type: str, sliding_window: int | None) -> nn.Module:
    """See `Positions`."""
    return Positions(Gemma3RotaryEmbedding(_config(config).text_config), layer_type, sliding_window)


def pool_and_project(config: dict[str, Any]) -> nn.Module:
    """See `PoolAndProject`."""
    with torch.device("meta"):
        return PoolAndProject(_config(config))
