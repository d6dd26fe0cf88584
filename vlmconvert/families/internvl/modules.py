"""Blocks of InternVL's vision tower as torch modules.

Every function returns a module on the meta device; `Block.weights` maps its parameters to the checkpoint's tensors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig
from transformers.models.internvl.modeling_internvl import (
    InternVLMultiModalProjector,
    InternVLVisionEmbeddings,
    InternVLVisionLayer,
)

from passes.compat.transformers import use_sdpa


class VisionEmbeddings(nn.Module):
    """Class and patch embeddings with their positions, for tiles of the size that the positions are for."""

    def __init__(self, embeddings: InternVLVisionEmbeddings) -> None:
        super().__init__()
        self.cls_token, self.position_embeddings = embeddings.cls_token, embeddings.position_embeddings
        self.patch_embeddings = embeddings.patch_embeddings

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Hidden states [tiles, positions, width] of pixel values [tiles, channels, size, size]."""
        embeddings = self.patch_embeddings(pixel_values)
        first = self.cls_token.expand(embeddings.shape[0], 1, embeddings.shape[2])
        hidden_states = torch.cat((first, embeddings), dim=1)
        return hidden_states if self.position_embeddings is None else hidden_states + self.position_embeddings


class ShuffleAndProject(nn.Module):
    """The norm of the tower if it has one, then squares of patches as one feature, and a projection."""

    def __init__(self, config: Any, side: int) -> None:
        super().__init__()
        vision = config.vision_config
        self.layernorm = (
            None if vision.use_mean_pooling else nn.LayerNorm(vision.hidden_size, eps=vision.layer_norm_eps)
        )
        self.projector = InternVLMultiModalProjector(config)
        self.side, self.unit = side, int(1 / config.downsample_ratio)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Features [tiles, tokens, width of the language model] of hidden states [tiles, positions, width]."""
        if self.layernorm is not None:
            hidden_states = self.layernorm(hidden_states)
        rows, unit, width = self.side // self.unit, self.unit, hidden_states.shape[-1]
        squares = hidden_states[:, 1:].reshape(-1, rows, unit, rows, unit, width).transpose(2, 3)
        return self.projector(squares.reshape(-1, rows * rows, unit * unit * width))


def _config(config: dict[str, Any]) -> Any:
    made = AutoConfig.for_model(**config)
    use_sdpa(made.vision_config)
    return made


def vision_embeddings(config: dict[str, Any]) -> nn.Module:
    """See `VisionEmbeddings`."""
    with torch.device("meta"):
        return VisionEmbeddings(InternVLVisionEmbeddings(_config(config).vision_config))


def vision_layer(config: dict[str, Any]) -> nn.Module:
    """Transformers' encoder layer; every position attends to all positions."""
    with torch.device("meta"):
        return InternVLVisionLayer(_config(config).vision_config)


def shuffle_and_project(config: dict[str, Any]) -> nn.Module:
    """See `ShuffleAndProject`."""
    made = _config(config)
    vision = made.vision_config
    with torch.device("meta"):
        return ShuffleAndProject(made, vision.image_size[0] // vision.patch_size[0])
