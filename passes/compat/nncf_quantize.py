"""`nncf.quantize` for transformers, from statistics that were gathered elsewhere; relies on interfaces that NNCF keeps private.

`nncf.quantize` runs a graph on all samples twice: for SmoothQuant, and then, with the activations that SmoothQuant has scaled,
for the ranges of activations and for bias correction. SmoothQuant only multiplies each channel by a positive factor, so the
minimum, maximum and mean of each channel of the float activations determine everything. They can be gathered in a single run,
even block by block.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from passes.compat.nncf_statistics import ChannelStatistics, Gather, Observed, fill, statistic_points

if TYPE_CHECKING:
    import openvino as ov

__all__ = ["QUANTIZE_STATISTICS", "observed_tensors", "quantize"]

# The statistics of each channel that `quantize` needs.
QUANTIZE_STATISTICS = ("least", "greatest", "mean")


def observed_tensors(
    model: ov.Model, alpha: float, ignored: Sequence[str]
) -> tuple[list[Observed], dict[str, list[tuple[str, int]]]]:
    """The tensors of a float graph whose statistics `quantize` needs.

    Args:
        model: the graph; names of its operations are unique, and the values of its weights do not matter.
        alpha: see `quantize`.
        ignored: see `quantize`.

    Returns:
        The tensors; and for each input of the graph the weights (name of the constant, and its axis of input channels) that
        SmoothQuant scales together, because their layers read this input directly.
    """
    operations = {node.get_friendly_name(): node for node in model.get_ops()}
    steps = _Steps(1, alpha, ignored)
    shared: dict[str, list[tuple[str, int]]] = {}
    for layer, port, axis in steps.smoothed(model):
        source, weight = operations[layer].input_value(port), operations[layer].input_value(1 - port).get_node()
        if source.get_node().get_type_name() == "Parameter":
            shared.setdefault(source.get_node().get_friendly_name(), []).append((weight.get_friendly_name(), axis))
    found: dict[Observed, None] = {}

    def gather(tensor: Observed) -> list[ChannelStatistics]:
        found[tensor] = None
        output = operations[tensor.operation].output(tensor.output)
        ones = np.ones(_channels(output, tensor.axis), np.float32)  # only their number matters
        return [
            ChannelStatistics({"least": -ones, "greatest": ones, "mean": 0 * ones}, (1,) * len(output.partial_shape))
        ]

    steps.run(model, gather, last=False)
    channels = {(tensor.operation, tensor.output) for tensor in found if tensor.axis is not None}
    needed = [
        tensor for tensor in found if tensor.axis is not None or (tensor.operation, tensor.output) not in channels
    ]
    return needed, shared


def _channels(output: ov.Output, axis: int | None) -> int:
    """Number of channels of a tensor, which shape inference does not always find."""
    if axis is None:
        return 1
    if output.partial_shape[axis].is_static:
        size: int = output.partial_shape[axis].get_length()
        return size
    layer = next(item.get_node() for item in output.get_target_inputs() if item.get_node().get_type_name() == "MatMul")
    port = next(place for place in (0, 1) if layer.input_value(place) != output)
    shape = layer.input_value(port).get_shape()
    transposed = layer.get_attributes()["transpose_b" if port else "transpose_a"]
    return int(shape[-1] if transposed == bool(port) else shape[-2])


def quantize(
    model: ov.Model,
    gather: Gather,
    samples: int,
    alpha: float,
    ignored: Sequence[str] = (),
    rivals: Mapping[str, Sequence[np.ndarray]] | None = None,
) -> ov.Model:
    """Quantize weights and activations to 8 bit, as `nncf.quantize` does with `ModelType.TRANSFORMER`.

    Args:
        model: the float graph; names of its operations are unique.
        gather: returns `QUANTIZE_STATISTICS` of a tensor.
        samples: number of samples.
        alpha: smoothing strength of SmoothQuant for matrix products.
        ignored: names of operations that stay float.
        rivals: layer (name of the operation) -> the maximum magnitude of each input channel [channels] of the weights of all
            layers that read the same value, if some of them are in other graphs. They get one smoothing factor for each
            channel, which is that of the layer with the most even factors.
    """
    from openvino._offline_transformations import compress_quantize_weights_transformation

    quantized = _Steps(samples, alpha, ignored, rivals or {}).run(model, gather)
    compress_quantize_weights_transformation(quantized)
    return quantized


class _Steps:
    """NNCF's steps: SmoothQuant, channel alignment, and at last ranges with bias correction."""

    def __init__(
        self, samples: int, alpha: float, ignored: Sequence[str], rivals: Mapping[str, Sequence[np.ndarray]] = {}
    ) -> None:
        import nncf
        from nncf.quantization.algorithms.post_training.pipeline import create_ptq_pipeline
        from nncf.quantization.algorithms.smooth_quant.algorithm import SmoothQuant

        self._pipeline = create_ptq_pipeline(
            subset_size=samples,
            model_type=nncf.ModelType.TRANSFORMER,
            # Without validation, since a table that is read as a whole is not an operation that NNCF finds.
            ignored_scope=nncf.IgnoredScope(names=list(ignored), validate=False),
            advanced_parameters=nncf.AdvancedQuantizationParameters(
                smooth_quant_alphas=nncf.AdvancedSmoothQuantParameters(matmul=alpha)
            ),
        )
        self._smooth = self._pipeline.pipeline_steps[0][0]
        assert isinstance(self._smooth, SmoothQuant)
        if rivals:
            _smooth_together(self._smooth, rivals)

    def smoothed(self, model: ov.Model) -> list[tuple[str, int, int]]:
        """The layers that SmoothQuant scales: the operation, the port of its activation, the weight's axis of input channels."""
        from nncf.common.factory import build_graph

        graph = build_graph(model)
        places = [
            point.target_point
            for point in statistic_points(self._pipeline.get_statistic_points_for_step(0, model, graph))
        ]
        axis = self._smooth._backend_entity.get_weight_channel_axis
        return [
            (place.target_node_name, place.port_id, axis(graph.get_node_by_name(place.target_node_name)))
            for place in places
        ]

    def run(self, model: ov.Model, gather: Gather, last: bool = True) -> ov.Model:
        """Run all steps; without the `last`, only its statistics are gathered."""
        from nncf.common.factory import build_graph

        count = len(self._pipeline.pipeline_steps)
        for index in range(count):
            graph = build_graph(model)
            points = self._pipeline.get_statistic_points_for_step(index, model, graph)
            fill(points, model, gather, one_row=True)
            if last or index < count - 1:
                model = self._pipeline.run_step(index, points, model, graph)
        return model


def _smooth_together(smooth: Any, rivals: Mapping[str, Sequence[np.ndarray]]) -> None:
    """Let SmoothQuant choose the factors of a layer among those of all layers in `rivals`, instead of those in its graph."""
    from nncf.tensor import Tensor

    of_node, of_scale = smooth._get_statistics_for_node, smooth._calculate_scale_and_ratio
    current = ""

    def statistics(points: Any, node: str, port: int) -> Any:
        nonlocal current
        current = node
        return of_node(points, node, port)

    def scale(activations: Any, weights: Any, alpha: float) -> tuple[Any, Any]:
        others = [smooth._clip_statistics([Tensor(values)]) for values in rivals.get(current, ())]
        # `max` keeps the first of equal ratios, as NNCF does.
        return max((of_scale(activations, other, alpha) for other in others or [weights]), key=lambda found: found[1])

    smooth._get_statistics_for_node, smooth._calculate_scale_and_ratio = statistics, scale
