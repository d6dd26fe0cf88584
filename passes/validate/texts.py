"""*validate-texts*: how far an artifact is from its checkpoint along texts: long answers about photos, and without images."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from manifests.model import Validation
from passes.base import Pass
from passes.validate.comparison import Comparison

__all__ = ["ValidateTextsPass"]


@dataclass(frozen=True)
class ValidateTextsPass(Pass):
    """KL divergence, top-1 agreement and perplexity along texts that neither model has written.

    Attributes:
        max_kl: maximum mean KL divergence in nats. The limits of the other figures follow from it: by Pinsker's inequality,
            probabilities differ by at most the root of half of it, and the perplexity may grow by its exponential.
    """

    name = "validate-texts"

    max_kl: float = 1.0

    def __call__(self, comparisons: Sequence[Comparison]) -> list[Validation]:
        """The figures over all texts; the comparisons are along right answers."""
        distances = [comparison.distances["artifact"] for comparison in comparisons]
        kl = float(np.concatenate([distance.kl for distance in distances]).mean())
        agreement = float(np.concatenate([distance.agree for distance in distances]).mean())
        losses = np.concatenate([comparison.losses for comparison in comparisons if comparison.losses is not None])
        before, after = np.exp(losses.mean(axis=0))
        samples = sum(comparison.samples for comparison in comparisons)

        def figure(metric: str, value: float, threshold: float, passed: bool, reference: float | None) -> Validation:
            rounded = (None if number is None else float(f"{number:.6g}") for number in (reference, threshold))
            return Validation(
                metric=metric,
                component="artifact",
                reference=next(rounded),
                value=float(f"{value:.6g}"),
                threshold=next(rounded),
                passed=passed,
                samples=samples,
            )

        least, most = max(0.0, 1 - math.sqrt(self.max_kl / 2)), float(before) * math.exp(self.max_kl)
        return [
            figure("text_kl", kl, self.max_kl, kl <= self.max_kl, None),
            figure("text_agreement", agreement, least, agreement >= least, None),
            figure("text_perplexity", float(after), most, float(after) <= most, float(before)),
        ]
