"""Data of the chart of size against accuracy.

Positions are in percent of the chart's box, so that the chart fits any width while its text keeps its size.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from vlmconvert.console import format_size
from vlmconvert.report.figures import SHARES, format_figure
from vlmconvert.report.variants import Variant, Yardstick, checkpoint_size

__all__ = ["Label", "Mark", "Scatter", "Tick", "confidence", "pareto_front", "place_labels", "scatter", "ticks"]

# Labels are placed for a box of this size, in CSS pixels; in a wider box they are only further apart.
_WIDTH, _HEIGHT = 560, 300
_CHARACTER = 6.6  # width of a character in CSS pixels


@dataclass(frozen=True)
class Tick:
    """A grid line and its label."""

    at: float
    text: str


@dataclass(frozen=True)
class Label:
    """Position of a label: its offset from its point in pixels, and the SVG text anchor."""

    dx: float
    dy: float
    anchor: str

    def box(self, x: float, y: float, length: float) -> tuple[float, float, float, float]:
        """Left, top, right and bottom of the label of the point (x, y), for a text that is `length` pixels wide."""
        left = x + self.dx - {"start": 0.0, "middle": length / 2, "end": length}[self.anchor]
        return left, y + self.dy - 11, left + length, y + self.dy + 4


@dataclass(frozen=True)
class Mark:
    """A point of the chart; `low` and `high` are the ends of its 95 % interval."""

    x: float
    y: float
    low: float
    high: float
    number: str
    text: str
    title: str
    on_front: bool
    label: Label


@dataclass(frozen=True)
class Scatter:
    """The whole chart; `front` has the Pareto front as horizontal and vertical lines (x1, y1, x2, y2)."""

    x_ticks: list[Tick]
    y_ticks: list[Tick]
    marks: list[Mark]
    checkpoints: list[Mark]
    front: list[tuple[float, float, float, float]]
    intervals: bool


def pareto_front(points: Sequence[tuple[float, float]]) -> list[int]:
    """Indices of the points (size, score) on the Pareto front, by increasing size.

    A point is on the front if no other point is at least as small and at least as accurate, and better in one of the
    two.
    """
    front: list[int] = []
    for index in sorted(range(len(points)), key=lambda index: (points[index][0], -points[index][1])):
        if not front or points[index][1] > points[front[-1]][1] or points[index] == points[front[-1]]:
            front.append(index)
    return front


def ticks(low: float, high: float, most: int = 6) -> list[float]:
    """Round values for an axis that covers `low` to `high`.

    Args:
        low: smallest value on the axis.
        high: largest value on the axis.
        most: maximum number of values; they are 1, 2 or 5 times a power of ten apart.
    """
    span = (high - low) or abs(high) or 1.0
    power = math.floor(math.log10(span / most))
    for step in (factor * 10.0**exponent for exponent in (power, power + 1) for factor in (1, 2, 5)):
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
        if max(last - first, 1) < most:
            break
    return [round(index * step, 12) for index in range(first, max(last, first + 1) + 1)]


def confidence(value: float, samples: int) -> tuple[float, float]:
    """The 95 % Wilson interval of a share; for a mean of scores between 0 and 1, the interval is wider than needed."""
    z = 1.96
    scale = 1 + z * z / samples
    centre = (value + z * z / (2 * samples)) / scale
    half = z / scale * math.sqrt(value * (1 - value) / samples + z * z / (4 * samples * samples))
    return max(0.0, centre - half), min(1.0, centre + half)


def scatter(variants: Sequence[Variant], yardstick: Yardstick) -> Scatter:
    """Make the chart of the variants that were measured on a yardstick, and of their checkpoints."""
    chosen = [(variant, item) for variant in variants if (item := variant.accuracy(yardstick)) is not None]
    checkpoints = list(
        dict.fromkeys(
            (variant.manifest.source.model, checkpoint_size(variant.manifest.source), item.reference)
            for variant, item in chosen
            if item.reference is not None
        )
    )
    points = [(float(variant.size), item.value) for variant, item in chosen]
    references = [(float(size), score) for _model, size, score in checkpoints]
    shares = (metric := yardstick.metric) in SHARES
    intervals = [
        confidence(item.value, item.samples) if shares else (item.value, item.value) for _variant, item in chosen
    ]
    ends = [end for interval in intervals for end in interval] + [score for _size, score in references]
    sizes = ticks(0, max(size for size, _score in points + references))
    scores = ticks(min(ends), max(ends))

    def x(size: float) -> float:
        return 100 * size / sizes[-1]

    def y(score: float) -> float:
        return 100 * (scores[-1] - score) / (scores[-1] - scores[0])

    front = pareto_front(points)
    stairs: list[tuple[float, float, float, float]] = []
    for before, after in itertools.pairwise(front):
        (x1, y1), (x2, y2) = ((x(points[index][0]), y(points[index][1])) for index in (before, after))
        stairs += [(x1, y1, x2, y1), (x2, y2, x2, y1)]
    names = ["checkpoint" if len(checkpoints) == 1 else model for model, _size, _score in checkpoints]
    labels = place_labels(
        [(x(size), y(score)) for size, score in points + references],
        [f"{variant.number} {variant.precision}" for variant, _item in chosen] + names,
        stairs,
    )
    return Scatter(
        [Tick(x(value), format_size(value) if value else "0") for value in sizes],
        [Tick(y(value), _tick_text(value, scores[1] - scores[0], shares)) for value in scores],
        [
            Mark(
                x(variant.size),
                y(item.value),
                y(low),
                y(high),
                str(variant.number),
                variant.precision,
                f"{variant.label}: {format_size(variant.size)}, {format_figure(item.value, metric)}"
                + (f", 95 % interval {format_figure(low, metric)} to {format_figure(high, metric)}" if shares else ""),
                index in front,
                label,
            )
            for index, ((variant, item), (low, high), label) in enumerate(zip(chosen, intervals, labels, strict=False))
        ],
        [
            Mark(
                x(size),
                y(score),
                y(score),
                y(score),
                "",
                name,
                f"checkpoint {model}: {format_size(size)}, {format_figure(score, metric)}",
                False,
                label,
            )
            for (model, size, score), name, label in zip(checkpoints, names, labels[len(chosen) :], strict=True)
        ],
        stairs,
        shares,
    )


def _tick_text(value: float, step: float, shares: bool) -> str:
    if not shares:
        return f"{value:.4g}"
    digits = max(0, -math.floor(math.log10(100 * step) + 1e-9))
    return f"{100 * value:.{digits}f} %"


def place_labels(
    points: Sequence[tuple[float, float]], texts: Sequence[str], lines: Sequence[tuple[float, float, float, float]]
) -> list[Label]:
    """Place the label of each point where it covers no point, no line and no other label.

    Args:
        points: positions in percent of the box.
        texts: texts of the labels.
        lines: horizontal and vertical lines (x1, y1, x2, y2), in percent of the box.
    """
    dots = [(x * _WIDTH / 100, y * _HEIGHT / 100) for x, y in points]
    taken = [(x - 6, y - 6, x + 6, y + 6) for x, y in dots]
    taken += [
        (x1 * _WIDTH / 100 - 1, y1 * _HEIGHT / 100 - 1, x2 * _WIDTH / 100 + 1, y2 * _HEIGHT / 100 + 1)
        for x1, y1, x2, y2 in lines
    ]
    candidates = [Label(-11, 4, "end"), Label(11, 4, "start"), Label(0, -12, "middle"), Label(0, 22, "middle")] + [
        Label(side * 8, dy, "start" if side > 0 else "end") for dy in (-14, 24, -29, 39) for side in (1, -1)
    ]

    def is_free(box: tuple[float, float, float, float]) -> bool:
        left, top, right, bottom = box
        inside = left >= 0 and right <= _WIDTH and top >= 0 and bottom <= _HEIGHT
        return inside and all(
            right <= start or left >= end or bottom <= high or top >= low for start, high, end, low in taken
        )

    labels = []
    for (x, y), text in zip(dots, texts, strict=True):
        length = _CHARACTER * len(text)
        label = next((label for label in candidates if is_free(label.box(x, y, length))), candidates[0])
        taken.append(label.box(x, y, length))
        labels.append(label)
    return labels
