"""*validate-accuracy*: exact-match accuracy of checkpoint and artifact on held-out samples."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from manifests.model import Validation
from passes.base import Pass
from passes.validate.comparison import Comparison

__all__ = ["LEAST_ACCURACY", "ValidateAccuracyPass"]

# Below this accuracy of the checkpoint, right answers are too rare, or too much chance, to judge an artifact by.
LEAST_ACCURACY = 0.3


@dataclass(frozen=True)
class ValidateAccuracyPass(Pass):
    """Share of questions whose greedy answer equals the right one, letter by letter.

    It has no limit if the checkpoint itself answers too few of them.

    Attributes:
        max_drop: maximum drop against the checkpoint that passes, in percentage points.
    """

    name = "validate-accuracy"

    max_drop: float = 1.0

    def __call__(self, comparisons: Sequence[Comparison]) -> list[Validation]:
        """The accuracy over all batches."""
        samples = sum(comparison.samples for comparison in comparisons)
        before, after = (
            round(sum(comparison.right[side] for comparison in comparisons) / samples, 6) for side in (0, 1)
        )
        limit = None if before < LEAST_ACCURACY else round(before - self.max_drop / 100, 6)
        return [
            Validation(
                metric="exact_match",
                component="artifact",
                reference=before,
                value=after,
                threshold=limit,
                passed=limit is None or after >= limit,
                samples=samples,
            )
        ]
