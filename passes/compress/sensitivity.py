"""Which layers of a component stay in 8 bit when only a share of its weights may go to 4 bit.

NNCF scores each layer by itself and then ranks all layers of a graph. Here the blocks are scored one at a time, and the
ranking joins their scores, so that the choice is that of one call on the whole graph.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from calibration.activations import read_activations
from passes.base import BlockPass
from passes.compress.weights import quiet_nncf
from passes.export.template import BlockSource

__all__ = ["LayerScore", "MeasureSensitivityPass", "layers_in_8_bit", "read_scores"]

_SCORES_FILE = "scores.json"


@dataclass(frozen=True)
class LayerScore:
    """NNCF's sensitivity of one layer; the tensor's in-memory name, and how many weights it has."""

    tensor: str
    weights: int
    score: float


@dataclass(frozen=True)
class MeasureSensitivityPass(BlockPass):
    """NNCF's default score of each layer of a block: the greatest variance of its inputs, times its inverse 8-bit error."""

    name = "measure-sensitivity"

    group_size: int = 64

    def needs_activations(self, role: str) -> bool:
        return True

    def run(self, source: BlockSource, output: Path) -> None:
        import nncf
        from nncf.openvino.graph.model_utils import remove_friendly_name_duplicates
        from nncf.quantization.algorithms.weight_compression.algorithm import WeightCompression

        model = remove_friendly_name_duplicates(source.model())
        algorithm = WeightCompression(
            mode=nncf.CompressWeightsMode.INT4_ASYM,
            ratio=0.5,  # any below 1: the scores do not depend on it
            group_size=self.group_size,
            ignored_scope=nncf.IgnoredScope(),
            all_layers=True,
            sensitivity_metric=nncf.SensitivityMetric.MAX_ACTIVATION_VARIANCE,
            awq=False,
            subset_size=len(source.activations),
            scale_estimation=False,
            gptq=False,
            lora_correction=False,
            backup_mode=nncf.BackupMode.INT8_ASYM,
            advanced_parameters=nncf.AdvancedCompressionParameters(
                group_size_fallback_mode=nncf.GroupSizeFallbackMode.ADJUST
            ),
        )
        with quiet_nncf():
            graph = nncf.build_graph(model)
            algorithm.set_backend_entity(model)
            everything, layers, _ = algorithm.get_weight_compression_parameters(model, graph)
            dataset = nncf.Dataset(source.activations, read_activations)
            _, points = algorithm.collect_statistics_and_statistic_points(
                model, graph, None, dataset, layers, everything
            )
            # NNCF has no public way to its scores.
            criterion = algorithm._mixed_precision_algo
            criterion._set_backend_entity(model)
            scores = criterion._calc_sensitivity(model, graph, layers, points)
        found = [
            (layer.weight_name, int(layer.num_weights), float(score))
            for layer, score in zip(layers, scores, strict=True)
        ]
        (output / _SCORES_FILE).write_text(json.dumps(found), encoding="utf-8")


def read_scores(folder: Path) -> list[LayerScore]:
    """What `MeasureSensitivityPass` wrote into `folder`."""
    return [LayerScore(*entry) for entry in json.loads((folder / _SCORES_FILE).read_text(encoding="utf-8"))]


def layers_in_8_bit(scores: Iterable[LayerScore], ratio: float) -> frozenset[str]:
    """The tensors that stay in 8 bit: 4 bit goes to the least sensitive layers while their share is below `ratio`."""
    ranked = sorted(scores, key=lambda layer: layer.score)
    total = sum(layer.weights for layer in ranked)
    weights = 0
    for position, layer in enumerate(ranked):
        weights += layer.weights
        if weights / total >= ratio:
            return frozenset(other.tensor for other in ranked[position:])
    return frozenset()
