"""What a validation pass needs of the two sides it compares."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

__all__ = ["Batch", "Model"]


class Model(Protocol):
    """The checkpoint or the artifact: prefill a batch of prompts, then append one token a row."""

    @property
    def handed(self) -> dict[str, np.ndarray]:
        """What the vision side handed to the language side in the last prefill, by name."""
        ...

    def prefill(self, processed: dict[str, np.ndarray], handed: dict[str, np.ndarray] | None = None) -> np.ndarray:
        """Logits [batch, 1 or sequence, vocabulary]; `handed` stand in for the model's own vision side."""
        ...

    def step(self, tokens: np.ndarray) -> np.ndarray:
        """Logits [batch, 1, vocabulary] after tokens [batch]."""
        ...


@dataclass(frozen=True)
class Batch:
    """Prompts through the processor, and the answers that are right."""

    processed: dict[str, np.ndarray]
    answers: tuple[str, ...]
