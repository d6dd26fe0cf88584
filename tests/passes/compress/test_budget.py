"""Choosing formats for a size, beside all choices that there are."""

from __future__ import annotations

from itertools import pairwise, product

import numpy as np
import pytest

from passes.compress.budget import Cost, choose_formats, size_curve

FORMATS = ("small", "middle", "large")


@pytest.fixture(scope="module")
def layers():
    random = np.random.default_rng(3)
    made = {}
    for number in range(7):
        weights, loss = random.integers(1, 9), random.lognormal()
        losses = sorted(random.random(3), reverse=True)
        made[f"layer {number}"] = {
            name: Cost(float(weights * size), float(loss * part))
            for name, size, part in zip(FORMATS, (4, 5, 8), losses, strict=True)
        }
    return made


def total(layers, chosen):
    costs = [layers[layer][name] for layer, name in chosen.items()]
    return sum(cost.size for cost in costs), sum(cost.kl for cost in costs)


def best(layers, limit):
    choices = (dict(zip(layers, names, strict=True)) for names in product(FORMATS, repeat=len(layers)))
    return min(kl for size, kl in (total(layers, chosen) for chosen in choices) if size <= limit)


def test_a_choice_fits_and_is_nearly_the_best_of_all(layers):
    least, most = (sum(layer[name].size for layer in layers.values()) for name in (FORMATS[0], FORMATS[-1]))
    whole = total(layers, dict.fromkeys(layers, "small"))[1]
    for limit in np.linspace(least, most, 23):
        size, kl = total(layers, choose_formats(layers, limit))
        assert size <= limit
        assert best(layers, limit) <= kl <= best(layers, limit) + 0.06 * whole


def test_a_size_below_the_smallest_choice_has_none(layers):
    least = sum(layer["small"].size for layer in layers.values())
    assert choose_formats(layers, least - 1) is None
    assert set(choose_formats(layers, least).values()) == {"small"}


def test_no_format_is_chosen_that_is_larger_and_worse():
    layers = {"one": {"small": Cost(4, 0.1), "middle": Cost(5, 0.2), "large": Cost(8, 0.0)}}
    assert choose_formats(layers, 7) == {"one": "small"}
    assert choose_formats(layers, 8) == {"one": "large"}


def test_each_point_of_the_curve_is_what_its_size_is_chosen_for(layers):
    curve = size_curve(layers, 10)
    assert 3 <= len(curve) <= 11
    assert all(one.size < other.size and one.kl > other.kl for one, other in pairwise(curve))
    for point in curve:
        size, kl = total(layers, choose_formats(layers, point.size + 1e-6))
        assert (size, kl) == (pytest.approx(point.size), pytest.approx(point.kl))
