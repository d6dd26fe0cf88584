"""The mllama checkpoint in torch, as the reference that artifacts are compared with."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from transformers import DynamicCache

from vlmconvert.families.parts.reference import TorchReference

__all__ = ["Reference"]


class Reference(TorchReference):
    """`MllamaForConditionalGeneration`; its vision side hands over the cross-attention keys and values."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, "MllamaForConditionalGeneration")
        self.layers: list[int] = self.model.config.text_config.cross_attention_layers

    @property
    def handed(self) -> dict[str, np.ndarray]:
        """The cross-attention keys and values of the last prefill."""
        layers = self._state["past_key_values"].layers
        return {
            f"cross_attn_key_values.{index}.{part}": getattr(layers[index], f"{part}s").numpy()
            for index in self.layers
            for part in ("key", "value")
        }

    def _take(self, handed: dict[str, np.ndarray] | None, inputs: dict[str, torch.Tensor], cache: DynamicCache) -> None:
        if handed is None:
            return
        for name in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask"):
            inputs.pop(name, None)
        for index in self.layers:
            key, value = (
                torch.from_numpy(handed[f"cross_attn_key_values.{index}.{part}"]) for part in ("key", "value")
            )
            cache.update(key, value, index)

    def _kept(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: value[:, -1:] for name, value in inputs.items() if name == "cross_attention_mask"}
