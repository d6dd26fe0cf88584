"""*validate-parity*: how far each component, and the whole, is from the checkpoint."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from manifests.model import Validation
from passes.base import Pass
from passes.validate.greedy import forced_logits, greedy
from passes.validate.protocol import Batch, Model

__all__ = ["ValidateParityPass", "kl_divergence"]


def kl_divergence(reference: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Kullback-Leibler divergence of `other` from `reference` in nats, both logits, over the last axis."""

    def log_softmax(logits: np.ndarray) -> np.ndarray:
        shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
        return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))

    p, q = log_softmax(reference), log_softmax(other)
    return np.maximum((np.exp(p) * (p - q)).sum(axis=-1), 0.0)


@dataclass(frozen=True)
class ValidateParityPass(Pass):
    """KL divergence, top-1 agreement and greatest logit difference along the checkpoint's own greedy answers.

    A component is measured with the checkpoint in place of the others: the language model on the checkpoint's keys and
    values, the vision encoder under the checkpoint's language model.

    Attributes:
        max_kl: limit of the mean KL of the whole artifact, in nats.
        steps: most tokens of an answer that are compared.
    """

    name = "validate-parity"

    max_kl: float = 1.0
    steps: int = 16

    def __call__(
        self,
        reference: Model,
        artifact: Model,
        batches: Iterable[Batch],
        ends: list[int],
        sides: tuple[str, str],
        step: Callable[[str], None] = lambda label: None,
    ) -> list[Validation]:
        """Measure all batches; `sides` are the names under which the vision side and the language model are recorded."""
        sums: dict[str, list[np.ndarray]] = {}
        greatest: dict[str, float] = {}
        agree: dict[str, list[np.ndarray]] = {}
        samples = 0
        for batch in batches:
            samples += len(batch.answers)
            expected = greedy(reference, batch.processed, ends, self.steps)
            reference_values = dict(reference.handed)
            whole = forced_logits(artifact, batch.processed, expected.tokens)
            artifact_values = dict(artifact.handed)
            measured = {
                sides[0]: forced_logits(reference, batch.processed, expected.tokens, artifact_values),
                sides[1]: forced_logits(artifact, batch.processed, expected.tokens, reference_values),
                "artifact": whole,
            }
            for component, logits in measured.items():
                sums.setdefault(component, []).append(kl_divergence(expected.logits, logits)[expected.valid])
                same = logits.argmax(axis=-1) == expected.tokens
                agree.setdefault(component, []).append(same[expected.valid])
                difference = float(np.abs(logits - expected.logits)[expected.valid].max())
                greatest[component] = max(greatest.get(component, 0.0), difference)
            step(f"{samples} samples")
        figures = []
        for component in sums:
            kl = float(np.concatenate(sums[component]).mean())
            limit = self.max_kl if component == "artifact" else None
            figures += [
                _figure("kl", component, kl, samples, limit, limit is None or kl <= limit),
                _figure("top1_agreement", component, float(np.concatenate(agree[component]).mean()), samples),
                _figure("max_abs_logit_difference", component, greatest[component], samples),
            ]
        return figures


def _figure(
    metric: str, component: str, value: float, samples: int, threshold: float | None = None, passed: bool = True
) -> Validation:
    # Six digits are more than the figures mean, and keep a manifest equal where the last bit is not.
    return Validation(
        metric=metric,
        component=component,
        reference=None,
        value=float(f"{value:.6g}"),
        threshold=threshold,
        passed=passed,
        samples=samples,
    )
