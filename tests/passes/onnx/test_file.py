"""Finished ONNX files: what they hold, where their blocks lie, and what they need."""

from __future__ import annotations

import shutil

import onnx
import openvino as ov
import pytest

from manifests.model import ComponentRecord, OnnxRequirements
from passes.chain import compile_block
from passes.compress.weights import CompressInt4Pass
from passes.export.ir import count_weights as count_ir_weights
from passes.export.openvino import BLOCK_FILE
from passes.onnx.checksums import block_checksums, block_constants
from passes.onnx.cut import cut
from passes.onnx.file import count_weights, data_file, ports, requirements
from passes.onnx.graphs import verify_graph
from passes.onnx.session import OnnxSession
from tests.passes.onnx.conftest import greatest_difference, inputs_of

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def language_model(traced, tmp_path_factory):
    """The language model in int4, and the folder with its OpenVINO blocks."""
    folder = tmp_path_factory.mktemp("int4")
    return traced.compress("language_model", CompressInt4Pass(), folder)


@pytest.fixture
def component(traced):
    return traced.components["language_model"]


def test_weights_are_those_of_the_openvino_blocks(language_model, component):
    counts = {}
    for block in component.blocks:
        for dtype, count in count_ir_weights(language_model.parent / block.name / BLOCK_FILE).items():
            counts[dtype] = counts.get(dtype, 0) + count
    assert count_weights(language_model) == counts
    assert set(counts) == {"int4", "int8"}


def test_what_it_needs_is_read_from_the_graph(language_model):
    onnx.checker.check_model(language_model)
    # 8-bit MatMulNBits, of the LM head.
    assert requirements(language_model) == OnnxRequirements(opset=18, domains={"com.microsoft": 1}, onnxruntime="1.22")


def test_a_flipped_bit_is_traced_to_its_block(language_model, component, tmp_path):
    copy = tmp_path / language_model.name
    for path in (language_model, data_file(language_model)):
        shutil.copy(path, tmp_path)
    before = block_checksums(copy, component)
    assert list(before) == [block.name for block in component.blocks if block.tensors]
    offset, size = block_constants(copy, component)["layers.3"][-1]
    data = bytearray(data_file(copy).read_bytes())
    data[offset + size // 2] ^= 1
    data_file(copy).write_bytes(data)
    after = block_checksums(copy, component)
    assert [name for name in before if before[name] != after[name]] == ["layers.3"]


def test_a_block_can_be_cut_out(language_model, component):
    """What is cut out of the artifact computes what the compressed OpenVINO block computes, within 8-bit activations."""
    kinds = {block.kind: block for block in component.blocks}  # the last of each kind
    for block in kinds.values():
        kind = component.kinds[block.kind]
        values = inputs_of(kind)
        graph = cut(language_model, component, block)
        assert [item.name for item in graph.graph.input] == [port.name for port in kind.inputs]
        engine = OnnxSession(graph, weights=language_model.parent)
        actual = [value.numpy() for value in engine.infer(values).values()]
        xml = language_model.parent / block.name / BLOCK_FILE
        expected = list(compile_block(ov.Core().read_model(xml))(values).values())
        if block.role == "head":
            expected = [expected[0][:, -1:]]
        assert greatest_difference(expected, actual) < 0.06, block.name


def record(path, component) -> ComponentRecord:
    inputs, outputs = ports(path)
    return ComponentRecord(
        name=component.name,
        role=component.role,
        format="openvino",
        precision="int4",
        files=[],
        inputs=inputs,
        outputs=outputs,
        state=[],
        logits="last",
        weights=count_weights(path),
        blocks={},
        passes=[],
        fallbacks=[],
    )


def test_a_graph_is_what_its_manifest_says(language_model, component):
    assert {check.outcome for check in verify_graph(record(language_model, component), language_model)} == {"passed"}


def test_a_graph_that_is_not_what_its_manifest_says(language_model, component):
    claim = record(language_model, component)
    claim = claim.model_copy(
        update={
            "inputs": [claim.inputs[0].model_copy(update={"dtype": "i32"}), *claim.inputs[1:]],
            "weights": {**claim.weights, "int4": 1},
            "logits": "all",
        }
    )
    findings = {check.check for check in verify_graph(claim, language_model) if check.outcome == "failed"}
    assert findings == {"inputs", "weights", "logits"}


def test_a_damaged_graph_is_a_finding(language_model, component, tmp_path):
    damaged = tmp_path / "language_model.onnx"
    damaged.write_bytes(language_model.read_bytes()[:1000])
    (finding,) = verify_graph(record(language_model, component), damaged)
    assert finding.outcome == "failed"
    assert "not valid ONNX" in finding.detail
