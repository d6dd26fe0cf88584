"""*measure-sensitivity*: scores layers, and chooses those that stay in 8 bit if only a share of the weights may be in 4 bit.

NNCF scores each layer by itself, and then ranks all layers of a graph. Here the layers are scored block by block, and ranked
over the whole component, so that the choice equals that of one NNCF call on the whole graph.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from manifests.files import read_json
from passes.base import Context, Form, Intermediate
from passes.block_pass import BlockResults, FloatBlocks
from passes.compat.nncf import layer_scores
from passes.compress.nncf_output import quiet_nncf
from passes.compress.observed import Observation, ObservedSource, ObservingPass, layer_inputs
from passes.export.template import BlockSource

if TYPE_CHECKING:
    import openvino as ov

    from passes.export.ir import Detached

__all__ = ["LayerScore", "MeasureSensitivityPass", "ScoredBlocks", "layers_in_8_bit"]

_SCORES_FILE = "scores.json"


@dataclass(frozen=True)
class LayerScore:
    """NNCF's sensitivity score of one layer, with the in-memory name and the number of values of its weight."""

    tensor: str
    weights: int
    score: float


class ScoredBlocks(FloatBlocks):
    """Float blocks whose layers can be ranked by sensitivity."""

    def __init__(self, item: MeasureSensitivityPass, blocks: FloatBlocks, context: Context) -> None:
        self.split, self.component, self.key, self.exact = blocks.split, blocks.component, blocks.key, blocks.exact
        self._item, self._blocks, self._context = item, blocks, context

    def detached(self, index: int) -> Detached:
        """See `passes.block_pass.Blocks`."""
        return self._blocks.detached(index)

    def scores(self, indexes: Sequence[int]) -> list[LayerScore]:
        """The scores of all layers of the blocks with these indexes; scores that the store lacks are measured first."""
        results = BlockResults(self._item, self.split, self._context, {}, indexes)
        results.make(last=False)
        return [score for index in indexes for score in _read_scores(results.folder(index))]


@dataclass(frozen=True)
class MeasureSensitivityPass(ObservingPass):
    """NNCF's default score of each layer in a block: the maximum variance of its inputs, times its inverse 8-bit error."""

    name = "measure-sensitivity"

    group_size: int = 64

    @property
    def makes(self) -> Form:
        return Form.F32_BLOCKS

    def __call__(self, before: Intermediate, context: Context) -> Intermediate:
        """See `TransformPass`."""
        assert isinstance(before, FloatBlocks)
        self.prepare(before, context)
        return ScoredBlocks(self, before, context)

    def needs_activations(self, role: str) -> bool:
        return True

    def observe(self, model: ov.Model, floats: Sequence[str]) -> Observation:
        """See `ObservingPass`."""
        return layer_inputs(model)

    def run(self, source: BlockSource, output: Path) -> None:
        assert isinstance(source, ObservedSource)
        model, gather = source.observed_model()
        with quiet_nncf():
            found = layer_scores(model, gather, len(source.statistics), self.group_size)
        (output / _SCORES_FILE).write_text(json.dumps(found), encoding="utf-8")


def _read_scores(folder: Path) -> list[LayerScore]:
    """Read the scores that `MeasureSensitivityPass` wrote into `folder`."""
    return [LayerScore(*entry) for entry in read_json(folder / _SCORES_FILE, f"delete {folder}")]


def layers_in_8_bit(scores: Iterable[LayerScore], ratio: float) -> frozenset[str]:
    """Names of the tensors that stay in 8 bit: the least sensitive layers get 4 bit while their share is below `ratio`.

    Args:
        scores: the scores of all layers that may get 4 bit.
        ratio: maximum share of their weights in 4 bit, from 0 to 1.
    """
    ranked = sorted(scores, key=lambda layer: layer.score)
    total = sum(layer.weights for layer in ranked)
    weights = 0
    for position, layer in enumerate(ranked):
        weights += layer.weights
        if weights / total >= ratio:
            return frozenset(other.tensor for other in ranked[position:])
    return frozenset()
