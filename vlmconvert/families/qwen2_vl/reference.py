"""Qwen-VL checkpoints in torch, as the reference that artifacts are compared with."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache

from vlmconvert.families.parts.reference import TorchReference

__all__ = ["Reference"]

_GRIDS = ("image_grid_thw", "video_grid_thw", "second_per_grid_ts")


class Reference(TorchReference):
    """A model whose tower hands merged features to the language side; images come first, videos follow.

    Args:
        folder: the checkpoint.
        architecture: name of transformers' class.
    """

    def __init__(self, folder: Path, architecture: str) -> None:
        super().__init__(folder, architecture)
        self.model.model.visual.register_forward_hook(self._merged)
        self._made: list[dict[str, torch.Tensor]] = []
        self._given: dict[str, torch.Tensor] | None = None

    @property
    def handed(self) -> dict[str, np.ndarray]:
        """The features of the last prefill."""
        names = self._made[0] if self._made else {}
        axis = {"deepstack_features": 1}
        return {name: torch.cat([part[name] for part in self._made], dim=axis.get(name, 0)).numpy() for name in names}

    def _take(self, handed: dict[str, np.ndarray] | None, inputs: dict[str, torch.Tensor], cache: DynamicCache) -> None:
        self._made = []
        self._given = {name: torch.from_numpy(value) for name, value in handed.items()} if handed else None

    def token_positions(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        grids = {name: inputs[name] for name in _GRIDS if name in inputs}
        if not grids:
            return super().token_positions(inputs)
        mask, types = inputs["attention_mask"], inputs["mm_token_type_ids"]
        positions, _ = self.model.model.get_rope_index(inputs["input_ids"], types, attention_mask=mask, **grids)
        return positions

    def _merged(self, _module: Any, _inputs: Any, output: Any) -> Any:
        """Forward hook of the tower: keep its features, or replace them by those that were handed in."""
        deepstack = getattr(output, "deepstack_features", None)
        if self._given is None:
            made = {"image_features": output.pooler_output}
            self._made.append(made | ({"deepstack_features": torch.stack(deepstack)} if deepstack else {}))
            return output
        count = len(output.pooler_output)
        taken = {name: value.split((count, value.shape[-2] - count), dim=-2) for name, value in self._given.items()}
        self._given = {name: rest for name, (_, rest) in taken.items()}
        output.pooler_output = taken["image_features"][0]
        if deepstack:
            output.deepstack_features = list(taken["deepstack_features"][0])
        return output
