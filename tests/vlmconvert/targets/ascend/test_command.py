"""`--target ascend` on the command line: conversion, and every command that takes its artifact."""

from __future__ import annotations

import csv
import json
import shutil

import pytest
import torch

from calibration.scenes import Split, draw_scene
from calibration.sources import load_samples
from manifests.errors import BadInputError
from manifests.io import read_manifest, write_manifest
from manifests.verify import verify_files
from passes.validate.comparison import kl_divergence
from passes.validate.greedy import forced_logits, greedy
from tests.checkpoints import CLASSES, QWEN
from tests.conftest import exhaustive_but, vlmconvert
from tests.passes.test_architecture import rewrite
from tests.prompts import prompt_inputs
from vlmconvert import load_processor
from vlmconvert.families import demo_checkpoint, load_family
from vlmconvert.judging.verify import verify
from vlmconvert.running.open import open_runner

ASCEND = ("--target", "ascend", "--llm", "w8a16")
DEMOS = ("llava", "mllama")


def convert(store, *arguments):
    return vlmconvert(*arguments, *ASCEND, "--store", store)


@pytest.fixture(scope="module")
def demo_artifact(artifact):
    """That of the LLaVA demo, not validated."""
    return artifact(demo_checkpoint("llava"))


@pytest.fixture
def copied(demo_artifact, tmp_path):
    """A copy that may be changed."""
    return shutil.copytree(demo_artifact, tmp_path / "artifact")


@pytest.mark.parametrize("family", [*CLASSES, *QWEN])
def test_every_family_is_converted_and_verified(checkpoint, artifact, family):
    """LLaVA-NeXT and LLaVA-NeXT-Video have no demo; their random weights answer nothing, so nothing may be measured."""
    folder = artifact(checkpoint(family))
    manifest = read_manifest(folder)
    assert (manifest.name, manifest.target, manifest.family) == (f"{family}-ascend-w8a16", "ascend", family)
    assert [(item.format, item.precision) for item in manifest.components] == [("ascend-w8a16", "w8a16")]
    assert manifest.components[0].weights["int8"] > 0
    runtimes = ["vllm-ascend"] if family in QWEN else ["mindie", "vllm-ascend"]
    assert [runtime.runtime for runtime in manifest.run_plan.runtimes] == runtimes
    assert [check for check in verify(folder) if check.outcome != "passed"] == []


@pytest.mark.slow
@pytest.mark.parametrize("family", exhaustive_but(["llava"], DEMOS))
def test_the_demo_loses_at_most_half_a_point(tmp_path, store, family):
    result = convert(store, family, "--max-drop", "0.5", "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    figures = {(item.metric, item.component): item for item in read_manifest(tmp_path / "out").validation}
    accuracy = figures["exact_match", "artifact"]
    assert accuracy.samples == 200
    assert accuracy.reference >= 0.9
    assert accuracy.value >= accuracy.reference - 0.005
    assert 0 < figures["kl", "language_model"].value < 1e-4
    assert "vllm serve" in (tmp_path / "out" / "README.md").read_text() or family == "mllama"


@pytest.mark.slow
@pytest.mark.parametrize("family", exhaustive_but(["llava"], DEMOS))
def test_equalization_protects_the_outlier_channels_of_the_demo(artifact, tmp_path, store, family):
    equalized = tmp_path / "equalized"
    options = ("--outlier-suppression", "equalize", "--validation-samples", "50")
    result = convert(store, family, *options, "-o", equalized)
    assert result.exit_code == 0, result.output
    source = demo_checkpoint(family)
    samples = load_samples("scenes", 50, split=Split.TEST).samples
    texts = [sample.turns[0][0] for sample in samples]
    inputs = prompt_inputs(load_processor(source), [sample.images[0] for sample in samples], texts)
    expected = greedy(load_family(family).reference(source), inputs, [], 4)
    plain, better = (
        kl_divergence(expected.logits, forced_logits(open_runner(folder), inputs, expected.tokens)).mean()
        for folder in (artifact(source), equalized)
    )
    print(f"{family}: KL {plain:.3g}, equalized {better:.3g}")
    assert better < 0.5 * plain


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name != "run.json"}


@pytest.mark.exhaustive
def test_equal_runs_give_equal_bytes(tmp_path, own_helpers):
    folders = {}
    for workers in ("1", "2"):
        # Where a checkpoint lies is nothing that the result may depend on.
        source = shutil.copytree(demo_checkpoint("llava"), tmp_path / f"{workers}-in" / "llava")
        place = ("--workers", workers, "--shard-size", "1MB", "--no-validate", "-o", tmp_path / workers)
        result = convert(tmp_path / f"{workers}-store", "llava", source, *place)
        assert result.exit_code == 0, result.output
        folders[workers] = contents(tmp_path / workers)
    assert folders["1"] == folders["2"]
    assert len([name for name in folders["1"] if name.endswith(".safetensors")]) > 2


@pytest.mark.exhaustive
def test_engines_write_files_of_equal_names(tmp_path, store):
    folders = [tmp_path / engine for engine in ("vlmconvert", "msmodelslim")]
    for folder in folders:
        options = ("--engine", folder.name, "--shard-size", "1MB", "--no-validate")
        result = convert(store, "llava", *options, "-o", folder)
        assert result.exit_code == 0, result.output
    ours, theirs = (contents(folder).keys() for folder in folders)
    assert ours == theirs
    environments = [read_manifest(folder).environment for folder in folders]
    assert ["msmodelslim" in environment for environment in environments] == [False, True]


def test_dry_run_stops_after_the_plan(tmp_path, store):
    result = convert(store, "llava", "--dry-run", "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert "compress-w8a16{group_size=0" in result.output
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--target", "ascend", "--llm", "int4-awq"), "--llm int4-awq does not go with --target ascend: use w8a16"),
        (("--target", "onnx", "--llm", "w8a16"), "--llm w8a16 does not go with --target onnx: use fp32"),
        (("--llm", "w8a16"), "--llm w8a16 does not go with --target openvino"),
        ((*ASCEND, "--vision", "int8-ptq"), "--vision int8-ptq does not go with --target ascend"),
        ((*ASCEND, "--vision", "fp16"), "checkpoint's own BF16"),
        ((*ASCEND, "--ratio", "0.5"), "--ratio does not go with --target ascend"),
        ((*ASCEND, "--samples", "8"), "--samples does not go with --target ascend"),
        ((*ASCEND, "--engine", "msmodelslim", "--group-size", "16"), "msmodelslim does not support --group-size 16"),
        (("--engine", "msmodelslim"), "--engine does not go with --target openvino"),
        (("--allow-nonfinite",), "--allow-nonfinite does not go with --target openvino"),
        ((*ASCEND, "--group-size", "48"), "--group-size 48 does not divide"),
        ((*ASCEND, "--group-size", "-2"), "group size -2 is not possible"),
        ((*ASCEND, "--shard-size", "much"), "--shard-size much is not a size"),
        ((*ASCEND, "--shard-size", "0"), "--shard-size 0 is too small"),
        (
            (*ASCEND, "--engine", "msmodelslim", "--allow-nonfinite"),
            "--allow-nonfinite does not go with --engine msmodelslim",
        ),
    ],
)
def test_what_does_not_fit_is_one_sentence_and_exit_2(tmp_path, store, options, message):
    result = vlmconvert("llava", *options, "-o", tmp_path / "out", "--store", store)
    assert result.exit_code == 2, result.output
    assert message in result.output
    assert list(tmp_path.iterdir()) == []


def test_nonfinite_weights_leave_nothing_behind(tmp_path, store):
    source = tmp_path / "in"
    shutil.copytree(demo_checkpoint("llava"), source)
    name = "language_model.model.layers.0.mlp.up_proj.weight"

    def change(tensors):
        tensors[name][0, 0] = torch.nan
        return tensors

    rewrite(source, change)
    result = convert(store, "llava", source, "--no-validate", "-o", tmp_path / "new" / "folders" / "out")
    assert result.exit_code == 2
    assert f"tensor {name} holds NaN or infinity" in result.output
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
    result = convert(store, "llava", source, "--allow-nonfinite", "--no-validate", "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output


def test_a_different_result_needs_force(tmp_path, store):
    run = (store, "llava", "--no-validate", "-o", tmp_path / "out")
    assert convert(*run).exit_code == 0
    assert "already holds this result" in convert(*run).output
    for options in (("--outlier-suppression", "equalize"), ("--shard-size", "1MB")):
        result = convert(*run, *options)
        assert result.exit_code == 2
        assert "holds a different result" in result.output
        assert "model: w8a16" not in result.output  # refused before any work
    assert convert(*run, "--outlier-suppression", "equalize", "--force").exit_code == 0
    assert "equalize" in read_manifest(tmp_path / "out").components[0].passes[0]


def test_run_answers_and_device_options_are_refused(demo_artifact, tmp_path):
    draw_scene(Split.TEST, 0).image.save(tmp_path / "scene.png")
    question = ("--image", tmp_path / "scene.png", "--prompt", "What colour is the circle?")
    result = vlmconvert("run", demo_artifact, *question)
    assert result.exit_code == 0, result.output
    assert result.stdout.strip().isalpha()
    result = vlmconvert("run", demo_artifact, *question, "--device", "GPU")
    assert result.exit_code == 2
    assert "leave out --device" in result.output


@pytest.mark.exhaustive
def test_evaluate_check_and_report(demo_artifact, copied, tmp_path, store):
    result = vlmconvert("evaluate", copied, "--samples", "30", "--store", store)
    assert result.exit_code == 0, result.output
    figures = {
        item["metric"]: item for item in json.loads((copied / "evaluation" / "evaluation.json").read_text())["figures"]
    }
    assert figures["exact_match"]["value"] >= figures["exact_match"]["reference"] - 0.005
    assert 0 < figures["kl"]["value"] < 1e-3
    result = vlmconvert("check", copied, "--baseline", demo_artifact, "--samples", "20", "--max-kl", "1e-6")
    assert result.exit_code == 0, result.output
    result = vlmconvert("check", copied, "--baseline", demo_artifact, "--max-block-error", "1e-6")
    assert result.exit_code == 0, result.output
    result = vlmconvert("report", copied, "-o", tmp_path / "report.html")
    assert result.exit_code == 0, result.output
    assert [check for check in verify_files(copied, read_manifest(copied)) if check.outcome != "passed"] == []


def test_verify_names_a_broken_rule_and_a_flipped_bit(copied):
    (copied / "more.safetensors").write_bytes((copied / "quant_model_weight_w8a16.safetensors").read_bytes())
    found = [check.check for check in verify(copied, run=False) if check.outcome == "failed"]
    assert {"listed", "mindie: no stray file", "mindie: no duplicate key"} <= set(found)
    (copied / "more.safetensors").unlink()
    weights = copied / "quant_model_weight_w8a16.safetensors"
    content = bytearray(weights.read_bytes())
    content[-100] ^= 1
    weights.write_bytes(content)
    checks = {check.check: check for check in verify(copied) if check.outcome != "passed"}
    assert {name: check.outcome for name, check in checks.items()} == {"file": "failed", "run": "skipped"}


def test_verify_names_the_rule_that_a_changed_file_breaks(copied):
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps({key: value for key, value in config.items() if key != "quantize"}))
    found = {check.check: check.place for check in verify(copied, run=False) if check.outcome == "failed"}
    assert found == {"file": "config.json", "mindie: config keys": "config.json, quantize"}


def test_verify_holds_a_folder_of_another_tool_against_the_rules(copied):
    for name in ("manifest.json", "manifest.json.sha256"):
        (copied / name).unlink()
    result = vlmconvert("verify", copied)
    assert result.exit_code == 0, result.output
    assert "no manifest to compare with" in result.output
    (copied / "preprocessor_config.json").unlink()
    result = vlmconvert("verify", copied)
    assert result.exit_code == 1
    assert "mindie: processor files" in result.output


def test_verify_has_no_rules_for_an_unknown_family(copied):
    write_manifest(read_manifest(copied).model_copy(update={"family": "pixtral"}), copied)
    with pytest.raises(BadInputError, match="pixtral"):
        list(verify(copied, run=False))


@pytest.mark.exhaustive
def test_bench(demo_artifact, tmp_path):
    options = ("--new-tokens", 2, "--repeats", 1, "--warmup", 0)
    files = ("--csv", tmp_path / "b.csv", "--json", tmp_path / "b.json")
    result = vlmconvert("bench", demo_artifact, *options, *files)
    assert result.exit_code == 0, result.output
    rows = list(csv.reader((tmp_path / "b.csv").open()))
    assert len(rows) == 2
