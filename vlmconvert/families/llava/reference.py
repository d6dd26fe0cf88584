"""LLaVA and LLaVA-NeXT checkpoints in torch, as the reference that artifacts are compared with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache

from vlmconvert.families.parts.reference import TorchReference

__all__ = ["Reference"]


class Reference(TorchReference):
    """A model whose vision side hands the projector's output to the language side.

    Args:
        folder: the checkpoint.
        architecture: name of transformers' class.
        output: name of the projector's output in the artifact.
        joined: whether the artifact projects all images and videos of a prompt at once.
        projector: name of the projector in transformers' class.
    """

    def __init__(
        self,
        folder: Path,
        architecture: str,
        output: str,
        joined: bool = False,
        projector: str = "multi_modal_projector",
    ) -> None:
        super().__init__(folder, architecture)
        getattr(self.model.model, projector).register_forward_hook(self._projected)
        self._output, self._joined = output, joined
        self._made: list[torch.Tensor] = []
        self._given: torch.Tensor | None = None

    @property
    def handed(self) -> dict[str, np.ndarray]:
        """The projected features of the last prefill."""
        if not self._made:
            return {}
        if not self._joined:
            return {self._output: self._made[0].numpy()}
        return {self._output: torch.cat([part.flatten(0, 1) for part in self._made])[None].numpy()}

    def _take(self, handed: dict[str, np.ndarray] | None, inputs: dict[str, torch.Tensor], cache: DynamicCache) -> None:
        self._made = []
        self._given = torch.from_numpy(handed[self._output]).flatten(0, 1) if handed else None

    def _projected(self, _module: Any, _inputs: Any, output: torch.Tensor) -> torch.Tensor | None:
        """Forward hook of the projector: keep its output, or replace it by the features that were handed in."""
        if self._given is None:
            self._made.append(output)
            return None
        count = output.shape[0] * output.shape[1]
        taken, self._given = self._given[:count], self._given[count:]
        return taken.reshape(output.shape)
