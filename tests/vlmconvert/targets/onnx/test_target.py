"""ONNX folders: what is in them, and every command on them as on OpenVINO folders."""

import json
import subprocess

import numpy as np
import onnx
import pytest
import torch
from transformers import MllamaForConditionalGeneration

import vlmconvert as package
from calibration.scenes import Split, draw_scene
from manifests.evaluation import read_evaluation
from manifests.io import read_manifest
from tests.benchmarks.oldest_onnxruntime import BEFORE, graphs_by_release, install_onnxruntime, run_graph
from tests.conftest import vlmconvert
from tests.garbage import copy, flip_bit
from tests.prompts import chat_prompt, process
from vlmconvert import load_processor
from vlmconvert.running.open import open_runner

pytestmark = pytest.mark.slow

EXACT = ("--target", "onnx", "--llm", "fp32", "--vision", "fp32")
SMALL = ("--target", "onnx", "--llm", "int4-awq", "--vision", "int8-ptq", "--samples", "4", "--vision-samples", "4")


@pytest.fixture(scope="module")
def exact(build):
    return build(*EXACT)


@pytest.fixture(scope="module")
def small(build):
    return build(*SMALL)


def dims(value):
    return [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]


@pytest.mark.parametrize("precision", ["exact", "small"])
def test_graphs_are_valid_and_named_as_the_ecosystem_names_them(precision, request):
    folder = request.getfixturevalue(precision)
    for stem in ("vision_encoder", "language_model"):
        onnx.checker.check_model(folder / f"{stem}.onnx", full_check=precision == "exact")
    graph = onnx.load(folder / "language_model.onnx", load_external_data=False).graph
    inputs, outputs = ({item.name: dims(item) for item in ports} for ports in (graph.input, graph.output))
    for layer in (0, 2, 4, 6):
        for part in ("key", "value"):
            assert inputs[f"past_key_values.{layer}.{part}"] == ["batch", 2, "past_sequence", 32]
            assert outputs[f"present.{layer}.{part}"] == ["batch", 2, "total_sequence", 32]
    assert inputs["input_ids"] == ["batch", "sequence"]
    assert outputs["logits"] == ["batch", 1, 512]
    assert "beam_idx" not in inputs
    weights = [item for item in graph.initializer if item.external_data]
    assert sum(int(entry.value) for item in weights for entry in item.external_data if entry.key == "length") > (
        0.9 * (folder / "language_model.onnx.data").stat().st_size
    )


def test_the_manifest_says_what_a_runtime_needs(exact, small):
    needs = {
        folder: {item.name: item.requires for item in read_manifest(folder).components} for folder in (exact, small)
    }
    for component in ("vision_encoder", "language_model"):
        assert needs[exact][component].opset == 18
        assert needs[exact][component].domains == {}
        assert needs[exact][component].onnxruntime == "1.15"
    assert needs[small]["vision_encoder"].onnxruntime == "1.15"
    assert needs[small]["language_model"].domains == {"com.microsoft": 1}
    assert needs[small]["language_model"].onnxruntime == "1.22"


@pytest.mark.exhaustive
@pytest.mark.parametrize("release", BEFORE)
def test_the_oldest_onnxruntime_of_the_manifest_runs_it_and_the_one_before_does_not(
    release, exact, small, build, tmp_path
):
    four = build("--target", "onnx", "--llm", "int4", "--all-layers", "--vision", "fp32")
    graphs = graphs_by_release((exact, small, four))
    assert set(graphs) == set(BEFORE)
    for number in filter(None, (release, BEFORE[release])):
        folder = tmp_path / number
        try:
            install_onnxruntime(number, folder)
        except subprocess.CalledProcessError:
            pytest.skip(f"needs onnxruntime {number} for this Python from a package index")
        for graph in graphs[release]:
            error = run_graph(graph, number, folder)
            assert (error == "") == (number == release), error


@pytest.fixture(scope="module")
def prompts(exact):
    processor = load_processor(exact)

    def make(numbers):
        scenes = [draw_scene(Split.TEST, number) for number in numbers]
        texts = [chat_prompt(processor, ((scene.questions[0].text, None),)) for scene in scenes]
        return process(processor, texts, [[scene.image] for scene in scenes], tensors="pt")

    return make


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"do_sample": True, "top_k": 20}], ids=str)
def test_generate_gives_the_checkpoints_tokens(exact, demo, prompts, options):
    model = package.load(exact)
    peer = MllamaForConditionalGeneration.from_pretrained(demo, dtype=torch.float32).eval()
    for first in range(0, 20, 4):
        inputs = prompts(range(first, first + 4))
        answers = []
        for side in (peer, model):
            torch.manual_seed(first)
            answers.append(side.generate(**inputs, **options, max_new_tokens=8))
        assert torch.equal(*answers), first


def test_both_targets_hold_the_same_codes(build, small, demo, prompts):
    twin = build(*(option for option in SMALL if option not in {"--target", "onnx"}))
    counts = [{item.name: item.weights for item in read_manifest(folder).components} for folder in (twin, small)]
    for dtype in ("int4", "int8"):
        assert counts[0]["language_model"][dtype] == counts[1]["language_model"][dtype]
    arrays = {name: value.numpy() for name, value in prompts(range(8)).items()}
    one, other = (open_runner(folder).prefill(arrays) for folder in (twin, small))
    # ONNX Runtime computes with activations in 8 bit.
    assert np.abs(one - other).max() < 0.05 * np.ptp(one)


@pytest.mark.exhaustive
def test_every_command(small, demo, store, tmp_path):
    picture = tmp_path / "scene.png"
    scene = draw_scene(Split.TEST, 0)
    scene.image.save(picture)
    for options in (
        ("verify", small),
        ("evaluate", small, "--checkpoint", demo, "--samples", 20, "--block-samples", 2, "--store", store),
        ("check", small, "--baseline", small, "--samples", 10),
        ("bench", small, "--baseline", demo, "--repeats", 1, "--warmup", 0, "--new-tokens", 3),
        ("report", small, "-o", tmp_path / "report.html"),
    ):
        result = vlmconvert(*options)
        assert result.exit_code == 0, (options, result.output)
    evaluation = read_evaluation(small / "evaluation")
    errors = {(item.component, item.block): item.relative_error for item in evaluation.blocks}
    blocks = sum(len(item.blocks) for item in read_manifest(small).components)
    assert len(errors) >= blocks > 15
    assert all(error < 0.2 for error in errors.values()), errors
    figures = {figure.metric: figure for figure in evaluation.figures}
    assert figures["exact_match"].value >= figures["exact_match"].reference - 0.05
    result = vlmconvert("run", small, "--image", picture, "--prompt", scene.questions[0].text)
    assert result.exit_code == 0, result.output
    assert scene.questions[0].answer in result.output


def test_a_flipped_bit_is_found_and_its_block_named(small, tmp_path):
    artifact = copy(small, tmp_path / "damaged")
    flip_bit(artifact / "language_model.onnx.data", 0.5)
    result = vlmconvert("verify", artifact, "--no-run", "--json", tmp_path / "checks.json")
    assert result.exit_code == 1
    checks = json.loads((tmp_path / "checks.json").read_text())["checks"]
    failed = {(item["check"], item["place"]) for item in checks if item["outcome"] == "failed"}
    assert ("file", "language_model, language_model.onnx.data") in failed
    assert any(check == "blocks" and "layers." in place for check, place in failed), failed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--device", "GPU"), "ONNX artifacts run on the CPU, not on GPU"),
        (("--ov-config", "NUM_STREAMS=1"), "--ov-config and --cache-dir are options of OpenVINO"),
    ],
)
def test_openvinos_options_are_refused(exact, options, message):
    result = vlmconvert("run", exact, "--prompt", "Hello", *options)
    assert result.exit_code == 2
    assert message in result.output
