"""*validate-accuracy*: exact-match accuracy on held-out samples, checkpoint beside artifact."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from manifests.model import Validation
from passes.base import Pass
from passes.validate.greedy import greedy
from passes.validate.protocol import Batch, Model

__all__ = ["ValidateAccuracyPass"]


@dataclass(frozen=True)
class ValidateAccuracyPass(Pass):
    """Share of questions whose greedy answer is the right one, to the letter.

    Attributes:
        max_drop: greatest loss against the checkpoint that passes, in percentage points.
        steps: most tokens of an answer.
    """

    name = "validate-accuracy"

    max_drop: float = 1.0
    steps: int = 16

    def __call__(
        self,
        reference: Model,
        artifact: Model,
        batches: Iterable[Batch],
        ends: list[int],
        decode: Callable[[np.ndarray], list[str]],
        step: Callable[[str], None] = lambda label: None,
    ) -> list[Validation]:
        """Measure all batches; `decode` turns tokens [batch, steps] into texts."""
        right = {"reference": 0, "artifact": 0}
        samples = 0
        for batch in batches:
            for side, model in (("reference", reference), ("artifact", artifact)):
                answers = greedy(model, batch.processed, ends, self.steps)
                texts = decode(np.where(answers.valid, answers.tokens, ends[0]))
                right[side] += sum(
                    text.strip() == answer.strip() for text, answer in zip(texts, batch.answers, strict=True)
                )
            samples += len(batch.answers)
            step(f"{samples} samples")
        before, after = (round(right[side] / samples, 6) for side in ("reference", "artifact"))
        limit = round(before - self.max_drop / 100, 6)
        return [
            Validation(
                metric="exact_match",
                component="artifact",
                reference=before,
                value=after,
                threshold=limit,
                passed=after >= limit,
                samples=samples,
            )
        ]
