"""*measure-formats*: what each format that a layer of a block may have changes in the layer's outputs.

Errors of two layers cannot be compared by themselves. `passes.effects` measures what a whole block changes in the logits; the
figures here divide that among the layers of the block, and among the formats of a layer.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from calibration.activations import BlockInputs, read_activations
from manifests.files import read_json
from passes.base import Context, Form, Intermediate
from passes.block_pass import BlockPass, BlockResults, FloatBlocks
from passes.chain import openvino_compute
from passes.compat.nncf import adjusted_group_size
from passes.compress.gptq import rounding
from passes.compress.layers import by_input, linear_layers, measure_inputs, weight_of
from passes.compress.rounding import Floats, Lattice, choose_lattice, nearest_codes, output_error, whole_range_lattice
from passes.export.template import BlockSource
from passes.formats import FLOAT, GROUPS, INT8

if TYPE_CHECKING:
    from passes.block_pass import SplitBlocks

__all__ = ["PROBE_GROUP", "LayerErrors", "MeasureFormatsPass"]

# Group size of the 4-bit weights by which blocks and layers are compared.
PROBE_GROUP = 64
_FILE = "formats.json"
# Rows of a weight by which its error is judged, and rows of embeddings and LM head among which these are.
_ROWS, _TABLE_ROWS = 256, 4096
# Samples on which the layers of a block are compared with each other.
_SAMPLES = 4


@dataclass(frozen=True)
class LayerErrors:
    """What compression changes in one layer.

    Attributes:
        tensor: in-memory name of the weight.
        shape: shape of the weight.
        errors: format -> mean squared error of the layer's outputs, added up over the rows.
        probe: the same for 4 bit in groups of `PROBE_GROUP` that are rounded to the nearest values.
        share: squared error of the block's outputs if this layer alone is rounded so, as a share of their squares.
    """

    tensor: str
    shape: tuple[int, ...]
    errors: dict[str, float]
    probe: float
    share: float


@dataclass(frozen=True)
class MeasureFormatsPass(BlockPass):
    """Errors of all formats of all layers of a block; layers with small groups only are left out.

    Attributes:
        symmetric: whether 4-bit weights have no zero points.
    """

    name = "measure-formats"
    version = 2

    symmetric: bool = False

    @property
    def makes(self) -> Form:
        return Form.F32_BLOCKS

    def __call__(self, before: Intermediate, context: Context) -> Intermediate:
        """See `TransformPass`; recipes need no measurement, since they hold what is chosen by it."""
        assert isinstance(before, FloatBlocks)
        return before

    def needs_activations(self, role: str) -> bool:
        return role in {"layer", "head"}

    def measured(self, split: SplitBlocks, context: Context) -> list[list[LayerErrors]]:
        """The errors in each block of a component; those that the store lacks are measured first."""
        results = BlockResults(self, split, context, {}, range(len(split.component.blocks)))
        results.make(last=True)
        return [_read(results.folder(index)) for index in results.keys]

    def run(self, source: BlockSource, output: Path) -> None:
        from threadpoolctl import threadpool_limits

        with threadpool_limits(1):
            found = self._layers(_some_rows(source))
        (output / _FILE).write_text(json.dumps([asdict(layer) for layer in found]), encoding="utf-8")

    def _layers(self, source: BlockSource) -> list[LayerErrors]:
        role = source.block.role
        if role == "embeddings":
            return [
                self._errors(tensor, weight, shape, np.ones(shape[1], np.float32), None, 1.0)
                for tensor, weight, shape in _tables(source)
            ]
        if role not in {"layer", "head"}:
            return []
        model = source.model()
        layers = [
            layer
            for layer in linear_layers(model, source)
            if adjusted_group_size(weight_of(layer.product).shape[1], PROBE_GROUP) is not None
        ]
        weights = {layer.tensor: np.array(weight_of(layer.product).data) for layer in layers}
        shapes = {tensor: source.tensor_info(tensor).shape for tensor in weights}
        if not layers:
            return []
        groups = by_input(layers)
        # Codes that make up for each other's errors do so best on the samples that they are chosen by, so they are judged by others.
        seen, others = (
            measure_inputs(model, replace(source, activations=samples), [group[0].input for group in groups])
            for samples in _halves(source.activations)
        )
        del model
        shares = self._shares(source, weights)
        made = []
        for group, inputs, judges in zip(groups, seen, others, strict=True):
            codes = rounding(inputs)
            made += [
                self._errors(tensor, weights[tensor], shapes[tensor], judges.hessian, codes, shares[tensor])
                for tensor in (layer.tensor for layer in group)
            ]
        return made

    def _errors(
        self,
        tensor: str,
        weight: Floats,
        shape: tuple[int, ...],
        hessian: Floats,
        codes: Callable[[Floats, Lattice], Floats] | None,
        share: float,
    ) -> LayerErrors:
        """The errors of one layer.

        Args:
            tensor: in-memory name of the weight.
            weight: [rows, columns].
            shape: shape of the whole weight, of which `weight` may have only some rows.
            hessian: [columns, columns], or its diagonal if the others are 0.
            codes: finds the codes of 4-bit weights; None takes the nearest ones.
            share: see `LayerErrors`.
        """
        tried = np.ascontiguousarray(weight[:: max(1, len(weight) // _ROWS)])
        scale = shape[0] / len(tried)
        importance = hessian if hessian.ndim == 1 else np.diag(hessian)

        def error(values: Floats) -> float:
            difference = values - tried
            if hessian.ndim == 1:
                return scale * float(np.einsum("ij,ij,j->", difference, difference, hessian, dtype=np.float64))
            return scale * output_error(difference, hessian)

        errors = {FLOAT: error(tried.astype(np.float16).astype(np.float32)), INT8: error(_in_8_bit(tried))}
        for name, size in GROUPS.items():
            if tried.shape[1] % size == 0:
                lattice = choose_lattice(tried, importance, size, self.symmetric)
                errors[name] = error(lattice.values((codes or nearest_codes)(tried, lattice)))
        return LayerErrors(tensor, shape, errors, error(self._probe(tried)), share)

    def _shares(self, source: BlockSource, weights: Mapping[str, Floats]) -> dict[str, float]:
        """Name of a tensor -> `LayerErrors.share`; 1 for a block that is only one layer."""
        if source.block.role == "head" or len(weights) < 2:
            return dict.fromkeys(weights, 1.0)
        template = source.template()
        parameters = source.weights(template)
        names = {tensor: parameter.get_friendly_name() for parameter, tensor in parameters}
        tensors = source.templates.names
        floats = {names[tensor]: source.checkpoint.read(tensors[tensor], None) for _, tensor in parameters}
        compute = openvino_compute(template)
        squares, changes = 0.0, dict.fromkeys(weights, 0.0)
        for sample in source.activations[:_SAMPLES]:
            values = read_activations(sample)
            expected = {port: np.array(value) for port, value in compute(values | floats).items()}
            squares += sum(float(np.square(value, dtype=np.float64).sum()) for value in expected.values())
            for tensor, weight in weights.items():
                found = compute(values | floats | {names[tensor]: self._probe(weight)})
                changes[tensor] += sum(
                    float(np.square(found[port] - value, dtype=np.float64).sum()) for port, value in expected.items()
                )
        return {tensor: change / max(squares, 1e-30) for tensor, change in changes.items()}

    def _probe(self, weight: Floats) -> Floats:
        """A weight in 4 bit as `compress-int4` rounds it."""
        size = adjusted_group_size(weight.shape[1], PROBE_GROUP)
        assert size is not None
        lattice = whole_range_lattice(weight, size, self.symmetric)
        return lattice.values(nearest_codes(weight, lattice))


def _halves(samples: Sequence[BlockInputs]) -> tuple[tuple[BlockInputs, ...], tuple[BlockInputs, ...]]:
    """Every other sample, and the rest; both times the same one if there is only one."""
    return (tuple(samples[::2]), tuple(samples[1::2])) if len(samples) > 1 else (tuple(samples),) * 2


def _in_8_bit(weight: Floats) -> Floats:
    """The nearest values of a weight in 8 bit, with a scale and a zero point for each row."""
    low, high = np.minimum(weight.min(1, keepdims=True), 0), np.maximum(weight.max(1, keepdims=True), 0)
    step = np.maximum((high - low) / 255, 1e-12)
    point = np.rint(-low / step)
    found: Floats = (np.clip(np.rint(weight / step) + point, 0, 255) - point) * step
    return found


def _some_rows(source: BlockSource) -> BlockSource:
    """The block with some rows of a long table, from its middle: the first tokens of a vocabulary are of another kind."""
    if source.block.role not in {"embeddings", "head"}:
        return source
    for tensor in source.block.tensors.values():
        shape = source.tensor_info(tensor).shape
        if len(shape) == 2 and shape[0] > _TABLE_ROWS:
            first = (shape[0] - _TABLE_ROWS) // 2
            return source.with_rows(tensor, first, first + _TABLE_ROWS)
    return source


def _tables(source: BlockSource) -> list[tuple[str, Floats, tuple[int, ...]]]:
    """Name, values and whole shape of the tables in which tokens are looked up."""
    found: list[tuple[str, Floats, tuple[int, ...]]] = []
    model = source.template()
    for parameter, tensor in source.weights(model):
        shape = source.tensor_info(tensor).shape
        readers = {target.get_node().get_type_name() for target in parameter.output(0).get_target_inputs()}
        if len(shape) == 2 and readers == {"Gather"} and adjusted_group_size(shape[1], PROBE_GROUP) is not None:
            values = source.checkpoint.read(source.templates.names[tensor], source.rows.get(tensor))
            found.append((tensor, values, shape))
    return found


def _read(folder: Path) -> list[LayerErrors]:
    entries = read_json(folder / _FILE, f"delete {folder}")
    return [LayerErrors(**entry | {"shape": tuple(entry["shape"])}) for entry in entries]
