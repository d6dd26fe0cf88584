"""*compress-int4-gptq*: 4-bit weights that make up for each other's rounding errors, by the activations that reach a block.

The layers of a block do not see each other's errors: each is rounded by the activations of the float model, so that blocks are
independent of each other. The graph is the one that NNCF makes for 4-bit weights, with other codes, scales and zero points.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from calibration.activations import read_activations
from manifests.errors import BadInputError
from passes.base import Effort
from passes.chain import openvino_compute
from passes.compat.nncf import adjusted_group_size
from passes.compress.rounding import (
    Floats,
    Lattice,
    channel_factors,
    choose_lattice,
    nearest_codes,
    round_with_hessian,
)
from passes.compress.weights import CompressInt4Pass
from passes.export.template import BlockSource

if TYPE_CHECKING:
    import openvino as ov

__all__ = ["CompressInt4GptqPass"]

# Share of the mean diagonal that is added to a Hessian, and share by which its values beside the diagonal are reduced: texts that
# were not seen have other correlations. More is added if there are fewer tokens than twice the channels.
_DAMP, _MORE_DAMP, _SHRINK = 0.05, 0.5, 0.1
# Least tokens for each channel, below which there is more damping, and below which only the diagonal is used.
_ENOUGH, _LEAST = 2.0, 0.5
# Maximum number of tokens by which a layer is rounded; those of each sample are taken at equal distances.
_TOKENS = 16_384
_TILE = 1024
# Tokens that the first token of a prompt counts for: it takes as much attention as many others (Xiao et al., "Efficient Streaming
# Language Models with Attention Sinks", 2023).
_FIRST = 16.0


@dataclass(frozen=True)
class _Layer:
    """A matrix product with a weight of the block.

    Attributes:
        tensor: in-memory name of the weight.
        product: the operation.
        group: number of columns of the weight that share a scale; 0 if the layer does not get 4 bit.
    """

    tensor: str
    product: ov.Node
    group: int


@dataclass(frozen=True)
class _Inputs:
    """What the inputs of a layer are on the calibration samples.

    Attributes:
        hessian: [channels, channels], mean of the products of two channels.
        magnitudes: [channels], mean absolute values.
        tokens: number of tokens that these are means of.
    """

    hessian: Floats
    magnitudes: Floats
    tokens: int


@dataclass(frozen=True)
class CompressInt4GptqPass(CompressInt4Pass):
    """4-bit weights with AWQ's factors where they fold into other weights, and GPTQ's codes for scales that are chosen before."""

    name = "compress-int4-gptq"
    version = 2

    def needs_activations(self, role: str) -> bool:
        return role != "embeddings" and self.in_4_bit(role)

    def joins_rows(self, role: str) -> bool:
        """See `CompressInt4Pass`: whether rows are compressed together, not whether they depend on each other."""
        return self.needs_activations(role)

    def scarce(self, tokens: int, channels: int) -> str | None:
        """See `TransformPass`."""
        if tokens >= _ENOUGH * channels:
            return None
        return (
            "rounded with more damping" if tokens >= _LEAST * channels else "rounded to the nearest codes, without GPTQ"
        )

    def effort(self, role: str) -> Effort | None:
        """See `TransformPass`; the Hessian of the widest layer is there several times while it is inverted."""
        return Effort(5.0, 60.0, 100_000_000) if self.needs_activations(role) else super().effort(role)

    def to_int4(self, source: BlockSource, awq: bool = False) -> ov.Model:
        """See `CompressInt4Pass`."""
        from threadpoolctl import threadpool_limits

        if not self.needs_activations(source.block.role):
            return super().to_int4(source)
        model = source.model()
        with threadpool_limits(1):  # sums of products depend on how many threads share them
            rounded = self._round(model, source)
        model = self.compressed_to_int4(model, source.layers)
        constants = {node.get_friendly_name(): node for node in model.get_ops() if node.get_type_name() == "Constant"}
        for tensor, (codes, lattice) in rounded.items():
            _store(constants, tensor, codes, lattice)
        return model

    def _round(self, model: ov.Model, source: BlockSource) -> dict[str, tuple[Floats, Lattice]]:
        """Codes and lattice of each layer in 4 bit; weights in the graph are scaled as the codes expect it."""
        layers = list(self._layers(model, source))
        by_input: dict[ov.Output, list[_Layer]] = {}
        for layer in layers:
            by_input.setdefault(layer.product.input_value(0), []).append(layer)
        shared = [group for group in by_input.values() if any(layer.group for layer in group)]
        inputs = _measure(model, source, [group[0].product.input_value(0) for group in shared])
        weights = {layer.tensor: np.array(_constant(layer.product).data) for layer in layers}
        factors: dict[str, Floats] = {}
        for group, measured in zip(shared, inputs, strict=True):
            found = self._scale(group, measured, layers, weights)
            if found is not None:
                factors.update({layer.tensor: found for layer in group})
        rounded = {}
        for group, measured in zip(shared, inputs, strict=True):
            for layer in group:
                if layer.group:
                    rounded[layer.tensor] = self._codes(
                        layer, measured, weights[layer.tensor], factors.get(layer.tensor)
                    )
        for layer in layers:
            _replace(_constant(layer.product), weights[layer.tensor])
        return rounded

    def _layers(self, model: ov.Model, source: BlockSource) -> Iterator[_Layer]:
        tensors = set(source.block.tensors.values())
        for node in model.get_ordered_ops():
            if node.get_type_name() != "MatMul" or (weight := _constant(node)).get_type_name() != "Constant":
                continue
            tensor = weight.get_friendly_name()
            if tensor in tensors and node.get_attributes()["transpose_b"] and len(weight.shape) == 2:
                columns = weight.shape[1]
                group = None if tensor in source.layers else adjusted_group_size(columns, self.group_size)
                yield _Layer(tensor, node, columns if group == -1 else group or 0)

    def _scale(
        self, group: Sequence[_Layer], inputs: _Inputs, layers: Sequence[_Layer], weights: dict[str, Floats]
    ) -> Floats | None:
        """Multiply the columns of the weights that share an input by factors, if the input can be divided by them.

        Returns:
            The factors; None if there are none.
        """
        value = group[0].product.input_value(0)
        readers = {target.get_node().get_friendly_name() for target in value.get_target_inputs()}
        if readers != {layer.product.get_friendly_name() for layer in group} or not all(layer.group for layer in group):
            return None
        divide = _divider(value, layers, weights)
        if divide is None:
            return None
        factors = channel_factors(
            [weights[layer.tensor] for layer in group], inputs.hessian, inputs.magnitudes, group[0].group
        )
        if factors is not None:
            divide(factors)
            for layer in group:
                weights[layer.tensor] *= factors
        return factors

    def _codes(self, layer: _Layer, inputs: _Inputs, weight: Floats, factors: Floats | None) -> tuple[Floats, Lattice]:
        hessian = inputs.hessian if factors is None else inputs.hessian / factors / factors[:, None]
        lattice = choose_lattice(weight, np.diag(hessian), layer.group, self.symmetric)
        channels = weight.shape[1]
        if inputs.tokens < _LEAST * channels:
            return nearest_codes(weight, lattice), lattice
        damp = _DAMP if inputs.tokens >= _ENOUGH * channels else _MORE_DAMP
        return round_with_hessian(weight, hessian, lattice, damp, _SHRINK), lattice


def _divider(value: ov.Output, layers: Sequence[_Layer], weights: dict[str, Floats]) -> Callable[[Floats], None] | None:
    """A function that divides the channels of a value by factors, by changing a weight that it is a product with.

    It is None if there is no such weight: a vector, as in a norm, or the rows of another layer, as in a gated MLP.
    """
    product = value.get_node()
    if product.get_type_name() != "Multiply":
        return None
    channels = value.get_partial_shape()[-1].get_length()
    for index in (0, 1):
        node = product.input_value(index).get_node()
        if len(node.output(0).get_target_inputs()) != 1:
            continue
        if node.get_type_name() == "Constant" and node.data.size == channels == node.shape[-1]:
            return partial(_divide, node)
        if own := [layer for layer in layers if layer.product.get_friendly_name() == node.get_friendly_name()]:
            return partial(_divide_rows, weights[own[0].tensor])
    return None


def _divide(constant: ov.Node, factors: Floats) -> None:
    _replace(constant, (constant.data / factors).astype(np.float32))


def _divide_rows(weight: Floats, factors: Floats) -> None:
    weight /= factors[:, None]


def _measure(model: ov.Model, source: BlockSource, values: Sequence[ov.Output]) -> list[_Inputs]:
    """Run the block on its samples, and sum up the products of channels of these values in it.

    Raises:
        BadInputError: if no sample reaches the block.
    """
    from openvino import opset13
    from scipy.linalg import blas

    if not source.activations:
        raise BadInputError(f"block {source.block.name}: no calibration sample reaches it: use int8")
    results = [opset13.result(value, name=f"input {number}") for number, value in enumerate(values)]
    model.add_results(results)
    compute = openvino_compute(model)
    sums: list[Floats | None] = [None] * len(values)
    magnitudes: list[Floats | float] = [0.0] * len(values)
    tokens = [0] * len(values)
    most = max(1, _TOKENS // len(source.activations))
    for sample in source.activations:
        found = compute(read_activations(sample))
        for number in range(len(values)):
            rows = found[f"input {number}"]
            rows = rows.reshape(-1, rows.shape[-1])
            chosen = np.linspace(0, len(rows) - 1, min(len(rows), most)).astype(np.intp)
            rows = rows[chosen]
            rows[0] *= np.float32(np.sqrt(_FIRST))
            before = sums[number]
            if before is None:
                before = np.zeros((rows.shape[1], rows.shape[1]), np.float32, order="F")
            sums[number] = blas.ssyrk(1.0, rows.T, beta=1.0, c=before, lower=1, overwrite_c=1)
            magnitudes[number] += np.abs(rows).sum(0)
            tokens[number] += len(rows)
    for result in results:
        model.remove_result(result)
    made = []
    for number, total in enumerate(sums):
        assert total is not None
        _mirror(total)
        total /= tokens[number]
        made.append(_Inputs(total.T, np.asarray(magnitudes[number], np.float32) / tokens[number], tokens[number]))
    return made


def _mirror(lower: Floats) -> None:
    """Copy the values below the diagonal of a matrix to their places above it."""
    for first in range(0, len(lower), _TILE):
        last = min(first + _TILE, len(lower))
        tile = np.tril(lower[first:last, first:last])
        lower[first:last, first:last] = tile + np.tril(tile, -1).T
        lower[first:last, last:] = lower[last:, first:last].T


def _constant(product: ov.Node) -> ov.Node:
    return product.input_value(1).get_node()


def _replace(constant: ov.Node, values: Floats) -> None:
    import openvino as ov

    new = ov.op.Constant(np.ascontiguousarray(values.reshape(constant.shape)), shared_memory=True)
    new.set_friendly_name(constant.get_friendly_name())
    constant.output(0).replace(new.output(0))


def _store(constants: Mapping[str, ov.Node], tensor: str, codes: Floats, lattice: Lattice) -> None:
    """Put codes, scales and zero points in the place of those that NNCF has found for a weight."""
    import openvino as ov

    def put(name: str, values: ov.Tensor) -> None:
        new = ov.op.Constant(values, shared_memory=False)
        new.set_friendly_name(name)
        constants[name].output(0).replace(new.output(0))

    old = constants[tensor]
    whole = codes.astype(np.uint8).ravel()
    if old.get_element_type() == ov.Type.i4:
        whole ^= 8  # codes less 8, in two's complement
    put(tensor, ov.Tensor(_packed(whole), old.shape, old.get_element_type()))
    scale = constants[f"{tensor}/scale"]
    put(scale.get_friendly_name(), ov.Tensor(lattice.scales.astype(np.float16).reshape(scale.shape)))
    if point := constants.get(f"{tensor}/zero_point"):
        points = _packed(lattice.points.astype(np.uint8).ravel())
        put(point.get_friendly_name(), ov.Tensor(points, point.shape, ov.Type.u4))


def _packed(codes: np.ndarray) -> np.ndarray:
    """Two codes in a byte, the first one in the lower half."""
    pairs = np.pad(codes, (0, codes.size % 2)).reshape(-1, 2)
    return pairs[:, 0] | pairs[:, 1] << 4
