"""*compress-int4-gptq*: 4-bit weights that make up for each other's rounding errors, by the activations that reach a block.

The layers of a block do not see each other's errors: each is rounded by the activations of the float model, so that blocks are
independent of each other. The graph is the one that NNCF makes for 4-bit weights, with other codes, scales and zero points.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from passes.base import Effort
from passes.compat.nncf import adjusted_group_size
from passes.compress.layers import (
    LayerInputs,
    LinearLayer,
    by_input,
    linear_layers,
    measure_inputs,
    replace_weight,
    weight_of,
)
from passes.compress.rounding import (
    Floats,
    Lattice,
    channel_factors,
    choose_lattice,
    compensated_codes,
    compensation,
    nearest_codes,
)
from passes.compress.weights import CompressInt4Pass
from passes.export.template import BlockSource
from passes.formats import FLOAT, GROUPS, INT8

if TYPE_CHECKING:
    import openvino as ov

__all__ = ["CompressInt4GptqPass", "rounding"]

# Share of the mean diagonal that is added to a Hessian, and share by which its values beside the diagonal are reduced: texts that
# were not seen have other correlations. More is added if there are fewer tokens than twice the channels.
_DAMP, _MORE_DAMP, _SHRINK = 0.05, 0.5, 0.1
# Least tokens for each channel, below which there is more damping, and below which only the diagonal is used.
_ENOUGH, _LEAST = 2.0, 0.5


@dataclass(frozen=True)
class CompressInt4GptqPass(CompressInt4Pass):
    """4-bit weights with AWQ's factors where they fold into other weights, and GPTQ's codes for scales that are chosen before."""

    name = "compress-int4-gptq"
    version = 3
    overrides = (INT8, FLOAT, *GROUPS)

    def needs_activations(self, role: str) -> bool:
        return role != "embeddings" and self.in_4_bit(role)

    def joins_rows(self, role: str) -> bool:
        """See `CompressInt4Pass`: whether rows are compressed together, not whether they depend on each other."""
        return role != "head" and self.needs_activations(role)

    def scarce(self, tokens: int, channels: int) -> str | None:
        """See `TransformPass`."""
        if tokens >= _ENOUGH * channels:
            return None
        return (
            "rounded with more damping" if tokens >= _LEAST * channels else "rounded to the nearest codes, without GPTQ"
        )

    def effort(self, role: str) -> Effort | None:
        """See `TransformPass`; the Hessian of the widest layer is there several times while it is inverted."""
        return Effort(3.2, 60.0, 100_000_000, 2.7) if self.needs_activations(role) else super().effort(role)

    def to_int4(self, source: BlockSource, awq: bool = False) -> ov.Model:
        """See `CompressInt4Pass`."""
        from threadpoolctl import threadpool_limits

        model = source.model()
        rounded: dict[str, tuple[Floats, Lattice]] = {}
        if self.needs_activations(source.block.role):
            with threadpool_limits(1):  # sums of products depend on how many threads share them
                rounded = self._round(model, source)
        sizes = {tensor: self._group_size(tensor, source) for tensor in source.block.tensors.values()}
        for size in sorted({size for size in sizes.values() if size}):
            model = self.rounded_to_int4(model, [tensor for tensor in sizes if sizes[tensor] != size], size)
        constants = {node.get_friendly_name(): node for node in model.get_ops() if node.get_type_name() == "Constant"}
        for tensor, (codes, lattice) in rounded.items():
            _store(constants, tensor, codes, lattice)
        return model

    def _round(self, model: ov.Model, source: BlockSource) -> dict[str, tuple[Floats, Lattice]]:
        """Codes and lattice of each layer in 4 bit; weights in the graph are scaled as the codes expect it."""
        layers = list(linear_layers(model, source))
        sizes = {layer.tensor: self._columns(layer, source) for layer in layers}
        shared = [group for group in by_input(layers) if any(sizes[layer.tensor] for layer in group)]
        weights = {layer.tensor: np.array(weight_of(layer.product).data) for layer in layers}
        rounded: dict[str, tuple[Floats, Lattice]] = {}
        if not shared:
            return rounded
        inputs = measure_inputs(model, source, [group[0].input for group in shared])
        for number, group in enumerate(shared):
            factors = self._scale(group, inputs[number], source, sizes, layers, weights)
            inputs[number] = inputs[number].divided(factors)
        for group in shared:
            measured = inputs.pop(0)
            codes = rounding(measured)
            for layer in group:
                if size := sizes[layer.tensor]:
                    weight = weights[layer.tensor]
                    lattice = choose_lattice(weight, np.diag(measured.hessian), size, self.symmetric)
                    rounded[layer.tensor] = codes(weight, lattice), lattice
        for layer in layers:
            replace_weight(weight_of(layer.product), weights[layer.tensor])
        return rounded

    def _group_size(self, tensor: str, source: BlockSource) -> int:
        """The group size that is asked for a weight; 0 if it does not get 4 bit."""
        override = source.layers.get(tensor)
        return self.group_size if override is None else GROUPS.get(override, 0)

    def _columns(self, layer: LinearLayer, source: BlockSource) -> int:
        """Number of columns of a weight that share a scale; 0 if it does not get 4 bit."""
        wanted, columns = self._group_size(layer.tensor, source), weight_of(layer.product).shape[1]
        group = adjusted_group_size(columns, wanted) if wanted else None
        return columns if group == -1 else group or 0

    def _scale(
        self,
        group: Sequence[LinearLayer],
        inputs: LayerInputs,
        source: BlockSource,
        sizes: Mapping[str, int],
        layers: Sequence[LinearLayer],
        weights: dict[str, Floats],
    ) -> Floats | None:
        """Multiply the columns of the weights that share an input by factors, if the input can be divided by them.

        The head's are not, since its rows are compressed in pieces.

        Returns:
            The factors; None if there are none.
        """
        readers = {target.get_node().get_friendly_name() for target in group[0].input.get_target_inputs()}
        if source.block.role == "head" or readers != {layer.product.get_friendly_name() for layer in group}:
            return None
        floats = {tensor for tensor, precision in source.layers.items() if precision == FLOAT}
        if any(layer.tensor in floats for layer in group):
            return None
        divide = _divider(group[0].input, [layer for layer in layers if layer.tensor not in floats], weights)
        if divide is None:
            return None
        rounded = [layer.tensor for layer in group if sizes[layer.tensor]]
        factors = channel_factors(
            [weights[tensor] for tensor in rounded],
            inputs.hessian,
            inputs.magnitudes,
            max(sizes[tensor] for tensor in rounded),
            self.symmetric,
        )
        if factors is not None:
            divide(factors)
            for layer in group:
                weights[layer.tensor] *= factors
        return factors


def rounding(inputs: LayerInputs) -> Callable[[Floats, Lattice], Floats]:
    """The function that finds the codes of a weight that reads these inputs."""
    channels = len(inputs.hessian)
    if inputs.tokens < _LEAST * channels:
        return nearest_codes
    damp = _DAMP if inputs.tokens >= _ENOUGH * channels else _MORE_DAMP
    return partial(compensated_codes, inputs=compensation(inputs.hessian, damp, _SHRINK))


def _divider(
    value: ov.Output, layers: Sequence[LinearLayer], weights: dict[str, Floats]
) -> Callable[[Floats], None] | None:
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
    replace_weight(constant, (constant.data / factors).astype(np.float32))


def _divide_rows(weight: Floats, factors: Floats) -> None:
    weight /= factors[:, None]


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
