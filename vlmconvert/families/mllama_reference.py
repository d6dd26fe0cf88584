"""The mllama checkpoint in torch, as the reference that artifacts are compared with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache, MllamaForConditionalGeneration
from transformers.utils import logging

__all__ = ["Reference"]


class Reference:
    """`MllamaForConditionalGeneration` in float32, with the interface of `passes.validate.protocol.Model`."""

    def __init__(self, folder: Path) -> None:
        logging.disable_progress_bar()
        self.model = MllamaForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
        self.layers: list[int] = self.model.config.text_config.cross_attention_layers
        self._state: dict[str, Any] = {}

    @property
    def handed(self) -> dict[str, np.ndarray]:
        """Cross-attention keys and values of the last prefill."""
        layers = self._state["past_key_values"].layers
        return {
            f"cross_attn_key_values.{index}.{part}": getattr(layers[index], f"{part}s").numpy()
            for index in self.layers
            for part in ("key", "value")
        }

    @torch.no_grad()
    def prefill(self, processed: dict[str, np.ndarray], handed: dict[str, np.ndarray] | None = None) -> np.ndarray:
        """See `passes.validate.protocol.Model`."""
        inputs = {name: torch.from_numpy(np.asarray(value)) for name, value in processed.items()}
        cache = DynamicCache(config=self.model.config.get_text_config())
        if handed is not None:
            for name in ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask"):
                inputs.pop(name, None)
            for index in self.layers:
                key, value = (
                    torch.from_numpy(handed[f"cross_attn_key_values.{index}.{part}"]) for part in ("key", "value")
                )
                cache.update(key, value, index)
        mask = inputs["attention_mask"]
        inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
        logits = self.model(**inputs, past_key_values=cache, use_cache=True).logits
        self._state = {
            "past_key_values": cache,
            "attention_mask": mask,
            "position": inputs["position_ids"][:, -1:],
            "cross_attention_mask": inputs["cross_attention_mask"][:, -1:]
            if "cross_attention_mask" in inputs
            else None,
        }
        return logits.numpy()

    @torch.no_grad()
    def step(self, tokens: np.ndarray) -> np.ndarray:
        """See `passes.validate.protocol.Model`."""
        state = self._state
        state["attention_mask"] = torch.cat((state["attention_mask"], torch.ones(len(tokens), 1, dtype=torch.long)), 1)
        state["position"] = state["position"] + 1
        return self.model(
            input_ids=torch.from_numpy(tokens).reshape(-1, 1),
            attention_mask=state["attention_mask"],
            position_ids=state["position"],
            cross_attention_mask=state["cross_attention_mask"],
            past_key_values=state["past_key_values"],
            use_cache=True,
        ).logits.numpy()
