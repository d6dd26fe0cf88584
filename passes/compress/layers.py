"""The linear layers of a block, and what is known of their inputs on the calibration samples."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from calibration.activations import read_activations
from manifests.errors import BadInputError
from passes.chain import openvino_compute
from passes.compress.rounding import Floats
from passes.export.template import BlockSource

if TYPE_CHECKING:
    import openvino as ov

__all__ = [
    "MOST_TOKENS",
    "LayerInputs",
    "LinearLayer",
    "by_input",
    "linear_layers",
    "measure_inputs",
    "replace_weight",
    "weight_of",
]

# Maximum number of tokens by which a layer is rounded; those of each sample are taken at equal distances.
MOST_TOKENS = 16_384
_TILE = 1024
# Tokens that the first token of a prompt counts for: it takes as much attention as many others (Xiao et al., "Efficient Streaming
# Language Models with Attention Sinks", 2023).
_FIRST = 16.0


@dataclass(frozen=True)
class LinearLayer:
    """A matrix product with a weight of the block.

    Attributes:
        tensor: in-memory name of the weight.
        product: the operation, whose input 1 is the weight [rows, columns].
    """

    tensor: str
    product: ov.Node

    @property
    def input(self) -> ov.Output:
        """The value that the layer reads."""
        return self.product.input_value(0)


def linear_layers(model: ov.Model, source: BlockSource) -> Iterator[LinearLayer]:
    """Find the linear layers of a block's graph, in the order in which they are computed.

    Args:
        model: the graph, with weights as constants that are named after their tensors.
        source: the block.
    """
    tensors = set(source.block.tensors.values())
    for node in model.get_ordered_ops():
        if node.get_type_name() != "MatMul" or (weight := weight_of(node)).get_type_name() != "Constant":
            continue
        tensor = weight.get_friendly_name()
        if tensor in tensors and node.get_attributes()["transpose_b"] and len(weight.shape) == 2:
            yield LinearLayer(tensor, node)


def by_input(layers: Sequence[LinearLayer]) -> list[list[LinearLayer]]:
    """Layers that read the same value, together."""
    found: dict[ov.Output, list[LinearLayer]] = {}
    for layer in layers:
        found.setdefault(layer.input, []).append(layer)
    return list(found.values())


def weight_of(product: ov.Node) -> ov.Node:
    """The constant, if it is one, that a matrix product multiplies by."""
    return product.input_value(1).get_node()


def replace_weight(constant: ov.Node, values: Floats) -> None:
    """Put other values, of any shape with as many, in the place of a constant's."""
    import openvino as ov

    new = ov.op.Constant(np.ascontiguousarray(values.reshape(constant.shape)), shared_memory=True)
    new.set_friendly_name(constant.get_friendly_name())
    constant.output(0).replace(new.output(0))


@dataclass(frozen=True)
class LayerInputs:
    """What the inputs of a layer are on the calibration samples.

    Attributes:
        hessian: [channels, channels], mean of the products of two channels.
        magnitudes: [channels], mean absolute values.
        tokens: number of tokens that these are means of.
    """

    hessian: Floats
    magnitudes: Floats
    tokens: int

    def divided(self, factors: Floats | None) -> LayerInputs:
        """The inputs divided by factors [channels]; None stands for ones."""
        if factors is None:
            return self
        return LayerInputs(self.hessian / factors / factors[:, None], self.magnitudes / factors, self.tokens)


def measure_inputs(model: ov.Model, source: BlockSource, values: Sequence[ov.Output]) -> list[LayerInputs]:
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
    most = max(1, MOST_TOKENS // len(source.activations))
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
        made.append(LayerInputs(total.T, np.asarray(magnitudes[number], np.float32) / tokens[number], tokens[number]))
    return made


def _mirror(lower: Floats) -> None:
    """Copy the values below the diagonal of a matrix to their places above it."""
    for first in range(0, len(lower), _TILE):
        last = min(first + _TILE, len(lower))
        tile = np.tril(lower[first:last, first:last])
        lower[first:last, first:last] = tile + np.tril(tile, -1).T
        lower[first:last, last:] = lower[last:, first:last].T
