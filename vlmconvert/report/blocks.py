"""Data of the heat strips, which show the error of every block of a component."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vlmconvert.report.figures import format_error
from vlmconvert.report.variants import Variant

__all__ = ["HeatCell", "HeatRow", "HeatStrip", "heat_strips"]


@dataclass(frozen=True)
class HeatCell:
    """One block of a strip.

    Attributes:
        x: left edge, in percent of the strip's width.
        width: in percent of the strip's width.
        strength: strength of the colour, from 0 to 1.
        title: text of the tooltip.
    """

    x: float
    width: float
    strength: float
    title: str


@dataclass(frozen=True)
class HeatRow:
    """The blocks of one variant's component."""

    number: int
    label: str
    precision: str
    cells: list[HeatCell]
    worst: str
    worst_error: float


@dataclass(frozen=True)
class HeatStrip:
    """The heat strip of a component, with a row for each variant.

    Attributes:
        component: name of the component.
        first: name of the first block.
        last: name of the last block.
        most: largest relative error, which has the strongest colour.
        rows: one row for each variant.
    """

    component: str
    first: str
    last: str
    most: float
    rows: list[HeatRow]


def heat_strips(variants: Sequence[Variant]) -> list[HeatStrip]:
    """Make the strips of all components, with the blocks in the order of the evaluations."""
    evaluated = [(variant, variant.evaluation.blocks) for variant in variants if variant.evaluation is not None]
    strips = []
    for component in dict.fromkeys(item.component for _variant, blocks in evaluated for item in blocks):
        found = [
            (variant, {item.block: item for item in blocks if item.component == component})
            for variant, blocks in evaluated
        ]
        names = list(dict.fromkeys(name for _variant, blocks in found for name in blocks))
        most = max(item.relative_error for _variant, blocks in found for item in blocks.values())
        width = 100 / len(names)
        rows = []
        for variant, blocks in found:
            if not blocks:
                continue
            worst = max(blocks.values(), key=lambda item: item.relative_error)
            cells = [
                HeatCell(
                    index * width,
                    width,
                    blocks[name].relative_error / most if most else 0.0,
                    f"{name}: relative error {format_error(blocks[name].relative_error)}, "
                    f"cosine {blocks[name].cosine:.6f}",
                )
                for index, name in enumerate(names)
                if name in blocks
            ]
            precision = next((item.precision for item in variant.manifest.components if item.name == component), "")
            rows.append(HeatRow(variant.number, variant.label, precision, cells, worst.block, worst.relative_error))
        strips.append(HeatStrip(component, names[0], names[-1], most, rows))
    return strips
