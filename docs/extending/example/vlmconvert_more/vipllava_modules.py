"""Blocks of ViP-LLaVA as torch modules."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import VipLlavaConfig
from transformers.models.vipllava.modeling_vipllava import VipLlavaMultiModalProjector

__all__ = ["select_and_project"]


class SelectAndProject(VipLlavaMultiModalProjector):
    """The chosen layers' hidden states side by side, without the class token, through the projector."""

    def forward(self, *hidden_states: Tensor) -> Tensor:
        """Projected features [images, tokens, width] of hidden states [images, positions, width]."""
        return super().forward(torch.cat(hidden_states, dim=-1)[:, 1:])


def select_and_project(config: dict[str, Any]) -> nn.Module:
    """See `SelectAndProject`; the module is made without memory for its weights."""
    with torch.device("meta"):
        return SelectAndProject(VipLlavaConfig.from_dict(config))
