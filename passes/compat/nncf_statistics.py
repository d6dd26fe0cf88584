"""Giving NNCF's algorithms statistics of activations that were gathered elsewhere; relies on interfaces that NNCF keeps private.

NNCF runs a graph on all samples to collect statistics. Its algorithms say which statistics they need by *statistic points*, each
with a *collector*. `fill` gives the collectors what they would have collected, from statistics of each channel of the float
graph's activations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from manifests.errors import ConversionError

if TYPE_CHECKING:
    import openvino as ov

__all__ = ["ChannelStatistics", "Gather", "Observed", "fill", "statistic_points"]

# Name ending of the multiplications that SmoothQuant inserts.
_SMOOTHING = "/nncf_smooth_quant"


@dataclass(frozen=True)
class Observed:
    """A tensor whose statistics NNCF needs.

    Attributes:
        operation: friendly name of the operation that makes it in the float graph.
        output: index of the operation's output.
        axis: axis of the channels; None if statistics of the whole tensor are enough.
    """

    operation: str
    output: int
    axis: int | None


@dataclass(frozen=True)
class ChannelStatistics:
    """Statistics of one tensor on one sample.

    Attributes:
        values: `least`, `greatest` and `mean`, as far as they were gathered: [channels], or [1] for the whole tensor; and
            `max_variance`: [1], the maximum of the variances along axis 1.
        shape: shape of the tensor.
    """

    values: Mapping[str, np.ndarray]
    shape: tuple[int, ...]


# Returns the statistics of a tensor on each sample; without an axis, it may return those of the channels.
Gather = Callable[[Observed], Sequence[ChannelStatistics]]


def statistic_points(container: Any) -> list[Any]:
    """All statistic points of a container."""
    return [point for points in container.values() for point in points]


def fill(container: Any, model: ov.Model, gather: Gather, one_row: bool = False) -> None:
    """Give the collectors of a container what they would have collected on the samples.

    SmoothQuant may have scaled activations of `model` already, which `gather` need not know.

    Args:
        container: the statistic points of one or more algorithms.
        model: the graph that they are about.
        gather: returns statistics of tensors of the float graph.
        one_row: whether sizes that may vary are reported as 1 for matrix products: bias correction computes the mean of
            their outputs for the mean of their inputs, for which one row is enough.

    Raises:
        ConversionError: if NNCF asks for something else than statistics of channels or of whole tensors.
    """
    from nncf.common.graph.transformations.commands import TargetType

    operations = {node.get_friendly_name(): node for node in model.get_ops()}
    for point in statistic_points(container):
        place = point.target_point
        node = operations[place.target_node_name]
        after = place.type == TargetType.POST_LAYER_OPERATION
        output = node.output(place.port_id) if after else node.input_value(place.port_id)
        collectors = [item for items in point.algorithm_to_tensor_collectors.values() for item in items]
        for collector in collectors:
            if place.is_weight_target_point():
                _fill_weight(collector, output.get_node())
            elif after and _wants_channel_means(collector) and _reads_weight(node):
                _fill_layer_output(collector, node, gather)
            else:
                _fill_activation(collector, output, gather, one_row and node.get_type_name() == "MatMul")


def _fill_weight(collector: Any, constant: ov.Node) -> None:
    from nncf.tensor import Tensor

    if constant.get_type_name() != "Constant":
        raise ConversionError(
            f"the weight {constant.get_friendly_name()} is computed in the graph: leave its layer float"
        )
    values = [Tensor(constant.data)]
    collector.register_inputs({hash(reducer): reducer._reduce_out_of_place(values) for reducer in collector.reducers})


def _wants_channel_means(collector: Any) -> bool:
    from nncf.common.tensor_statistics.collectors import MeanPerChReducer

    return any(isinstance(reducer, MeanPerChReducer) for reducer in collector.reducers)


def _reads_weight(node: ov.Node) -> bool:
    return any(value.get_node().get_type_name() == "Constant" for value in node.input_values())


def _fill_layer_output(collector: Any, node: ov.Node, gather: Gather) -> None:
    """Fill a collector of the means of a layer's outputs before the bias is added.

    Nobody looks at these outputs themselves: a graph in which they are visible would be computed with other kernels. The mean
    of matrix products is the product of the mean, and a convolution's mean is that after the bias minus the bias.
    """
    from nncf.tensor import Tensor

    if node.get_type_name() == "MatMul":
        weight, value = _operands(node)
        port = next(place for place in (0, 1) if node.input_value(place) == value)
        if node.get_attributes()["transpose_a" if port else "transpose_b"]:
            weight = weight.T
        factors = None
        if value.get_node().get_friendly_name().endswith(_SMOOTHING):
            factors, value = _operands(value.get_node())
        wanted = Observed(value.get_node().get_friendly_name(), value.get_index(), len(value.partial_shape) - 1)
        scale = 1 if factors is None else factors.reshape(-1)
        means = [(statistics.values["mean"] * scale) @ weight for statistics in gather(wanted)]
    else:
        add = next(iter(node.output(0).get_target_inputs())).get_node()
        bias = _operands(add)[0].reshape(-1)
        means = [statistics.values["mean"] - bias for statistics in gather(Observed(add.get_friendly_name(), 0, 1))]
    for mean in means:
        found = ChannelStatistics({"mean": mean}, mean.shape)
        reduced = {hash(item): [Tensor(_reduced(item, found, None, 0, [True]))] for item in collector.reducers}
        collector.register_inputs(reduced)


def _fill_activation(collector: Any, output: ov.Output, gather: Gather, one_row: bool) -> None:
    from nncf.tensor import Tensor

    whole = [not one_row or size.is_static for size in output.partial_shape]
    axis = _channel_axis(collector, len(whole))
    source, factors = output.get_node(), None
    if source.get_friendly_name().endswith(_SMOOTHING):
        factors, output = _operands(source)
        axis = next((place for place, size in enumerate(factors.shape) if size > 1), axis)
    wanted = Observed(output.get_node().get_friendly_name(), output.get_index(), axis)
    for statistics in gather(wanted):
        reduced = {
            hash(reducer): [Tensor(_reduced(reducer, statistics, factors, axis, whole))]
            for reducer in collector.reducers
        }
        collector.register_inputs(reduced)


def _operands(node: ov.Node) -> tuple[np.ndarray, ov.Output]:
    """The constant and the other input of an operation with two inputs."""
    first, second = node.input_values()
    constant, tensor = (first, second) if first.get_node().get_type_name() == "Constant" else (second, first)
    return constant.get_node().data, tensor


def _channel_axis(collector: Any, rank: int) -> int | None:
    """The axis that all reducers of a collector keep; None if they keep none."""
    from nncf.common.tensor_statistics.collectors import AxesMode, MaxVarianceReducer, MeanPerChReducer, ShapeReducer

    kept: set[int] = set()
    for reducer in collector.reducers:
        if isinstance(reducer, MeanPerChReducer):
            kept.add(range(rank)[reducer._channel_axis])
        elif not isinstance(reducer, ShapeReducer | MaxVarianceReducer) and reducer._axes is not None:
            axes = {range(rank)[axis] for axis in reducer._axes}
            kept |= axes if reducer._axes_mode == AxesMode.KEEP else set(range(rank)) - axes
    if len(kept) > 1:
        raise ConversionError(
            f"NNCF asks for statistics over the axes {sorted(kept)} of a tensor, which are not gathered"
        )
    return next(iter(kept), None)


def _reduced(
    reducer: Any,
    statistics: ChannelStatistics,
    factors: np.ndarray | None,
    axis: int | None,
    whole: Sequence[bool],
) -> np.ndarray:
    """What a reducer would return for a tensor.

    Args:
        reducer: the reducer.
        statistics: statistics of the tensor.
        factors: what SmoothQuant multiplies the tensor with.
        axis: axis of the channels.
        whole: for each axis, whether the real size is reported; otherwise it is 1.
    """
    from nncf.common.tensor_statistics.collectors import (
        AbsMaxReducer,
        MaxReducer,
        MaxVarianceReducer,
        MeanPerChReducer,
        MeanReducer,
        MinReducer,
        ShapeReducer,
    )

    if isinstance(reducer, ShapeReducer):
        sizes = zip(statistics.shape, whole, strict=True)
        return np.array([size if real or place == axis else 1 for place, (size, real) in enumerate(sizes)], np.int32)
    scale = np.float32(1) if factors is None else factors.reshape(-1)
    found = statistics.values
    if isinstance(reducer, MaxVarianceReducer):
        return found["max_variance"].reshape(())
    if isinstance(reducer, MeanPerChReducer):
        return found["mean"] * scale
    join: Callable[[np.ndarray], Any]
    if isinstance(reducer, MeanReducer):
        values, join = found["mean"] * scale, np.mean
    elif isinstance(reducer, MinReducer):
        values, join = found["least"] * scale, np.min
    elif isinstance(reducer, MaxReducer):
        values, join = found["greatest"] * scale, np.max
    elif isinstance(reducer, AbsMaxReducer):
        join = np.max
        values = np.maximum(np.abs(found["least"]), np.abs(found["greatest"])) * scale
    else:
        raise ConversionError(f"NNCF asks for {type(reducer).__name__}, a statistic that is not gathered")
    shape = [1] * len(whole)
    if reducer._axes is None or len(reducer._axes) == len(shape):
        return np.array(join(values), values.dtype).reshape(shape)
    assert axis is not None
    shape[axis] = -1
    return values.reshape(shape)
