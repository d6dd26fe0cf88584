"""Blocks of DeepSeek-VL as torch modules."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import DeepseekVLConfig
from transformers.models.deepseek_vl.modeling_deepseek_vl import DeepseekVLAligner

__all__ = ["norm_and_align"]


class NormAndAlign(nn.Module):
    """The norm behind the tower's layers, and the projector."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        vision = config["vision_config"]
        self.norm = nn.LayerNorm(vision["hidden_size"], eps=vision["layer_norm_eps"])
        self.aligner = DeepseekVLAligner(DeepseekVLConfig.from_dict(config))

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Projected features [images, tokens, width] of hidden states [images, positions, width]."""
        return self.aligner(self.norm(hidden_states))


def norm_and_align(config: dict[str, Any]) -> nn.Module:
    """See `NormAndAlign`; its weights take no memory."""
    with torch.device("meta"):
        return NormAndAlign(config)
