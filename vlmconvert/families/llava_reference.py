"""Checkpoints of the LLaVA line in torch, as the reference that artifacts are compared with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import DynamicCache
from transformers.utils import logging

__all__ = ["Reference"]


class Reference:
    """transformers' own class in float32, with the interface of `passes.validate.protocol.Model`.

    Args:
        folder: the checkpoint.
        architecture: the class.
        output: what the artifact calls the projector's output.
        joined: whether the artifact projects all images and videos of a prompt at once.
    """

    def __init__(self, folder: Path, architecture: str, output: str, joined: bool = False) -> None:
        logging.disable_progress_bar()
        self.model = getattr(transformers, architecture).from_pretrained(folder, dtype=torch.float32).eval()
        self.model.model.multi_modal_projector.register_forward_hook(self._projected)
        self._output, self._joined = output, joined
        self._made: list[torch.Tensor] = []
        self._given: torch.Tensor | None = None
        self._state: dict[str, Any] = {}

    @property
    def handed(self) -> dict[str, np.ndarray]:
        """Projected features of the last prefill."""
        if not self._made:
            return {}
        if not self._joined:
            return {self._output: self._made[0].numpy()}
        return {self._output: torch.cat([part.flatten(0, 1) for part in self._made])[None].numpy()}

    @torch.no_grad()
    def prefill(self, processed: dict[str, np.ndarray], handed: dict[str, np.ndarray] | None = None) -> np.ndarray:
        """See `passes.validate.protocol.Model`."""
        inputs = {name: torch.from_numpy(np.asarray(value)) for name, value in processed.items()}
        cache = DynamicCache(config=self.model.config.get_text_config())
        self._made = []
        self._given = torch.from_numpy(handed[self._output]).flatten(0, 1) if handed else None
        mask = inputs["attention_mask"]
        inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
        logits = self.model(**inputs, past_key_values=cache, use_cache=True).logits
        self._state = {"past_key_values": cache, "attention_mask": mask, "position": inputs["position_ids"][:, -1:]}
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
            past_key_values=state["past_key_values"],
            use_cache=True,
        ).logits.numpy()

    def _projected(self, _module: Any, _inputs: Any, output: torch.Tensor) -> torch.Tensor | None:
        """Remember what the projector made, or put what was given in its place."""
        if self._given is None:
            self._made.append(output)
            return None
        count = output.shape[0] * output.shape[1]
        taken, self._given = self._given[:count], self._given[count:]
        return taken.reshape(output.shape)
