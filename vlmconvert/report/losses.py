"""Data of the chart of size against KL divergence: what artifacts lose, and what other sizes were expected to lose.

Positions are in percent of the chart's box; divergences are on a logarithmic axis.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from vlmconvert.console import format_size
from vlmconvert.report.scatter import Mark, Tick, pareto_front, place_labels, ticks
from vlmconvert.report.variants import Variant, Yardstick

__all__ = ["LossChart", "loss_chart"]


@dataclass(frozen=True)
class LossChart:
    """The whole chart; `curves` has the lines (x1, y1, x2, y2) of what was expected of other sizes."""

    x_ticks: list[Tick]
    y_ticks: list[Tick]
    marks: list[Mark]
    curves: list[tuple[float, float, float, float]]


def loss_chart(variants: Sequence[Variant], yardstick: Yardstick | None) -> LossChart | None:
    """Make the chart of all artifacts whose KL divergence was measured; None if fewer than two points are known."""
    points = [(variant, kl) for variant in variants if (kl := variant.kl(yardstick)) is not None and kl > 0]
    budgets = [budget for variant in variants if (budget := variant.manifest.size_budget) is not None]
    curves = [[(point.size, point.kl) for point in budget.curve if point.kl > 0] for budget in budgets]
    every = [(variant.size, kl) for variant, kl in points] + [point for curve in curves for point in curve]
    # Below the least that was measured, the expected losses only approach zero.
    floor = min((kl for _, kl in points), default=0.0) / 10
    every = [point for point in every if point[1] >= floor]
    if len(every) < 2:
        return None
    sizes = ticks(0, max(size for size, _ in every))
    low, high = (math.floor(math.log10(min(kl for _, kl in every))), math.ceil(math.log10(max(kl for _, kl in every))))
    high = max(high, low + 1)

    def x(size: float) -> float:
        return 100 * size / sizes[-1]

    def y(kl: float) -> float:
        return 100 * (high - math.log10(kl)) / (high - low)

    lines = [
        (x(one[0]), y(one[1]), x(other[0]), y(other[1]))
        for curve in curves
        for one, other in pairwise([point for point in curve if point[1] >= floor])
    ]
    front = pareto_front([(variant.size, -kl) for variant, kl in points])
    places = [(x(variant.size), y(kl)) for variant, kl in points]
    labels = place_labels(places, [f"{variant.number} {variant.precision}" for variant, _ in points], [])
    marks = [
        Mark(
            *place,
            place[1],
            place[1],
            str(variant.number),
            variant.precision,
            f"{variant.label}: {format_size(variant.size)}, {kl:.2g} nats",
            index in front,
            label,
        )
        for index, ((variant, kl), place, label) in enumerate(zip(points, places, labels, strict=True))
    ]
    return LossChart(
        [Tick(x(size), format_size(size) if size else "0") for size in sizes],
        [Tick(y(10.0**power), f"{10.0**power:g}") for power in range(low, high + 1)],
        marks,
        lines,
    )
