"""DeepSeek-VL checkpoints in torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache

from vlmconvert.families.parts.reference import TorchReference

__all__ = ["Reference"]


class Reference(TorchReference):
    """transformers' class; what the vision side hands over is the projector's output."""

    def __init__(self, folder: Path, architecture: str) -> None:
        super().__init__(folder, architecture)
        self.model.model.aligner.register_forward_hook(self._projected)
        self._given: torch.Tensor | None = None
        self._made: torch.Tensor | None = None

    @property
    def handed(self) -> dict[str, np.ndarray]:
        return {} if self._made is None else {"image_features": self._made.numpy()}

    def _take(self, handed: dict[str, np.ndarray] | None, inputs: dict[str, torch.Tensor], cache: DynamicCache) -> None:
        self._made = None
        self._given = torch.from_numpy(handed["image_features"]) if handed else None

    def _projected(self, _module: Any, _inputs: Any, output: torch.Tensor) -> torch.Tensor:
        self._made = output if self._given is None else self._given
        return self._made
