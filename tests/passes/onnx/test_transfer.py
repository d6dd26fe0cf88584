"""Transferred blocks in ONNX Runtime against the same blocks in OpenVINO."""

from __future__ import annotations

import nncf
import numpy as np
import onnx
import onnxruntime as ort
import pytest

from calibration.scenes import Split
from calibration.sources import load_samples
from manifests.errors import ConversionError
from passes.compress.nncf_output import quiet_nncf
from passes.compress.weights import CompressInt4Pass, CompressInt8Pass
from passes.export.ir import BLOCK_FILE
from passes.export.ir import count_weights as count_ir_weights
from passes.export.openvino import save_block
from passes.onnx.compressed import CompressedGraph
from passes.onnx.file import count_weights, read, write
from passes.onnx.session import OnnxSession
from passes.onnx.stitch import StitchOnnxPass
from passes.onnx.transfer import TransferOnnxPass
from tests.conftest import exhaustive_but
from tests.passes.onnx import modules
from tests.passes.onnx.conftest import both_runtimes, greatest_difference, inputs_of
from tests.passes.test_float_parity import process
from vlmconvert import load_processor
from vlmconvert.running.open import open_runner

pytestmark = pytest.mark.slow

PASSES = {
    "int8": CompressInt8Pass(),
    "int8 symmetric": CompressInt8Pass(symmetric=True),
    "int4": CompressInt4Pass(),
    "int4 symmetric, whole rows, all layers": CompressInt4Pass(symmetric=True, group_size=-1, all_layers=True),
    "int4 in groups of 32, all layers": CompressInt4Pass(group_size=32, all_layers=True),
}


@pytest.mark.parametrize("name", exhaustive_but(["int8", "int4"], PASSES))
def test_every_kind_computes_what_its_openvino_block_computes(traced, tmp_path, name):
    for kind, block in traced.kinds().values():
        folder = tmp_path / block.kind
        folder.mkdir()
        PASSES[name].run(traced.source(block), folder)
        expected, actual, _ = both_runtimes(block, kind, traced.traces, folder, inputs_of(kind))
        assert greatest_difference(expected, actual) < 1e-5, block.kind
        assert count_weights(folder / "block.onnx") == count_ir_weights(folder / BLOCK_FILE), block.kind


def test_activations_in_8_bit_cost_little(traced, tmp_path):
    """What ships computes with 8-bit activations."""
    kind, block = traced.kinds()["self_attention_layer"]
    CompressInt4Pass().run(traced.source(block), tmp_path)
    expected, actual, _ = both_runtimes(block, kind, traced.traces, tmp_path, inputs_of(kind), level=4)
    assert 1e-5 < greatest_difference(expected, actual) < 0.05


# Width, inner width: groups of 32 in odd number; rows that no power of two divides; rows of a single, padded block.
SHAPES = [(96, 160), (100, 36), (24, 20)]


@pytest.mark.parametrize(("width", "inner"), SHAPES)
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
def test_awkward_shapes(tmp_path, width, inner, symmetric, bits):
    source, kind = modules.make(tmp_path, width, inner)
    group = 32 if width % 32 == 0 else -1
    item = CompressInt8Pass(symmetric) if bits == 8 else CompressInt4Pass(group, symmetric, all_layers=True)
    item.run(source, tmp_path)
    expected, actual, model = both_runtimes(source.block, kind, tmp_path, tmp_path, modules.sample(0))
    assert [node.op_type for node in model.graph].count("MatMulNBits") == 2
    assert greatest_difference(expected, actual) < 1e-5


def test_awq_factors_that_no_layer_takes_in(tmp_path):
    """Behind SiLU, AWQ multiplies activations; without the factors the block would be far off."""
    source, kind = modules.make(tmp_path, 128, 128)
    with quiet_nncf():
        model = nncf.compress_weights(
            source.model(),
            mode=nncf.CompressWeightsMode.INT4_ASYM,
            group_size=32,
            all_layers=True,
            awq=True,
            dataset=nncf.Dataset([modules.sample(seed) for seed in range(4)]),
        )
    save_block(model, source, tmp_path)
    factors = CompressedGraph(tmp_path / BLOCK_FILE).activation("model.block.fc2").factors
    assert factors is not None
    assert np.ptp(factors.read()) > 0
    expected, actual, model = both_runtimes(source.block, kind, tmp_path, tmp_path, modules.sample(9))
    assert "model.block.fc2/scaled_input" in {node.name for node in model.graph}
    assert greatest_difference(expected, actual) < 1e-5


def test_a_missing_weight_is_named(traced, tmp_path):
    _, block = traced.kinds()["lm_head"]
    CompressInt8Pass().run(traced.source(block), tmp_path)
    with pytest.raises(ConversionError, match=r"block.xml has no weight model.other.weight"):
        CompressedGraph(tmp_path / BLOCK_FILE).weight("model.other.weight")


@pytest.fixture(scope="module")
def quantized(build, traced, tmp_path_factory):
    """The vision encoder after post-training quantization, in both targets."""
    artifact = build("--llm", "int4", "--vision", "int8-ptq", "--vision-samples", "8")
    component = traced.components["vision_encoder"]
    graph = CompressedGraph(artifact / "openvino_vision_encoder.xml")
    blocks = (TransferOnnxPass().transfer(block, traced.traces, graph) for block in component.blocks)
    model, weights = StitchOnnxPass().join(component, blocks)
    path = tmp_path_factory.mktemp("quantized") / "vision_encoder.onnx"
    write(model, weights, path)
    return artifact, path


@pytest.mark.exhaustive
def test_quantized_encoder_is_as_close_to_the_float_one_as_openvinos(quantized, floats, demo):
    artifact, path = quantized
    images = [sample.images for sample in load_samples("scenes", 4, split=Split.TEST).samples]
    processed = process(load_processor(demo), ["What is there?"] * 4, images)
    runner = open_runner(artifact)
    theirs = runner.encode_images(processed)
    values = runner.family.inputs(processed, runner.config)
    exact, ours = (
        {name: value.numpy() for name, value in OnnxSession(graph).infer(values).items()}
        for graph in (floats("f32")["vision_encoder"], path)
    )
    errors = [
        sum(float(np.linalg.norm(side[name] - exact[name]) / np.linalg.norm(exact[name])) for name in exact)
        for side in (ours, theirs)
    ]
    assert 0 < errors[0] < 1.1 * errors[1] < 0.05 * len(exact)


def test_every_layer_of_the_quantized_encoder_runs_in_8_bit(quantized, tmp_path):
    """ONNX Runtime fuses what it computes with integers; a graph that it cannot fuse would run, slower, in float."""
    artifact, path = quantized
    layers = sum(node.op_type == "MatMul" and node.name.startswith("model.") for node in read(path).graph.node)
    assert layers == 6 * 6 + 1 + 4 * 2
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    options.log_severity_level = 3
    ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    fused = [node.op_type for node in onnx.load(tmp_path / "optimized.onnx", load_external_data=False).graph.node]
    assert fused.count("MatMulIntegerToFloat") == layers
    assert count_weights(path)["int8"] == count_ir_weights(artifact / "openvino_vision_encoder.xml")["int8"]
