from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import nncf
import numpy as np
import openvino as ov
import pytest
from openvino import opset13

from passes.compat.nncf import INPUT_SCALINGS, adjusted_group_size, compress_int4, layer_scores
from passes.compat.nncf_quantize import observed_tensors, quantize
from passes.compat.nncf_statistics import ChannelStatistics, Gather, Observed
from passes.compress.nncf_output import quiet_nncf
from passes.compress.sensitivity import LayerScore, layers_in_8_bit
from passes.onnx.compressed import CompressedGraph, Constant, QuantizedWeight

pytestmark = pytest.mark.slow

ADJUST = nncf.AdvancedCompressionParameters(group_size_fallback_mode=nncf.GroupSizeFallbackMode.ADJUST)


def graph(columns: int = 128, layers: int = 2) -> ov.Model:
    """Layers fc0, fc1, ... with SiLU between them; the inputs and the weights of some channels are large."""
    random = np.random.default_rng(0)
    x = opset13.parameter([-1, columns], name="x")
    x.output(0).set_names({"x"})
    value = x.output(0)
    for number in range(layers):
        weight = random.standard_normal((columns, columns)).astype(np.float32) * (1 + number)
        weight[::7] *= 8
        constant = opset13.constant(weight, name=f"fc{number}.weight")
        product = opset13.matmul(value, constant, False, True, name=f"fc{number}")
        value = opset13.swish(product, name=f"swish{number}").output(0)
    return ov.Model([value], [x], "graph")


def samples(columns: int = 128) -> list[dict[str, np.ndarray]]:
    random = np.random.default_rng(1)
    scale = np.where(np.arange(columns) % 5, 1, 30).astype(np.float32)
    return [{"x": random.standard_normal((8, columns)).astype(np.float32) * scale} for _ in range(4)]


def gatherer(model: ov.Model, data: list[dict[str, np.ndarray]]) -> Gather:
    """Statistics of the tensors of a float graph on samples, computed with numpy."""
    model = model.clone()  # NNCF may change the graph
    operations = {node.get_friendly_name(): node for node in model.get_ops()}

    def of_sample(value: np.ndarray, axis: int | None) -> ChannelStatistics:
        axes = tuple(place for place in range(value.ndim) if place != axis)
        found = {"least": value.min(axes), "greatest": value.max(axes), "mean": value.mean(axes)}
        found["max_variance"] = value.var(1).max()
        return ChannelStatistics({name: np.atleast_1d(array) for name, array in found.items()}, value.shape)

    def gather(tensor: Observed) -> list[ChannelStatistics]:
        output = operations[tensor.operation].output(tensor.output)
        compiled = ov.compile_model(
            ov.Model([output], model.get_parameters()), "CPU", {"INFERENCE_PRECISION_HINT": "f32"}
        )
        return [of_sample(np.array(compiled(sample)[0]), tensor.axis) for sample in data]

    return gather


def compress(folder: Path, model: ov.Model, **options) -> CompressedGraph:
    with quiet_nncf():
        ov.save_model(nncf.compress_weights(model, **options), folder / "graph.xml")
    return CompressedGraph(folder / "graph.xml")


def values(constant: Constant) -> np.ndarray:
    """The values of a constant, each code of its own."""
    place = constant.place
    data = np.frombuffer(place.file.read_bytes()[place.offset : place.offset + place.size], np.uint8)
    if constant.dtype in {"u4", "i4"}:
        data = np.stack([data & 15, data >> 4], axis=-1).ravel()
        data = data.astype(np.int8) - (16 * (data > 7) if constant.dtype == "i4" else 0)
    else:
        data = data.view({"i8": np.int8, "u8": np.uint8, "f16": np.float16, "f32": np.float32}[constant.dtype])
    return data.astype(np.float32)


def test_name_of_awqs_multiplication(tmp_path):
    found = compress(
        tmp_path, graph(), mode=nncf.CompressWeightsMode.INT4_ASYM, group_size=64, all_layers=True, awq=True
    )
    names = [node.get_friendly_name() for node in ov.Core().read_model(tmp_path / "graph.xml").get_ops()]
    assert any(name.endswith(INPUT_SCALINGS[0]) for name in names), (
        f"NNCF no longer names AWQ's multiplications {INPUT_SCALINGS[0]}: ONNX artifacts would lose AWQ's scales"
    )
    assert found.activation("fc1").factors is not None, (
        "AWQ's multiplication is no longer in front of the layer: ONNX artifacts would lose AWQ's scales"
    )


def test_name_of_smooth_quants_multiplication(tmp_path):
    with quiet_nncf():
        model = nncf.quantize(graph(), nncf.Dataset(samples()), model_type=nncf.ModelType.TRANSFORMER, subset_size=4)
    ov.save_model(model, tmp_path / "graph.xml")
    activation = CompressedGraph(tmp_path / "graph.xml").activation("fc0")
    assert activation.factors is not None, (
        f"NNCF no longer names SmoothQuant's multiplications {INPUT_SCALINGS[1]}: ONNX artifacts would lose their scales"
    )
    assert activation.scale > 0, (
        "NNCF no longer puts a FakeQuantize with one scale in front of a layer: ONNX artifacts would compute in float"
    )
    weight = CompressedGraph(tmp_path / "graph.xml").weight("fc0.weight")
    assert isinstance(weight, QuantizedWeight), (
        "quantized weights are no longer scaled codes: ONNX artifacts would be float"
    )


@pytest.mark.parametrize("mode", ["INT8_ASYM", "INT8_SYM", "INT4_ASYM", "INT4_SYM"])
def test_compressed_weights_are_scaled_codes(tmp_path, mode):
    grouped = {"group_size": 64, "all_layers": True} if "INT4" in mode else {}
    model = graph()
    original = next(node.data.copy() for node in model.get_ops() if node.get_friendly_name() == "fc0.weight")
    weight = compress(tmp_path, model, mode=nncf.CompressWeightsMode[mode], **grouped).weight("fc0.weight")
    assert isinstance(weight, QuantizedWeight), f"{mode}: {weight} is not read as scaled codes by ONNX artifacts"

    parts = [part for part in (weight.scale, weight.zero_point) if part is not None]
    assert all(part.shape[-1] == 1 for part in parts), (
        "the innermost dimension of scales and zero points is no longer 1: manifests would count them as weights"
    )
    shape = (128, weight.groups, -1)
    points = 0 if weight.zero_point is None else values(weight.zero_point).reshape(shape)
    codes, scale = values(weight.codes).reshape(shape), values(weight.scale).reshape(shape)
    restored = ((codes - points) * scale).reshape(original.shape)
    step = values(weight.scale).max()
    assert np.abs(restored - original).max() <= step, (
        f"{mode}: weights are no longer (codes - zero point) * scale: ONNX artifacts would hold other weights"
    )


@pytest.mark.parametrize("columns", [64, 96, 160, 80])
def test_group_size_is_adjusted_by_the_same_rule(tmp_path, columns):
    options = {"mode": nncf.CompressWeightsMode.INT4_ASYM, "group_size": 64, "all_layers": True}
    weight = compress(tmp_path, graph(columns), **options, advanced_parameters=ADJUST).weight("fc0.weight")
    found = columns // weight.groups if weight.bits == 4 else None
    assert found == adjusted_group_size(columns, 64), (
        f"NNCF gives a layer of {columns} channels another group size than adjusted_group_size says: plans and manifests "
        "would be wrong about sizes and fallbacks"
    )


def test_scores_choose_the_layers_that_nncf_chooses(tmp_path):
    dataset = nncf.Dataset(samples())
    with quiet_nncf():
        scores = layer_scores(graph(layers=5), gatherer(graph(layers=5), samples()), 4, 64)
    assert [name for name, _, _ in scores] == [f"fc{number}.weight" for number in range(5)]
    found = compress(
        tmp_path,
        graph(layers=5),
        mode=nncf.CompressWeightsMode.INT4_ASYM,
        group_size=64,
        ratio=0.6,
        all_layers=True,
        dataset=dataset,
        subset_size=4,
    )
    in_8_bit = {name for name, _, _ in scores if found.weight(name).bits == 8}
    assert 0 < len(in_8_bit) < 5
    assert in_8_bit == layers_in_8_bit([LayerScore(*score) for score in scores], 0.6), (
        "NNCF scores layers in another way than layer_scores: --ratio would choose other layers than NNCF on the whole graph"
    )


@pytest.mark.parametrize("symmetric", [False, True])
def test_int4_from_statistics_is_that_of_nncf(tmp_path, symmetric):
    model = graph(layers=4)
    gather = gatherer(model, samples())
    with quiet_nncf():
        ours = compress_int4(model, gather, 4, 64, symmetric, True, True, nncf.IgnoredScope())
    ov.save_model(ours, tmp_path / "ours.xml")
    found = CompressedGraph(tmp_path / "ours.xml")
    whole = compress(
        tmp_path,
        graph(layers=4),
        mode=nncf.CompressWeightsMode.INT4_SYM if symmetric else nncf.CompressWeightsMode.INT4_ASYM,
        group_size=64,
        all_layers=True,
        awq=True,
        scale_estimation=True,
        dataset=nncf.Dataset(samples()),
        subset_size=4,
    )
    for number in range(4):
        one, other = (graph.weight(f"fc{number}.weight") for graph in (found, whole))
        equal = (values(one.codes) == values(other.codes)).mean()
        assert equal > 0.999, (
            f"only {equal:.1%} of the codes of fc{number} are those of nncf.compress_weights: compress_int4 no longer gives "
            "NNCF the statistics that it would collect"
        )


def test_int8_from_statistics_is_that_of_nncf(tmp_path):
    model = graph(layers=4)
    needed, shared = observed_tensors(graph(layers=4), 0.6, [])
    assert ("x", 1) in [(tensor.operation, tensor.axis) for tensor in needed]
    assert shared == {"x": [("fc0.weight", 1)]}
    with quiet_nncf():
        ours = quantize(model, gatherer(model, samples()), 4, 0.6)
        whole = nncf.quantize(
            graph(layers=4),
            nncf.Dataset(samples()),
            subset_size=4,
            model_type=nncf.ModelType.TRANSFORMER,
            advanced_parameters=nncf.AdvancedQuantizationParameters(
                smooth_quant_alphas=nncf.AdvancedSmoothQuantParameters(matmul=0.6)
            ),
        )
    graphs = []
    for name, model in (("ours", ours), ("whole", whole)):
        ov.save_model(model, tmp_path / f"{name}.xml")
        graphs.append(CompressedGraph(tmp_path / f"{name}.xml"))
    for number in range(4):
        one, other = (graph.weight(f"fc{number}.weight") for graph in graphs)
        first, second = (graph.activation(f"fc{number}") for graph in graphs)
        assert (values(one.codes) == values(other.codes)).mean() > 0.999, f"fc{number}: other codes than nncf.quantize"
        assert first.scale == pytest.approx(second.scale, rel=1e-3), f"fc{number}: another range than nncf.quantize"


def test_nncf_can_do_without_torch():
    program = """
import sys
from passes.compat.nncf import without_torch
with without_torch():
    import nncf, numpy, openvino
    x = openvino.opset13.parameter([-1, 64])
    product = openvino.opset13.matmul(x, openvino.opset13.constant(numpy.ones((64, 64), numpy.float32)), False, True)
    nncf.compress_weights(openvino.Model([product], [x]))
assert "torch" not in sys.modules
import torch
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert ended.returncode == 0, f"NNCF needs torch now: every worker would take 0.2 GB more\n{ended.stderr}"
