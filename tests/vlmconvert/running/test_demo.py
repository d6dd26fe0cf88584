"""The embedded demos: they must be real, or the figures measured on them mean nothing."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from calibration.scenes import Split, draw_scene
from manifests.io import read_manifest
from tests.conftest import exhaustive_but, vlmconvert
from vlmconvert.demo.training import exact_match
from vlmconvert.families import FAMILIES, demo_checkpoint

pytestmark = pytest.mark.slow

QUESTIONS = 500
BLANKED = 200
WITH_DEMO = [family for family in FAMILIES.names if demo_checkpoint(family)]


@pytest.fixture(scope="module", params=WITH_DEMO)
def demo(request):
    return demo_checkpoint(request.param)


@pytest.fixture(scope="module")
def model(demo):
    return AutoModelForImageTextToText.from_pretrained(demo, dtype=torch.float32)


def test_which_families_have_one():
    assert WITH_DEMO == ["mllama", "llava"]


def test_it_is_small(demo):
    assert sum(path.stat().st_size for path in demo.iterdir()) <= 16_000_000


@pytest.mark.parametrize("demo", ["mllama"], indirect=True)
def test_it_has_every_trait_of_the_large_one(demo, model):
    config = json.loads((demo / "config.json").read_text())
    text, vision = config["text_config"], config["vision_config"]
    assert 0 < len(text["cross_attention_layers"]) < text["num_hidden_layers"]
    assert 1 < text["num_key_value_heads"] < text["num_attention_heads"]
    assert text["rope_parameters"]["rope_type"] == "llama3"
    assert vision["max_num_tiles"] == 4
    assert len(vision["supported_aspect_ratios"]) == 8
    assert vision["num_hidden_layers"] > 0
    assert vision["num_global_layers"] > 0
    assert vision["intermediate_layers_indices"]
    gates = {name: value for name, value in model.named_parameters() if value.numel() == 1}
    assert len(gates) == 2 * len(text["cross_attention_layers"]) + 2 * vision["num_global_layers"] + 3
    assert all(value.abs() > 0.02 for value in gates.values()), gates


def test_it_needs_the_image_to_answer(demo, model):
    """How often it is right with the image, a conversion says; see below."""
    processor = AutoProcessor.from_pretrained(demo, backend="pil")
    blind = exact_match(model, processor, BLANKED, blank=True)
    print(f"exact match with the image blanked {blind:.1%}")
    assert blind <= 0.95 / 2


def test_teacher_forced_accuracy_is_that_of_generate(demo, model):
    processor = AutoProcessor.from_pretrained(demo, backend="pil")
    right = 0
    for index in range(20):
        scene = draw_scene(Split.TEST, index)
        content = [{"type": "image"}, {"type": "text", "text": scene.questions[0].text}]
        text = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        inputs = processor(images=scene.image, text=text, return_tensors="pt", add_special_tokens=False)
        tokens = model.generate(**inputs, max_new_tokens=8)[0, inputs["input_ids"].shape[1] :]
        right += processor.decode(tokens, skip_special_tokens=True).strip() == scene.questions[0].answer
    assert right / 20 == exact_match(model, processor, 20)


@pytest.fixture(scope="module", params=exhaustive_but(["mllama"], WITH_DEMO))
def validated(request, tmp_path_factory, store):
    """The manifest of the default conversion, validated on all questions; ONNX holds the same codes."""
    output = tmp_path_factory.mktemp("validated") / "out"
    options = ("--llm", "int4-awq", "--vision", "int8-ptq", "--validation-samples", QUESTIONS)
    result = vlmconvert(request.param, *options, "--store", store, "-o", output)
    assert result.exit_code == 0, result.output
    return read_manifest(output)


def figure(manifest, metric, component):
    return next(item for item in manifest.validation if (item.metric, item.component) == (metric, component))


def test_the_default_conversion_loses_at_most_a_point(validated):
    accuracy = figure(validated, "exact_match", "artifact")
    print(f"checkpoint {accuracy.reference:.1%}, artifact {accuracy.value:.1%}")
    assert accuracy.samples == QUESTIONS
    assert accuracy.reference >= 0.95
    assert accuracy.value >= accuracy.reference - 0.01


def test_every_component_and_the_whole_are_measured(validated):
    measured = {(item.metric, item.component) for item in validated.validation}
    vision = validated.components[0].name
    for component in (vision, "language_model", "artifact"):
        assert {(metric, component) for metric in ("kl", "top1_agreement", "max_abs_logit_difference")} <= measured


@pytest.mark.exhaustive
def test_awq_is_closer_to_the_checkpoint_than_plain_int4(validated, tmp_path, store):
    """What the calibration is for: the demos have outlier channels, as large models have."""
    options = ("--llm", "int4", "--vision", "int8-ptq", "--validation-samples", QUESTIONS)
    result = vlmconvert(validated.family, *options, "--store", store, "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    plain = figure(read_manifest(tmp_path / "out"), "kl", "language_model").value
    calibrated = figure(validated, "kl", "language_model").value
    print(f"KL of int4 {plain:.2g}, of int4-awq {calibrated:.2g}")
    assert calibrated < plain
