"""The float ONNX graphs against the checkpoint in torch: prefill, decode, padding, text alone, two images."""

from __future__ import annotations

import numpy as np
import onnx
import pytest

from manifests.files import file_record
from manifests.model import OnnxRequirements
from passes.onnx.file import data_file, ports, requirements
from passes.onnx.session import OnnxSession
from tests.passes.test_float_parity import CASES, TOLERANCE, assert_close, process
from vlmconvert import load_processor
from vlmconvert.families import load_family
from vlmconvert.families.mllama.reference import Reference

pytestmark = pytest.mark.exhaustive


class Graphs:
    """Both graphs of an artifact, called as its user would call them."""

    def __init__(self, paths, config) -> None:
        self.family, self.config = load_family("mllama"), config
        self.vision, self.language = OnnxSession(paths["vision_encoder"]), OnnxSession(paths["language_model"])

    def prefill(self, processed):
        self.inputs = self.family.inputs(processed, self.config)
        if "pixel_values" in self.inputs:
            self.inputs |= self.vision.infer(self.inputs)
        self.language.reset()
        return self.language.infer(self.inputs)["logits"].numpy()

    def step(self, tokens, beam_idx=None):
        self.inputs = self.family.next_inputs(self.inputs, tokens)
        return self.language.infer(self.inputs, beam_idx)["logits"].numpy()


@pytest.fixture(scope="module")
def reference(demo):
    return Reference(demo)


@pytest.fixture(scope="module")
def processor(demo):
    return load_processor(demo)


@pytest.fixture(scope="module", params=[("f32", "all"), ("f16", "last")])
def graphs(request, floats, traced):
    return Graphs(floats(*request.param), traced.model.config)


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_the_checkpoint(graphs, reference, processor, case):
    processed = process(processor, *CASES[case])
    expected = reference.prefill(processed)
    assert_close(expected, graphs.prefill(processed))
    for _ in range(16):
        tokens = expected[:, -1].argmax(axis=-1)
        expected = reference.step(tokens)
        assert_close(expected, graphs.step(tokens))


def test_all_logits_are_those_of_every_position(floats, traced, reference, processor):
    processed = process(processor, *CASES["batch of two with padding"])
    expected = reference.prefill(processed)
    graphs = Graphs(floats("f32"), traced.model.config)
    actual = graphs.prefill(processed)
    assert actual.shape == expected.shape
    valid = processed["attention_mask"] == 1
    assert np.abs(actual - expected)[valid].max() <= TOLERANCE * np.ptp(expected)


def test_beams_take_over_each_others_cache(graphs, processor):
    """Two beams of one prompt that part at their first token, and change places before the second."""
    processed = process(processor, *CASES["batch of two with padding"])
    beams = {name: np.repeat(value[:1], 2, axis=0) for name, value in processed.items()}
    first = np.argsort(graphs.prefill(beams)[0, -1])[-2:]
    graphs.step(first)
    straight = graphs.step(np.array([7, 7]))
    graphs.prefill(beams)
    graphs.step(first)
    swapped = graphs.step(np.array([7, 7]), beam_idx=np.array([1, 0]))
    assert np.abs(straight[0] - straight[1]).max() > 1e-2
    np.testing.assert_allclose(swapped[::-1], straight, atol=1e-4)


def test_names_and_shapes_are_those_of_the_ecosystem(floats):
    paths = floats("f16", "last")
    inputs, outputs = ({port.name: port for port in side} for side in ports(paths["language_model"]))
    assert list(inputs)[:3] == ["input_ids", "attention_mask", "position_ids"]
    assert inputs["past_key_values.2.key"].shape == ["batch", 2, "past_sequence", 32]
    assert outputs["present.2.key"].shape == ["batch", 2, "total_sequence", 32]
    assert {name for name in inputs if name.startswith("past")} == {
        f"past_key_values.{index}.{part}" for index in (0, 2, 4, 6) for part in ("key", "value")
    }
    assert next(iter(outputs)) == "logits"
    assert outputs["logits"].shape == ["batch", 1, 512]
    assert "beam_idx" not in inputs


@pytest.mark.parametrize("dtype", ["f32", "f16"])
def test_files_are_valid_onnx_and_ask_for_little(floats, dtype):
    for path in floats(dtype, "all" if dtype == "f32" else "last").values():
        onnx.checker.check_model(path, full_check=True)
        assert requirements(path) == OnnxRequirements(opset=18, domains={}, onnxruntime="1.15")
        assert path.stat().st_size < data_file(path).stat().st_size / 10


def test_equal_inputs_give_equal_bytes(traced, floats, tmp_path):
    again = traced.export("language_model", "f16", tmp_path, "last")
    first = floats("f16", "last")["language_model"]
    assert again.read_bytes() == first.read_bytes()
    assert file_record(data_file(again), tmp_path).sha256 == file_record(data_file(first), first.parent).sha256
