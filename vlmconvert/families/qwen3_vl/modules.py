"""Blocks of Qwen3-VL that other families do not have, as torch modules.

Every function returns a module on the meta device; `Block.weights` maps its parameters to the checkpoint's tensors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionPatchMerger

from vlmconvert.families.parts.grid_tower_modules import GridMerger, axis_positions


class Stack(nn.Module):
    """Features of several layers as one tensor."""

    def forward(self, *features: Tensor) -> Tensor:
        """[layers, features, width] of tensors [features, width]."""
        return torch.stack(features)


class AddFeatures(nn.Module):
    """Adds the features of one layer of the tower to the hidden states of the tokens that they belong to.

    Args:
        level: number of the layer among those with features.
    """

    def __init__(self, level: int) -> None:
        super().__init__()
        self.level = level

    def forward(self, hidden_states: Tensor, visual_pos_masks: Tensor, deepstack_visual_embeds: Tensor) -> Tensor:
        """Hidden states [batch, sequence, width].

        Args:
            hidden_states: [batch, sequence, width].
            visual_pos_masks: true for tokens with features, [batch, sequence]; one false column stands for a batch without any. In
                paged attention, these axes may differ from the first two of the hidden states.
            deepstack_visual_embeds: [layers, tokens with features, width].
        """
        none = torch.zeros_like(hidden_states[..., 0], dtype=torch.bool).reshape(-1)
        places = torch.cat((visual_pos_masks.reshape(-1), none))[: none.shape[0]]
        number = (torch.cumsum(places.to(torch.int64), 0) - 1).clamp(min=0)
        features = torch.where(places[:, None], deepstack_visual_embeds[self.level][number], 0.0)
        return hidden_states + features.reshape(hidden_states.shape)


def positions(config: dict[str, Any], layer_type: str, sliding_window: int | None) -> nn.Module:
    """See `axis_positions`; the frequencies of time, height and width take turns."""
    return axis_positions(config, layer_type, sliding_window, interleaved=True)


def position_embeddings(config: dict[str, Any]) -> nn.Module:
    """The table of positions of patches."""
    vision = config["vision_config"]
    with torch.device("meta"):
        return nn.Embedding(vision["num_position_embeddings"], vision["hidden_size"])


def deepstack_merger(config: dict[str, Any]) -> nn.Module:
    """A merger whose norm is that of a whole feature."""
    vision: Any = AutoConfig.for_model(**config["vision_config"])
    with torch.device("meta"):
        return GridMerger(Qwen3VLVisionPatchMerger(vision, use_postshuffle_norm=True))


def deepstack_features(config: dict[str, Any]) -> nn.Module:
    """See `Stack`."""
    return Stack()


def add_features(config: dict[str, Any], level: int) -> nn.Module:
    """See `AddFeatures`."""
    return AddFeatures(level)
