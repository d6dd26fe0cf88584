"""Blocks of Idefics3's and SmolVLM's vision tower as torch modules.

Every function returns a module on the meta device; `Block.weights` maps its parameters to the checkpoint's tensors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel

from passes.compat.transformers import use_sdpa
from vlmconvert.families.parts.decoder_modules import MASKED


class VisionEmbeddings(nn.Module):
    """Patch embeddings with those of their positions."""

    def __init__(self, embeddings: Any) -> None:
        super().__init__()
        self.patch_embedding = embeddings.patch_embedding
        self.position_embedding = embeddings.position_embedding

    def forward(self, pixel_values: Tensor, patch_position_ids: Tensor) -> Tensor:
        """Hidden states [tiles, patches, width] of pixel values [tiles, channels, size, size] and positions [tiles, patches]."""
        patches = self.patch_embedding(pixel_values).flatten(2).transpose(1, 2)
        return patches + self.position_embedding(patch_position_ids)


class VisionMask(nn.Module):
    """The mask that attention adds."""

    def forward(self, patch_attention_mask: Tensor) -> Tensor:
        """[tiles, 1, 1, patches] of 0 and -65504, for a mask [tiles, rows, columns] that is false for padding."""
        return torch.where(patch_attention_mask.flatten(1)[:, None, None], 0.0, MASKED)


class VisionLayer(nn.Module):
    """transformers' encoder layer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, hidden_states: Tensor, mask: Tensor) -> Tensor:
        """Hidden states [tiles, patches, width]."""
        return self.layer(hidden_states, mask)


class Connector(nn.Module):
    """The norm after the tower, then squares of patches as one feature, and a projection."""

    def __init__(self, norm: nn.Module, connector: nn.Module) -> None:
        super().__init__()
        self.norm, self.connector = norm, connector

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Features [tiles, tokens, width of the language model] of hidden states [tiles, patches, width]."""
        return self.connector(self.norm(hidden_states))


def _model(config: dict[str, Any]) -> Any:
    """The whole model with a single layer on each side."""
    whole = AutoConfig.for_model(**config)
    use_sdpa(whole.vision_config)
    whole.vision_config.num_hidden_layers = whole.text_config.num_hidden_layers = 1
    return AutoModel.from_config(whole, dtype=torch.float32)


def vision_embeddings(config: dict[str, Any]) -> nn.Module:
    """See `VisionEmbeddings`."""
    with torch.device("meta"):
        return VisionEmbeddings(_model(config).vision_model.embeddings)


def vision_mask(config: dict[str, Any]) -> nn.Module:
    """See `VisionMask`."""
    return VisionMask()


def vision_layer(config: dict[str, Any]) -> nn.Module:
    """See `VisionLayer`."""
    with torch.device("meta"):
        return VisionLayer(_model(config).vision_model.encoder.layers[0])


def connector(config: dict[str, Any]) -> nn.Module:
    """See `Connector`."""
    with torch.device("meta"):
        model = _model(config)
        return Connector(model.vision_model.post_layernorm, model.connector)
