"""Undocumented interfaces and behaviour of NNCF on which vlmconvert relies."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from passes.compat.nncf_statistics import Gather, fill

if TYPE_CHECKING:
    import nncf
    import openvino as ov

__all__ = [
    "INPUT_SCALINGS",
    "LEAST_GROUP_SIZE",
    "WEIGHT_STATISTICS",
    "adjusted_group_size",
    "compress_int4",
    "layer_scores",
    "without_torch",
]

# Name endings of the multiplications by which AWQ and SmoothQuant scale the input of a layer.
INPUT_SCALINGS = ("/awq_mul", "/nncf_smooth_quant")
# Minimum of an adjusted group size; a layer that would need a smaller one gets 8-bit weights.
LEAST_GROUP_SIZE = 32
# The statistics of a layer's input that `compress_int4` and `layer_scores` need, see `ChannelStatistics`.
WEIGHT_STATISTICS = ("mean", "max_variance")
# What stands for a data set where statistics come from elsewhere: NNCF only asks whether there is one.
_NO_DATASET = True
# Number of weights that scale estimation works on at a time; their temporary arrays fit into the cache of a core.
_PIECE = 1 << 18


def adjusted_group_size(channels: int, group_size: int) -> int | None:
    """The group size that a layer of `channels` input channels gets, or None if it falls back to 8 bit.

    It is the rule of `GroupSizeFallbackMode.ADJUST`: the largest power of two that divides the channels, at least 32.
    """
    if group_size == -1 or channels % group_size == 0:
        return group_size
    largest = channels & -channels
    return largest if largest >= LEAST_GROUP_SIZE else None


def compress_int4(
    model: ov.Model,
    gather: Gather,
    samples: int,
    group_size: int,
    symmetric: bool,
    awq: bool,
    scale_estimation: bool,
    ignored: nncf.IgnoredScope,
) -> ov.Model:
    """Compress all layers of a graph to 4 bit by statistics of their inputs, as `nncf.compress_weights` does.

    Args:
        model: the graph, in which names of operations are unique; it is changed.
        gather: returns `WEIGHT_STATISTICS` of a tensor.
        samples: number of samples.
        group_size: number of input channels that share a scale; -1 for whole rows.
        symmetric: whether zero points are left out.
        awq: whether AWQ scales channels.
        scale_estimation: whether scales minimize the error of a layer's outputs, instead of that of its weights.
        ignored: operations that stay float.
    """
    import nncf

    mode = nncf.CompressWeightsMode.INT4_SYM if symmetric else nncf.CompressWeightsMode.INT4_ASYM
    algorithm = _weight_compression(gather, samples, mode, 1.0, group_size, awq, scale_estimation, ignored)
    with _rows_in_pieces():
        return algorithm.apply(model, nncf.build_graph(model), None, _NO_DATASET)


def layer_scores(model: ov.Model, gather: Gather, samples: int, group_size: int) -> list[tuple[str, int, float]]:
    """The sensitivity by which `nncf.compress_weights` chooses the layers that go to 4 bit.

    The metric is NNCF's default: the maximum variance of a layer's inputs, times its inverse 8-bit error.

    Args:
        model: the graph, in which names of operations are unique.
        gather: returns `WEIGHT_STATISTICS` of a tensor.
        samples: number of samples.
        group_size: group size of the layers in 4 bit.

    Returns:
        For each layer the name of its weight, the number of values in that weight, and the score; the layers with the lowest
        scores go to 4 bit first.
    """
    import nncf

    # The scores do not depend on the ratio, as long as it is below 1.
    algorithm = _weight_compression(
        gather, samples, nncf.CompressWeightsMode.INT4_ASYM, 0.5, group_size, False, False, nncf.IgnoredScope()
    )
    graph = nncf.build_graph(model)
    algorithm.set_backend_entity(model)
    everything, layers, _ = algorithm.get_weight_compression_parameters(model, graph)
    _, points = algorithm.collect_statistics_and_statistic_points(model, graph, None, _NO_DATASET, layers, everything)
    # NNCF has no public interface for its scores.
    criterion = algorithm._mixed_precision_algo
    criterion._set_backend_entity(model)
    scores = criterion._calc_sensitivity(model, graph, layers, points)
    return [
        (layer.weight_name, int(layer.num_weights), float(score)) for layer, score in zip(layers, scores, strict=True)
    ]


def _weight_compression(
    gather: Gather,
    samples: int,
    mode: nncf.CompressWeightsMode,
    ratio: float,
    group_size: int,
    awq: bool,
    scale_estimation: bool,
    ignored: nncf.IgnoredScope,
) -> Any:
    """NNCF's algorithm, which gets its statistics from `gather`; for the arguments see `compress_int4`."""
    import nncf
    from nncf.quantization.algorithms.weight_compression.algorithm import WeightCompression

    algorithm = WeightCompression(
        mode=mode,
        ratio=ratio,
        group_size=group_size,
        ignored_scope=ignored,
        all_layers=True,
        sensitivity_metric=nncf.SensitivityMetric.MAX_ACTIVATION_VARIANCE,
        awq=awq,
        subset_size=samples,
        scale_estimation=scale_estimation,
        gptq=False,
        lora_correction=False,
        backup_mode=nncf.BackupMode.INT8_ASYM,
        advanced_parameters=nncf.AdvancedCompressionParameters(
            group_size_fallback_mode=nncf.GroupSizeFallbackMode.ADJUST
        ),
    )

    def collect(_dataset: Any, _graph: Any, model: ov.Model, points: Any) -> Any:
        fill(points, model, gather)
        return points

    algorithm._collect_statistics = collect
    return algorithm


@contextmanager
def _rows_in_pieces() -> Iterator[None]:
    """Let scale estimation work on some rows of a weight at a time.

    The rows do not depend on each other. On a whole matrix each of NNCF's hundreds of steps allocates several temporary arrays
    of its size, and most of the time is spent on getting their memory from the system.
    """
    from nncf.quantization.algorithms.weight_compression.scale_estimation import ScaleEstimation

    whole = ScaleEstimation.calculate_quantization_params

    def in_pieces(statistics: Any, weight: Any, reduction_axes: tuple[int, ...], *options: Any) -> tuple[Any, Any]:
        from nncf.tensor import functions as fns

        if weight.ndim != 2 or reduction_axes != (1,):
            return whole(statistics, weight, reduction_axes, *options)
        rows = max(1, _PIECE // weight.shape[1])
        parts = [
            whole(statistics, weight[first : first + rows], reduction_axes, *options)
            for first in range(0, weight.shape[0], rows)
        ]
        scales, points = zip(*parts, strict=True)
        return fns.concatenate(list(scales), 0), None if points[0] is None else fns.concatenate(list(points), 0)

    ScaleEstimation.calculate_quantization_params = staticmethod(in_pieces)
    try:
        yield
    finally:
        ScaleEstimation.calculate_quantization_params = staticmethod(whole)


@contextmanager
def without_torch() -> Iterator[None]:
    """Hide torch while NNCF is imported, which would import it as well: this saves 0.2 GB of memory in every process."""
    if "torch" in sys.modules:
        yield
        return
    sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules["torch"]
