"""Rounding to 4 bits beside what it is defined by: all candidates, and GPTQ column by column in float64."""

from __future__ import annotations

import numpy as np
import pytest

from manifests.errors import ConversionError
from passes.compress.rounding import (
    Lattice,
    channel_factors,
    choose_lattice,
    compensated_codes,
    compensation,
    nearest_codes,
    output_error,
)

ROWS, COLUMNS, GROUP = 70, 256, 32


@pytest.fixture(scope="module")
def random():
    return np.random.default_rng(0)


@pytest.fixture(scope="module")
def weight(random):
    weight = random.standard_t(5, (ROWS, COLUMNS)).astype(np.float32) * 0.05
    weight[3] = 0
    weight[4, :GROUP] = 1e-7
    return weight


@pytest.fixture(scope="module")
def inputs(random):
    """Correlated inputs [tokens, channels], some channels of which are large and one is always 0."""
    mixed = random.normal(size=(4 * COLUMNS, 40)) @ random.normal(size=(40, COLUMNS))
    inputs = mixed + random.normal(size=mixed.shape)
    inputs *= random.lognormal(0, 1, COLUMNS)
    inputs[:, 7] = 0
    return inputs.astype(np.float32)


@pytest.fixture(scope="module")
def hessian(inputs):
    return (inputs.T @ inputs / len(inputs)).astype(np.float32)


def rounded(weight, hessian, lattice, *damp):
    return compensated_codes(weight, lattice, compensation(hessian, *damp))


def group_errors(weight, importance, lattice):
    difference = lattice.values(nearest_codes(weight, lattice)) - weight
    return (importance * difference**2).reshape(ROWS, -1, GROUP).sum(2)


@pytest.mark.parametrize("symmetric", [False, True])
def test_a_lattice_is_what_a_file_can_hold(weight, hessian, symmetric):
    lattice = choose_lattice(weight, np.diag(hessian), GROUP, symmetric)
    assert lattice.scales.shape == lattice.points.shape == (ROWS, COLUMNS // GROUP)
    assert (lattice.scales.astype(np.float16) == lattice.scales).all()
    assert (lattice.scales > 0).all()
    assert set(np.unique(lattice.points)) <= ({8.0} if symmetric else set(range(16)))


@pytest.mark.parametrize("symmetric", [False, True])
def test_no_group_is_worse_than_with_its_whole_range(weight, hessian, symmetric):
    importance = np.diag(hessian)
    found = group_errors(weight, importance, choose_lattice(weight, importance, GROUP, symmetric))
    values = weight.reshape(ROWS, -1, GROUP)
    low, high = np.minimum(values.min(2), 0), np.maximum(values.max(2), 0)
    if symmetric:
        scales = np.maximum(np.maximum(-low, high) / 7.5, 6e-8).astype(np.float16).astype(np.float32)
        points = np.full_like(scales, 8)
    else:
        scales = np.maximum((high - low) / 15, 6e-8).astype(np.float16).astype(np.float32)
        points = np.clip(np.rint(-low / scales), 0, 15)
    whole = group_errors(weight, importance, Lattice(scales, points, GROUP))
    assert (found <= whole * (1 + 1e-5) + 1e-12).all()
    assert found.sum() < 0.95 * whole.sum()


def test_nearest_codes_are_the_nearest_of_all(weight, hessian):
    lattice = choose_lattice(weight, np.diag(hessian), GROUP, False)
    codes = nearest_codes(weight, lattice)
    every = np.stack([lattice.values(np.full_like(weight, code)) for code in range(16)])
    least = np.abs(every - weight).min(0)
    np.testing.assert_allclose(np.abs(lattice.values(codes) - weight), least, rtol=1e-4, atol=1e-7)


def gptq(weight, hessian, lattice, damp):
    """Column by column in float64, as it is defined: the inverse of the Hessian of the columns that are left."""
    order = np.argsort(-np.diag(hessian), kind="stable")
    hessian = hessian.astype(np.float64)
    diagonal = np.diag(hessian)
    hessian = hessian + np.diag(np.where(diagonal > 0, damp * diagonal.mean(), max(diagonal.mean(), 1)))
    weight, codes = weight.astype(np.float64).copy(), np.zeros(weight.shape)
    for position, column in enumerate(order):
        group = column // lattice.group
        scale, point = lattice.scales[:, group].astype(np.float64), lattice.points[:, group]
        codes[:, column] = np.clip(np.rint(weight[:, column] / scale) + point, 0, 15)
        left = order[position:]
        inverse = np.linalg.inv(hessian[np.ix_(left, left)])
        error = (weight[:, column] - (codes[:, column] - point) * scale) / inverse[0, 0]
        weight[:, left] -= np.outer(error, inverse[0])
    return codes


@pytest.mark.parametrize("symmetric", [False, True])
def test_codes_are_those_of_gptq(weight, hessian, symmetric):
    lattice = choose_lattice(weight, np.diag(hessian), GROUP, symmetric)
    found, expected = rounded(weight, hessian, lattice, 0.01), gptq(weight, hessian, lattice, 0.01)
    assert (found == expected).mean() > 0.995  # a near-tie moves what comes after it
    errors = [output_error(lattice.values(np.float32(codes)) - weight, hessian) for codes in (found, expected)]
    assert errors[0] == pytest.approx(errors[1], rel=0.01)
    assert errors[0] < 0.6 * output_error(lattice.values(nearest_codes(weight, lattice)) - weight, hessian)


def test_without_correlations_there_is_nothing_to_make_up_for(weight, hessian):
    diagonal = np.diag(np.diag(hessian))
    lattice = choose_lattice(weight, np.diag(hessian), GROUP, False)
    assert (rounded(weight, diagonal, lattice, 0.01) == nearest_codes(weight, lattice)).all()


def test_a_hessian_is_shrunk_towards_its_diagonal(weight, hessian):
    lattice = choose_lattice(weight, np.diag(hessian), GROUP, False)
    diagonal = np.diag(np.diag(hessian))
    found = rounded(weight, hessian, lattice, 0.01, 0.3)
    assert (found == rounded(weight, 0.7 * hessian + 0.3 * diagonal, lattice, 0.01)).mean() > 0.995
    assert (found != rounded(weight, hessian, lattice, 0.01)).any()
    assert (rounded(weight, hessian, lattice, 0.01, 1.0) == nearest_codes(weight, lattice)).all()


def test_too_few_tokens_are_no_obstacle(weight, inputs):
    few = inputs[:5]
    hessian = few.T @ few / len(few)
    lattice = choose_lattice(weight, np.diag(hessian), GROUP, False)
    codes = rounded(weight, hessian, lattice, 0.01)
    assert output_error(lattice.values(codes) - weight, hessian) < 0.1 * output_error(
        lattice.values(nearest_codes(weight, lattice)) - weight, hessian
    )


def test_what_is_not_finite_is_said(weight, hessian):
    lattice = choose_lattice(weight, np.diag(hessian), GROUP, False)
    broken = hessian.copy()
    broken[0, 0] = np.nan
    with pytest.raises(ConversionError, match="not finite"):
        rounded(weight, broken, lattice, 0.01)


def test_factors_help_where_few_channels_are_large(weight, random):
    inputs = random.normal(size=(512, COLUMNS)).astype(np.float32)
    inputs[:, ::GROUP] *= 30
    hessian, magnitudes = inputs.T @ inputs / len(inputs), np.abs(inputs).mean(0)
    factors = channel_factors([weight[:40], weight[40:]], hessian, magnitudes, GROUP, False)
    assert factors is not None
    assert factors[::GROUP].min() > factors[1::GROUP].max()

    def error(factors):
        lattice = choose_lattice(weight * factors, np.diag(hessian) / factors**2, GROUP, False)
        return output_error(lattice.values(nearest_codes(weight * factors, lattice)) / factors - weight, hessian)

    assert error(factors) < 0.5 * error(np.ones(COLUMNS, np.float32))


def test_no_factors_if_none_are_better(hessian):
    whole = np.tile(np.arange(16, dtype=np.float32), (4, COLUMNS // 16))  # is on the lattice already
    assert channel_factors([whole], hessian, np.ones(COLUMNS, np.float32), GROUP, False) is None
