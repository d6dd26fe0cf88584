"""The error of every block, as one strip for each component and variant."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vlmconvert.report.figures import format_error
from vlmconvert.report.variants import Variant

__all__ = ["HeatCell", "HeatRow", "HeatStrip", "heat_strips"]


@dataclass(frozen=True)
class HeatCell:
    """One block: its place and width in percent of the strip, and its colour's strength from 0 to 1."""

    x: float
    width: float
    strength: float
    title: str


@dataclass(frozen=True)
class HeatRow:
    """One variant's blocks of a component."""

    number: int
    label: str
    precision: str
    cells: list[HeatCell]
    worst: str
    worst_error: float


@dataclass(frozen=True)
class HeatStrip:
    """A component, with a row for each variant; `most` is the relative error of the strongest colour."""

    component: str
    first: str
    last: str
    most: float
    rows: list[HeatRow]


def heat_strips(variants: Sequence[Variant]) -> list[HeatStrip]:
    """The strips of all components, blocks in the order of the evaluations."""
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
