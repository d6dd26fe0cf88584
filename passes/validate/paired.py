"""Statistical tests of whether two models differ on the same samples by more than chance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import count
from math import comb

import numpy as np

__all__ = ["SIGNIFICANT", "PairedTest", "compare_paired", "fewest_lost", "mcnemar_exact", "paired_bootstrap"]

SIGNIFICANT = 0.05
_RESAMPLES = 10_000
# Standard errors of a mean beyond which a two-sided test finds it different from zero.
_TWO_SIDED = 1.96
_CHUNK = 4_000_000  # values that a resampling step holds at once


@dataclass(frozen=True)
class PairedTest:
    """The outcome of a two-sided test of equal means.

    Attributes:
        method: the test's name.
        samples: number of pairs of scores.
        lost: number of samples whose score fell.
        gained: number of samples whose score rose.
        drop: mean score before minus mean score after, in the scores' unit.
        p_value: probability of a difference at least as large if the means were equal.
        smallest_drop: smallest drop that is larger than chance with so many samples: if no score rises or, for a bootstrap,
            with differences that vary as much as these; in the scores' unit.
    """

    method: str
    samples: int
    lost: int
    gained: int
    drop: float
    p_value: float
    smallest_drop: float

    @property
    def larger_than_chance(self) -> bool:
        """Whether the mean fell, by more than chance explains."""
        return self.drop > 0 and self.p_value < SIGNIFICANT


def compare_paired(before: Sequence[float], after: Sequence[float]) -> PairedTest:
    """Test whether two models' scores of the same samples have equal means.

    The test is McNemar's exact test if all scores are 0 or 1, otherwise a paired bootstrap.

    Raises:
        ValueError: if the lists are empty or have different lengths.
    """
    first, second = np.asarray(before, np.float64), np.asarray(after, np.float64)
    if first.shape != second.shape or not first.size:
        raise ValueError(f"{first.size} scores before and {second.size} after are no pairs")
    lost, gained = int((second < first).sum()), int((second > first).sum())
    drop = float((first - second).mean())
    if np.isin(first, (0, 1)).all() and np.isin(second, (0, 1)).all():
        smallest = min(1.0, fewest_lost() / first.size)
        return PairedTest("McNemar's exact test", first.size, lost, gained, drop, mcnemar_exact(lost, gained), smallest)
    differences = first - second
    smallest = _TWO_SIDED * float(differences.std()) / math.sqrt(first.size)
    return PairedTest("paired bootstrap", first.size, lost, gained, drop, paired_bootstrap(differences), smallest)


def fewest_lost() -> int:
    """Number of scores that must fall from 1 to 0, if none rises, for a drop that is larger than chance."""
    return next(lost for lost in count(1) if mcnemar_exact(lost, 0) < SIGNIFICANT)


def mcnemar_exact(lost: int, gained: int) -> float:
    """Two-sided p-value of McNemar's exact test (McNemar 1947, in its binomial form).

    Only pairs that differ count. If chance alone changed them, a score would fall as often as rise: a fair coin.

    Args:
        lost: number of samples whose score fell from 1 to 0.
        gained: number of samples whose score rose from 0 to 1.
    """
    changed = lost + gained
    tail: int = sum(comb(changed, count) for count in range(min(lost, gained) + 1))
    return float(min(1.0, 2 * tail / 2**changed))


def paired_bootstrap(differences: np.ndarray, seed: int = 0) -> float:
    """Two-sided p-value of a mean difference of zero, by 10 000 seeded resamples of the pairs.

    It is twice the share of resampled means on the other side of zero (Efron and Tibshirani 1993), with one added to both
    counts so that it is never 0 (Davison and Hinkley 1997).

    Args:
        differences: [samples], the difference of the scores of each pair.
        seed: seed of the resampling.
    """
    random = np.random.default_rng(seed)
    at_most, at_least = 0, 0
    rows = max(1, _CHUNK // differences.size)
    for start in range(0, _RESAMPLES, rows):
        count = min(rows, _RESAMPLES - start)
        means = differences[random.integers(0, differences.size, (count, differences.size))].mean(axis=1)
        at_most += int((means <= 0).sum())
        at_least += int((means >= 0).sum())
    return float(min(1.0, 2 * (min(at_most, at_least) + 1) / (_RESAMPLES + 1)))
