"""Bar charts of the benchmarks: one chart for each figure and each kind of prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from manifests.bench import BenchRow, Spread
from vlmconvert.report.variants import Variant

__all__ = ["Bar", "LatencyChart", "Pair", "latency_charts", "way_of_asking"]

_MEASURES = (
    ("vision encoder", "vision_ms", "ms"),
    ("first token", "first_token_ms", "ms"),
    ("each further token", "per_token_ms", "ms"),
    ("throughput", "tokens_per_s", "tokens/s"),
)


@dataclass(frozen=True)
class Bar:
    """A bar: the median, the lowest and the highest value, in percent of the chart's width."""

    width: float
    low: float
    high: float
    text: str
    title: str


@dataclass(frozen=True)
class Pair:
    """The bars of one variant and of its baseline in the same benchmark."""

    number: int
    label: str
    artifact: Bar
    baseline: Bar | None


@dataclass(frozen=True)
class LatencyChart:
    """The chart of one figure for one kind of prompt, with the bars of all variants."""

    measure: str
    higher_is_better: bool
    pairs: list[Pair]


def latency_charts(variants: Sequence[Variant]) -> dict[str, list[LatencyChart]]:
    """Make the charts, by kind of prompt, such as "one question, one image, 64 new tokens"."""
    found: dict[str, list[tuple[Variant, BenchRow, BenchRow | None]]] = {}
    for variant in variants:
        if variant.bench is None:
            continue
        baselines = {way_of_asking(row): row for row in variant.bench.baseline_rows or ()}
        for row in variant.bench.rows:
            way = way_of_asking(row)
            found.setdefault(way, []).append((variant, row, baselines.get(way)))
    return {
        way: [chart for measure in _MEASURES if (chart := _chart(*measure, rows)) is not None]
        for way, rows in found.items()
    }


def way_of_asking(row: BenchRow) -> str:
    """The kind of prompt that a row measured, as a heading."""
    questions = "one question" if row.batch == 1 else f"{row.batch} questions at once"
    images = {0: "text alone", 1: "one image"}.get(row.images, f"{row.images} images")
    return f"{questions}, {images}, {row.new_tokens} new tokens"


def _chart(
    measure: str, attribute: str, unit: str, rows: Sequence[tuple[Variant, BenchRow, BenchRow | None]]
) -> LatencyChart | None:
    most = max(getattr(row, attribute).high for _variant, *sides in rows for row in sides if row)
    if most <= 0:  # without an image, the vision encoder does not run
        return None

    def bar(row: BenchRow, name: str) -> Bar:
        spread: Spread = getattr(row, attribute)
        middle, low, high = spread.median, spread.low, spread.high
        return Bar(
            100 * middle / most,
            100 * low / most,
            100 * high / most,
            f"{middle:,.3g} {unit}" if middle < 1000 else f"{middle:,.0f} {unit}",
            f"{name}: median {middle:.4g} {unit}, {low:.4g} to {high:.4g}",
        )

    pairs = [
        Pair(
            variant.number,
            variant.precision,
            bar(row, variant.label),
            None if beside is None else bar(beside, beside.label),
        )
        for variant, row, beside in rows
    ]
    return LatencyChart(measure, attribute == "tokens_per_s", pairs)
