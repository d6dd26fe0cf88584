"""Rounding the weight of a linear layer to 4 bits, so that the outputs of the layer change little.

With x a column of inputs, the squared error of the outputs of row w rounded to r is (r - w) H (r - w)^T, where H is the mean of
x x^T over the inputs: the *Hessian*. Everything here minimizes this error, or its part on the diagonal of H.

No function changes its arguments. Equal input gives equal bytes with the same libraries on the same kind of processor, if BLAS has
as many threads, since these share the sums of its products.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from manifests.errors import ConversionError

__all__ = [
    "Compensation",
    "Lattice",
    "channel_factors",
    "choose_lattice",
    "compensated_codes",
    "compensation",
    "nearest_codes",
    "output_error",
    "whole_range_lattice",
]

# Arrays of float32, unless said otherwise.
Floats = np.ndarray

_LEVELS = 15
_MIDDLE = 8
# The smallest positive number of float16 (rounded up), for groups of zeros and nearly zeros.
_LEAST_SCALE = np.float32(6e-8)
# Parts of a group's range that are tried, and rounds of least squares after that.
_SHARES, _ROUNDS = np.linspace(1.0, 0.6, 9, dtype=np.float32), 2
# Exponents that are tried for the factors of channels, and the number of rows that these are tried on.
_EXPONENTS, _TRIED_ROWS = np.linspace(0.0, 0.9, 10), 256
# Rows, and columns, that are rounded together: their values fit into the cache of a core.
_ROWS, _COLUMNS = 512, 128
# Number of values of a weight in a piece whose temporary arrays fit into the cache of a core.
_PIECE = 1 << 17
# The largest share of the mean diagonal that may be added to a Hessian, if it is not positive definite.
_MOST_DAMP = 10.0


@dataclass(frozen=True)
class Lattice:
    """The values that a weight may have: `(code - point) * scale` with codes from 0 to 15.

    Attributes:
        scales: [rows, groups], each a number that float16 can hold.
        points: [rows, groups], whole numbers from 0 to 15; 8 everywhere if the weight is symmetric.
        group: number of columns that share a scale.
    """

    scales: Floats
    points: Floats
    group: int

    def values(self, codes: Floats) -> Floats:
        """The values [rows, columns] that codes stand for."""
        grouped = codes.reshape(*self.scales.shape, self.group)
        found: Floats = ((grouped - self.points[..., None]) * self.scales[..., None]).reshape(codes.shape)
        return found


def choose_lattice(weight: Floats, importance: Floats, group: int, symmetric: bool) -> Lattice:
    """Choose scales and zero points of all groups by the error of the nearest values, weighted for each column.

    Several parts of a group's range are tried, since to clip a rare large value can be better than to spread the others; then
    the scale is fitted to the codes by least squares.

    Args:
        weight: [rows, columns], finite.
        importance: [columns], such as the diagonal of the Hessian.
        group: number of columns that share a scale; it divides the number of columns.
        symmetric: whether all zero points are 8.
    """
    parts = [_choose(weight[rows], importance, group, symmetric) for rows in _pieces(weight)]
    return Lattice(np.concatenate([scale for scale, _ in parts]), np.concatenate([point for _, point in parts]), group)


def _choose(weight: Floats, importance: Floats, group: int, symmetric: bool) -> tuple[Floats, Floats]:
    values = weight.reshape(len(weight), -1, group)
    weights = importance.reshape(1, -1, group)
    low, high = np.minimum(values.min(2), 0), np.maximum(values.max(2), 0)
    scales, points = _range_lattice(low, high, symmetric)
    _, least = _try(values, weights, scales, points)
    for share in _SHARES[1:]:
        _keep_better(values, weights, *_range_lattice(low * share, high * share, symmetric), scales, points, least)
    for _ in range(_ROUNDS):
        steps, _ = _try(values, weights, scales, points)
        fitted = (weights * values * steps).sum(2) / np.maximum((weights * steps * steps).sum(2), 1e-30)
        _keep_better(values, weights, _stored(fitted), points, scales, points, least)
    return scales, points


def whole_range_lattice(weight: Floats, group: int, symmetric: bool) -> Lattice:
    """Scales and zero points with which the nearest values cover the range of each group of a weight [rows, columns]."""
    values = weight.reshape(len(weight), -1, group)
    return Lattice(*_range_lattice(np.minimum(values.min(2), 0), np.maximum(values.max(2), 0), symmetric), group)


def _range_lattice(low: Floats, high: Floats, symmetric: bool) -> tuple[Floats, Floats]:
    if symmetric:
        scales = _stored(np.maximum(-low, high) / (_LEVELS / 2))
        return scales, np.full_like(scales, _MIDDLE)
    scales = _stored((high - low) / _LEVELS)
    return scales, np.clip(np.rint(-low / scales), 0, _LEVELS)


def _stored(scales: Floats) -> Floats:
    """The scales as float16 holds them; what is beyond its range becomes infinite, and is refused when it is written."""
    with np.errstate(over="ignore"):
        return np.maximum(scales, _LEAST_SCALE).astype(np.float16).astype(np.float32)


def _try(values: Floats, weights: Floats, scales: Floats, points: Floats) -> tuple[Floats, Floats]:
    """The nearest codes less the zero points, and the weighted error of each group."""
    point = points[..., None]
    steps = np.clip(np.rint(values / scales[..., None]), -point, _LEVELS - point)
    return steps, (weights * np.square(steps * scales[..., None] - values)).sum(2)


def _keep_better(
    values: Floats,
    weights: Floats,
    new_scales: Floats,
    new_points: Floats,
    scales: Floats,
    points: Floats,
    least: Floats,
) -> None:
    """Take over into `scales`, `points` and `least` the groups for which the new lattice is better."""
    _, error = _try(values, weights, new_scales, new_points)
    better = error < least
    np.copyto(scales, new_scales, where=better)
    np.copyto(points, new_points, where=better)
    np.copyto(least, error, where=better)


def nearest_codes(weight: Floats, lattice: Lattice) -> Floats:
    """The codes [rows, columns] of the values that are nearest to a weight's."""
    parts = [
        _try(
            weight[rows].reshape(-1, lattice.scales.shape[1], lattice.group),
            np.ones(1, np.float32),
            lattice.scales[rows],
            lattice.points[rows],
        )[0]
        + lattice.points[rows][..., None]
        for rows in _pieces(weight)
    ]
    return np.concatenate(parts).reshape(weight.shape)


@dataclass(frozen=True)
class Compensation:
    """How the error of each column is made up for by later columns; it depends on the inputs alone.

    Attributes:
        order: [columns], the order in which columns are rounded: those with the largest inputs come first.
        factor: [columns, columns] in that order, the upper triangular U with U^T U = H^-1.
    """

    order: np.ndarray
    factor: Floats


def compensation(hessian: Floats, damp: float, shrink: float = 0.0) -> Compensation:
    """Prepare GPTQ for all weights that share their inputs.

    Args:
        hessian: [columns, columns].
        damp: share of the mean diagonal that is added to the diagonal of the Hessian.
        shrink: share by which its values beside the diagonal are reduced, towards inputs without correlations (Ledoit and
            Wolf, 2004).

    Raises:
        ConversionError: if the Hessian is not finite.
    """
    order = np.argsort(-np.diag(hessian), kind="stable")
    return Compensation(order, _inverse_factor(hessian, order, damp, shrink))


def compensated_codes(weight: Floats, lattice: Lattice, inputs: Compensation) -> Floats:
    """Codes [rows, columns] by GPTQ (Frantar et al., 2022): the error of each column is made up for by later columns.

    Since scales and zero points are given, the columns need no order of their own.

    Args:
        weight: [rows, columns], finite.
        lattice: the values that the weight may have.
        inputs: what is known of the inputs.
    """
    groups = inputs.order // lattice.group
    codes = np.empty_like(weight)
    for first in range(0, len(weight), _ROWS):
        rows = slice(first, first + _ROWS)
        rest = np.ascontiguousarray(weight[rows][:, inputs.order].T)
        scales = np.ascontiguousarray(lattice.scales[rows].T)
        points = np.ascontiguousarray(lattice.points[rows].T)
        codes[rows, inputs.order] = _round(rest, inputs.factor, scales, points, groups).T
    return codes


def _round(rest: Floats, factor: Floats, scales: Floats, points: Floats, groups: np.ndarray) -> Floats:
    """Round a transposed weight [columns, rows], which is changed; see `compensated_codes`."""
    columns = len(rest)
    codes = np.empty_like(rest)
    for first in range(0, columns, _COLUMNS):
        last = min(first + _COLUMNS, columns)
        errors = np.empty((last - first, rest.shape[1]), np.float32)
        for column in range(first, last):
            scale, point = scales[groups[column]], points[groups[column]]
            codes[column] = np.clip(np.rint(rest[column] / scale) + point, 0, _LEVELS)
            error = (rest[column] - (codes[column] - point) * scale) / factor[column, column]
            errors[column - first] = error
            rest[column + 1 : last] -= factor[column, column + 1 : last, None] * error
        rest[last:] -= factor[first:last, last:].T @ errors
    return codes


def _inverse_factor(hessian: Floats, order: np.ndarray, damp: float, shrink: float) -> Floats:
    """The upper triangular U with U^T U = H^-1, of a Hessian in this order that is shrunk and made positive definite."""
    from scipy.linalg import lapack

    last_first = order[::-1]
    diagonal = np.diag(hessian)[order]
    mean = diagonal.mean(dtype=np.float64)
    if not np.isfinite(mean):
        raise ConversionError("the activations of a layer are not finite: use int4, which needs none")
    while damp <= _MOST_DAMP:
        # The lower factor L of the matrix in reverse order has H = J L L^T J, so U = J L^-1 J.
        turned = hessian.T[np.ix_(last_first, last_first)].T
        turned *= 1 - np.float32(shrink)
        np.fill_diagonal(turned, np.where(diagonal > 0, diagonal + damp * mean, max(mean, 1.0))[::-1])
        lower, failed = lapack.spotrf(turned, lower=1, clean=1, overwrite_a=1)
        if not failed:
            inverse, failed = lapack.strtri(lower, lower=1, overwrite_c=1)
        if not failed:
            return np.ascontiguousarray(inverse[::-1, ::-1])
        damp *= 10
    raise ConversionError("the Hessian of a layer cannot be inverted: use int4-awq")


def channel_factors(
    weights: Sequence[Floats], hessian: Floats, magnitudes: Floats, group: int, symmetric: bool
) -> Floats | None:
    """Factors [columns] by which the columns of weights are multiplied before they are rounded, and their inputs divided.

    As in AWQ (Lin et al., 2023), columns with large inputs get finer steps: the factors are a power of the inputs' magnitude,
    divided by a power of the weights'. The exponents are those with the smallest error of the outputs, on some of the rows.

    Args:
        weights: the weights [rows, columns] of all layers that share the inputs.
        hessian: [columns, columns].
        magnitudes: [columns], mean absolute values of the inputs.
        group: number of columns that share a scale.
        symmetric: whether all zero points are 8.

    Returns:
        The factors; None if none are better than 1.
    """
    magnitude = np.clip(magnitudes, 1e-6 * max(float(magnitudes.max()), 1e-6), None)
    total = sum(len(weight) for weight in weights)
    size = sum(np.abs(weight).sum(0, dtype=np.float64) for weight in weights) / total
    size = np.clip(size, 1e-6 * max(float(size.max()), 1e-6), None)
    step = max(1, total // _TRIED_ROWS)
    tried = np.concatenate([weight[::step] for weight in weights])
    best, least = None, _tried_error(tried, hessian, np.ones_like(magnitude), group, symmetric)
    for exponent in _EXPONENTS:
        factors = magnitude**exponent / size ** (1 - exponent)
        factors = np.clip(factors / np.sqrt(factors.max() * factors.min()), 1e-3, 1e3).astype(np.float32)
        error = _tried_error(tried, hessian, factors, group, symmetric)
        if error < least:
            best, least = factors, error
    return best


def _tried_error(weight: Floats, hessian: Floats, factors: Floats, group: int, symmetric: bool) -> float:
    scaled = weight * factors
    lattice = whole_range_lattice(scaled, group, symmetric)
    return output_error(lattice.values(nearest_codes(scaled, lattice)) / factors - weight, hessian)


def output_error(difference: Floats, hessian: Floats) -> float:
    """Mean squared error of a layer's outputs, added up over the rows, if its weight [rows, columns] changes by this."""
    return float(np.einsum("ij,ij->", difference @ hessian, difference, dtype=np.float64))


def _pieces(weight: Floats) -> Iterator[slice]:
    rows = max(1, _PIECE // weight.shape[1])
    for first in range(0, len(weight), rows):
        yield slice(first, first + rows)
