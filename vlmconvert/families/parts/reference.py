"""The checkpoint in torch, as the reference that artifacts are compared with; shared by the families."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import DynamicCache
from transformers.utils import logging

__all__ = ["TorchReference"]


class TorchReference(ABC):
    """transformers' own class in float32, with the interface of `passes.validate.model.Model`.

    Subclasses say which tensors the vision side hands to the language side (`handed`), and how such tensors replace the
    images of a prompt (`_take`).

    Args:
        folder: the checkpoint.
        architecture: name of transformers' class.
    """

    def __init__(self, folder: Path, architecture: str) -> None:
        logging.disable_progress_bar()
        model_class = getattr(transformers, architecture)
        options = {
            "dtype": torch.float32,
            "attn_implementation": "sdpa",
            "use_safetensors": True,
            "local_files_only": True,
        }
        self.model = model_class.from_pretrained(folder, **options).eval()
        self._state: dict[str, Any] = {}

    @property
    @abstractmethod
    def handed(self) -> dict[str, np.ndarray]:
        """The tensors that the vision side handed to the language side in the last prefill, by name."""

    @torch.no_grad()
    def prefill(self, processed: dict[str, np.ndarray], handed: dict[str, np.ndarray] | None = None) -> np.ndarray:
        """See `passes.validate.model.Model`."""
        inputs = {name: torch.from_numpy(np.asarray(value)) for name, value in processed.items()}
        cache = DynamicCache(config=self.model.config.get_text_config())
        self._take(handed, inputs, cache)
        mask = inputs["attention_mask"]
        inputs["position_ids"] = self.token_positions(inputs)
        logits = self.model(**inputs, past_key_values=cache, use_cache=True).logits
        self._state = {
            "past_key_values": cache,
            "attention_mask": mask,
            "position_ids": inputs["position_ids"][..., -1:],
            **self._kept(inputs),
        }
        return logits.numpy()

    @torch.no_grad()
    def step(self, tokens: np.ndarray) -> np.ndarray:
        """See `passes.validate.model.Model`."""
        state = self._state
        state["attention_mask"] = torch.cat((state["attention_mask"], torch.ones(len(tokens), 1, dtype=torch.long)), 1)
        state["position_ids"] = state["position_ids"] + 1
        return self.model(input_ids=torch.from_numpy(tokens).reshape(-1, 1), use_cache=True, **state).logits.numpy()

    @abstractmethod
    def _take(self, handed: dict[str, np.ndarray] | None, inputs: dict[str, torch.Tensor], cache: DynamicCache) -> None:
        """Prepare a prefill; if `handed` is given, let it replace the images by changing the inputs or the cache."""

    def token_positions(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """The positions of the tokens of a prompt, [batch, sequence] or with more axes before."""
        return (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)

    def _kept(self, inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """The inputs of a prefill that every later step needs again."""
        return {}
