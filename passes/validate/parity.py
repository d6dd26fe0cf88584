"""*validate-parity*: how far the outputs of each side, and of the whole artifact, are from the checkpoint's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from manifests.model import Validation
from passes.base import Pass
from passes.validate.comparison import Comparison

__all__ = ["ValidateParityPass"]


@dataclass(frozen=True)
class ValidateParityPass(Pass):
    """KL divergence, top-1 agreement and maximum logit difference along the checkpoint's own greedy answers.

    Attributes:
        max_kl: maximum mean KL divergence of the whole artifact, in nats.
    """

    name = "validate-parity"

    max_kl: float = 1.0

    def __call__(self, comparisons: Sequence[Comparison]) -> list[Validation]:
        """The figures of each side and of the whole artifact over all batches."""
        samples = sum(comparison.samples for comparison in comparisons)
        figures = []
        for component in comparisons[0].distances:
            distances = [comparison.distances[component] for comparison in comparisons]
            kl = float(np.concatenate([distance.kl for distance in distances]).mean())
            agreement = float(np.concatenate([distance.agree for distance in distances]).mean())
            limit = self.max_kl if component == "artifact" else None
            figures += [
                _figure("kl", component, kl, samples, limit, limit is None or kl <= limit),
                _figure("top1_agreement", component, agreement, samples),
                _figure(
                    "max_abs_logit_difference", component, max(distance.greatest for distance in distances), samples
                ),
            ]
        return figures


def _figure(
    metric: str, component: str, value: float, samples: int, threshold: float | None = None, passed: bool = True
) -> Validation:
    # Six digits are exact enough, and keep manifests equal where results differ only in the last bits.
    return Validation(
        metric=metric,
        component=component,
        reference=None,
        value=float(f"{value:.6g}"),
        threshold=threshold,
        passed=passed,
        samples=samples,
    )
