"""Choosing the format of each layer so that a model of a given size loses as little as possible.

What layers lose is taken to add up, so the best choice for each of many sizes is found by one rule: of all steps to a larger
format, the one that gains most for each byte comes first (Everett, 1963).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

__all__ = ["Cost", "choose_formats", "size_curve"]


@dataclass(frozen=True)
class Cost:
    """What a format of a layer costs: bytes, and KL divergence in nats."""

    size: float
    kl: float


@dataclass(frozen=True)
class _Step:
    """A step to a larger format of a layer: what it gains for each byte, and the bytes that it takes."""

    gain: float
    size: float
    layer: str
    to: str


def choose_formats(layers: Mapping[str, Mapping[str, Cost]], limit: float) -> dict[str, str] | None:
    """Layer -> the format with which all layers together have at most `limit` bytes; None if no choice is small enough.

    Args:
        layers: layer -> format -> what it costs.
        limit: maximum number of bytes of all layers.
    """
    chosen = _smallest(layers)
    left = limit - _size(layers, chosen)
    if left < 0:
        return None
    stopped: set[str] = set()
    for step in _steps(layers):
        if step.layer in stopped:
            continue
        if step.size > left:
            stopped.add(step.layer)  # its further steps begin where this one ends
        else:
            chosen[step.layer] = step.to
            left -= step.size
    return chosen


def size_curve(layers: Mapping[str, Mapping[str, Cost]], points: int) -> list[Cost]:
    """Size and KL divergence of the best choices, from the smallest to the one in which no layer can be better.

    Args:
        layers: layer -> format -> what it costs.
        points: maximum number of points, which are at about equal distances.
    """
    chosen = _smallest(layers)
    size = _size(layers, chosen)
    kl = sum(layers[layer][chosen[layer]].kl for layer in layers)
    made = [Cost(size, kl)]
    for step in _steps(layers):
        size += step.size
        kl -= step.gain * step.size
        made.append(Cost(size, max(kl, 0.0)))
    distance = (made[-1].size - made[0].size) / max(1, points - 1)
    kept = [made[0]]
    for point in made[1:-1]:
        if point.size >= kept[-1].size + distance:
            kept.append(point)
    return kept + made[-1:] if len(made) > 1 else kept


def _steps(layers: Mapping[str, Mapping[str, Cost]]) -> list[_Step]:
    """The steps of all layers, those that gain most for each byte first."""
    found = [step for layer, formats in layers.items() for step in _steps_of(layer, formats)]
    return sorted(found, key=lambda step: -step.gain)


def _steps_of(layer: str, formats: Mapping[str, Cost]) -> Iterator[_Step]:
    for before, after in pairwise(_hull(formats)):
        size = formats[after].size - formats[before].size
        yield _Step((formats[before].kl - formats[after].kl) / size, size, layer, after)


def _hull(formats: Mapping[str, Cost]) -> Sequence[str]:
    """The formats on the lower convex hull of size and loss, by increasing size."""
    hull: list[str] = []
    for name in sorted(formats, key=lambda name: (formats[name].size, formats[name].kl)):
        new = formats[name]
        if hull and new.kl >= formats[hull[-1]].kl:
            continue
        while len(hull) > 1 and _slope(formats[hull[-2]], new) <= _slope(formats[hull[-2]], formats[hull[-1]]):
            hull.pop()
        hull.append(name)
    return hull


def _slope(one: Cost, other: Cost) -> float:
    return (other.kl - one.kl) / (other.size - one.size)


def _smallest(layers: Mapping[str, Mapping[str, Cost]]) -> dict[str, str]:
    return {layer: _hull(formats)[0] for layer, formats in layers.items()}


def _size(layers: Mapping[str, Mapping[str, Cost]], chosen: Mapping[str, str]) -> float:
    return sum(layers[layer][name].size for layer, name in chosen.items())
