"""*quantize-int8-ptq*: 8-bit weights and activations with SmoothQuant, block by block.

One `nncf.quantize` call on the whole component would give the same: its statistics are those of the float model, and no layer's
result depends on another layer's, except where layers of several blocks read the same value. Such layers share their smoothing
factors, for which each block also looks at the weights of the others.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from manifests.errors import BadInputError
from passes.base import Effort, WeightBits
from passes.compat.nncf_quantize import QUANTIZE_STATISTICS, observed_tensors, quantize
from passes.compress.nncf_output import quiet_nncf
from passes.compress.observed import Observation, ObservedSource, ObservingPass, observation_of
from passes.export.ir import BLOCK_FILE, finish
from passes.export.openvino import save_block
from passes.export.template import BlockSource
from passes.formats import FLOAT, INT8, VECTOR_BITS, stored_bits
from passes.vocabulary import operation_name

if TYPE_CHECKING:
    import openvino as ov

__all__ = ["QuantizeInt8PtqPass"]


@dataclass(frozen=True)
class QuantizeInt8PtqPass(ObservingPass):
    """`nncf.quantize` for transformers; SmoothQuant (Xiao et al., 2022) moves outliers of activations into the weights.

    Attributes:
        smooth_quant_alpha: 0 leaves the outliers in the activations, 1 moves them completely.
    """

    name = "quantize-int8-ptq"
    version = 2
    overrides = (FLOAT,)
    quantizes_activations = True

    smooth_quant_alpha: float = 0.6

    def __post_init__(self) -> None:
        if not 0 <= self.smooth_quant_alpha <= 1:
            raise BadInputError(f"smooth-quant alpha {self.smooth_quant_alpha} is out of range: use 0 to 1")

    def needs_activations(self, role: str) -> bool:
        return True

    def effort(self, role: str) -> Effort | None:
        """See `TransformPass`."""
        return Effort(2.0, 25.0, 100_000_000)

    def weight_bits(self, role: str, layer: str, shape: tuple[int, ...]) -> WeightBits | None:
        return WeightBits(stored_bits(INT8, shape) if len(shape) > 1 else VECTOR_BITS)

    def observe(self, model: ov.Model, floats: Sequence[str]) -> Observation:
        """See `ObservingPass`."""
        with quiet_nncf():
            tensors, shared = observed_tensors(model, self.smooth_quant_alpha, floats)
        return Observation(tensors, QUANTIZE_STATISTICS, shared)

    def run(self, source: BlockSource, output: Path) -> None:
        assert isinstance(source, ObservedSource)
        model, gather = source.observed_model()
        with quiet_nncf():
            quantized = quantize(
                model, gather, len(source.statistics), self.smooth_quant_alpha, source.floats, _rivals(source)
            )
        save_block(quantized, source, output)
        finish(output / BLOCK_FILE)


def _rivals(source: ObservedSource) -> dict[str, list[np.ndarray]]:
    """Layers whose input is also read by layers of other blocks; see `passes.compat.nncf_quantize.quantize`."""

    def shared(kind: str, port: str) -> Sequence[tuple[str, int]]:
        return observation_of(source.observations, (kind, ())).shared.get(port, ())

    rivals: dict[str, list[np.ndarray]] = {}
    for port, readers in source.readers.items():
        if len({block.name for block, _ in readers}) < 2:
            continue
        maxima = []
        for block, other in readers:
            for parameter, axis in shared(block.kind, other):
                weight = source.checkpoint.read(source.templates.names[block.tensors[parameter]])
                maxima.append(np.abs(weight).max(axis=tuple(place for place in range(weight.ndim) if place != axis)))
        own = [source.block.tensors[parameter] for parameter, _ in shared(source.block.kind, port)]
        rivals |= dict.fromkeys((operation_name(tensor) for tensor in own), maxima)
    return rivals
