"""The interface of the models that a validation pass compares, and the batches of prompts that it gives them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

__all__ = ["Answered", "Batch", "Model"]


class Model(Protocol):
    """The checkpoint or the artifact: `prefill` takes a batch of prompts, then each `step` appends one token per row."""

    @property
    def handed(self) -> dict[str, np.ndarray]:
        """Outputs of the vision side that the language side has read in the last prefill, by name."""
        ...

    def prefill(self, processed: dict[str, np.ndarray], handed: dict[str, np.ndarray] | None = None) -> np.ndarray:
        """Compute a batch of prompts.

        Args:
            processed: the prompts, as outputs of the processor.
            handed: outputs of the vision side to use instead of the model's own.

        Returns:
            Logits [batch, 1 or sequence, vocabulary].
        """
        ...

    def step(self, tokens: np.ndarray) -> np.ndarray:
        """Append one token per row.

        Args:
            tokens: [batch].

        Returns:
            Logits [batch, 1, vocabulary].
        """
        ...


@dataclass(frozen=True)
class Batch:
    """A batch of prompts, as outputs of the processor, and the right answer to each."""

    processed: dict[str, np.ndarray]
    answers: tuple[str, ...]


@dataclass(frozen=True)
class Answered:
    """A batch of prompts that end with the right answers, as outputs of the processor.

    Attributes:
        processed: the prompts with their answers, padded on the left.
        said: [batch, count], which of the last `count` positions hold an answer's tokens, the one that ends it included.
    """

    processed: dict[str, np.ndarray]
    said: np.ndarray
