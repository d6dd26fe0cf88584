"""`--target ascend` on the command line: conversion, and every command that takes its artifact."""

from __future__ import annotations

import csv
import json
import shutil

import numpy as np
import pytest
import torch

from calibration.inputs import load_processor, prompt_inputs
from calibration.scenes import Split, draw_scene
from calibration.sources import load_samples
from manifests.io import read_manifest, write_manifest
from manifests.verify import verify_files
from passes.validate.greedy import forced_logits, greedy
from tests.checkpoints import CLASSES, write_checkpoint
from tests.conftest import vlmconvert
from tests.passes.test_architecture import rewrite
from vlmconvert.families import demo_checkpoint, family_module
from vlmconvert.runtime import open_runner
from vlmconvert.verify import verify

ASCEND = ("--target", "ascend", "--llm", "w8a16")
DEMOS = ("llava", "mllama")


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory):
    """The demos' artifacts by family, not validated; made once."""
    root = tmp_path_factory.mktemp("ascend")
    made = {}

    def convert(family):
        if family not in made:
            result = vlmconvert(family, *ASCEND, "--no-validate", "-o", root / family)
            assert result.exit_code == 0, result.output
            made[family] = root / family
        return made[family]

    return convert


@pytest.mark.parametrize("family", CLASSES)
def test_every_family_is_converted_and_verified(tmp_path, family):
    """LLaVA-NeXT and LLaVA-NeXT-Video have no demo; their random weights answer nothing, so nothing may be measured."""
    source = write_checkpoint(tmp_path / "in", family)
    result = vlmconvert(family, source, *ASCEND, "--no-validate", "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    manifest = read_manifest(tmp_path / "out")
    assert (manifest.name, manifest.target, manifest.family) == ("in-ascend-w8a16", "ascend", family)
    assert [(item.format, item.precision) for item in manifest.components] == [("ascend-w8a16", "w8a16")]
    assert manifest.components[0].weights["int8"] > 0
    assert [runtime.runtime for runtime in manifest.run_plan.runtimes] == ["mindie", "vllm-ascend"]
    assert [check for check in verify(tmp_path / "out") if check.outcome != "passed"] == []


@pytest.mark.parametrize("family", DEMOS)
def test_the_demo_loses_at_most_half_a_point(tmp_path, family):
    result = vlmconvert(family, *ASCEND, "--max-drop", "0.5", "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    figures = {(item.metric, item.component): item for item in read_manifest(tmp_path / "out").validation}
    accuracy = figures["exact_match", "artifact"]
    assert accuracy.samples == 200
    assert accuracy.reference >= 0.9
    assert accuracy.value >= accuracy.reference - 0.005
    assert 0 < figures["kl", "language_model"].value < 1e-3
    assert "vllm serve" in (tmp_path / "out" / "README.md").read_text() or family == "mllama"
    # Equalization protects the demos' outlier channels.
    result = vlmconvert(family, *ASCEND, "--outlier-suppression", "equalize", "-o", tmp_path / "equalized")
    assert result.exit_code == 0, result.output
    equalized = {(item.metric, item.component): item for item in read_manifest(tmp_path / "equalized").validation}
    plain, better = (found["kl", "language_model"].value for found in (figures, equalized))
    print(
        f"{family}: KL {plain:.3g}, equalized {better:.3g}; {accuracy.value}, {equalized['exact_match', 'artifact'].value}"
    )
    assert better < 0.5 * plain


def test_equal_runs_give_equal_bytes_and_engines_files_of_equal_names(tmp_path, own_helpers):
    folders = {}
    for name, options in (("one", ("--workers", "1")), ("two", ()), ("theirs", ("--engine", "msmodelslim"))):
        # Where a checkpoint lies is nothing that the result may depend on.
        source = shutil.copytree(demo_checkpoint("llava"), tmp_path / f"{name}-in" / "llava")
        shard = ("--shard-size", "1MB")
        result = vlmconvert("llava", source, *ASCEND, *options, *shard, "--no-validate", "-o", tmp_path / name)
        assert result.exit_code == 0, result.output
        folders[name] = {
            path.name: path.read_bytes() for path in (tmp_path / name).iterdir() if path.name != "run.json"
        }
    assert folders["one"] == folders["two"]
    weights = [name for name in folders["one"] if name.endswith(".safetensors")]
    assert len(weights) > 2
    environments = [read_manifest(tmp_path / name).environment for name in ("one", "theirs")]
    assert ["msmodelslim" in environment for environment in environments] == [False, True]
    assert folders["theirs"].keys() == folders["one"].keys()


def test_dry_run_stops_after_the_plan(tmp_path):
    result = vlmconvert("llava", "--target", "ascend", "--dry-run", "-o", tmp_path / "out")
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
        ((*ASCEND, "--store", "s"), "--store does not go with --target ascend"),
        ((*ASCEND, "--engine", "msmodelslim", "--group-size", "16"), "msmodelslim knows no --group-size 16"),
        (("--engine", "msmodelslim"), "--engine does not go with --target openvino"),
        (("--allow-nonfinite",), "--allow-nonfinite does not go with --target openvino"),
        ((*ASCEND, "--group-size", "48"), "--group-size 48 does not divide"),
        ((*ASCEND, "--group-size", "-2"), "--group-size -2 is too small"),
        ((*ASCEND, "--shard-size", "much"), "--shard-size much is no size"),
        ((*ASCEND, "--shard-size", "0"), "--shard-size 0 is too small"),
        ((*ASCEND, "--engine", "msmodelslim", "--allow-nonfinite"), "--allow-nonfinite goes with our own engine"),
    ],
)
def test_what_does_not_fit_is_one_sentence_and_exit_2(tmp_path, options, message):
    result = vlmconvert("llava", *options, "-o", tmp_path / "out")
    assert result.exit_code == 2, result.output
    assert message in result.output
    assert list(tmp_path.iterdir()) == []


def test_nonfinite_weights_leave_nothing_behind(tmp_path):
    source = tmp_path / "in"
    shutil.copytree(demo_checkpoint("llava"), source)
    name = "language_model.model.layers.0.mlp.up_proj.weight"

    def change(tensors):
        tensors[name][0, 0] = torch.nan
        return tensors

    rewrite(source, change)
    result = vlmconvert("llava", source, *ASCEND, "--no-validate", "-o", tmp_path / "new" / "folders" / "out")
    assert result.exit_code == 2
    assert f"tensor {name} holds NaN or infinity" in result.output
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
    result = vlmconvert("llava", source, *ASCEND, "--allow-nonfinite", "--no-validate", "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output


def test_a_different_result_needs_force(tmp_path):
    run = ("llava", *ASCEND, "--no-validate", "-o", tmp_path / "out")
    assert vlmconvert(*run).exit_code == 0
    assert "already holds this result" in vlmconvert(*run).output
    for options in (("--outlier-suppression", "equalize"), ("--shard-size", "1MB")):
        result = vlmconvert(*run, *options)
        assert result.exit_code == 2
        assert "holds a different result" in result.output
        assert "model: w8a16" not in result.output  # refused before any work
    assert vlmconvert(*run, "--outlier-suppression", "equalize", "--force").exit_code == 0
    assert "equalize" in read_manifest(tmp_path / "out").components[0].passes[0]


@pytest.mark.parametrize("family", DEMOS)
def test_it_runs_as_an_artifact_of_any_target(artifacts, family):
    folder = artifacts(family)
    samples = load_samples("scenes", 2, split=Split.TEST).samples
    processed = prompt_inputs(
        load_processor(folder), [item.image for item in samples], [item.turns[0][0] for item in samples]
    )
    expected = greedy(family_module(family).reference(demo_checkpoint(family)), processed, [], 3)
    runner = open_runner(folder)
    found = forced_logits(runner, processed, expected.tokens)
    assert 0 < np.linalg.norm(found - expected.logits) < 0.05 * np.linalg.norm(expected.logits)
    assert runner.encode_images(processed).keys() >= runner.handed.keys()
    np.testing.assert_array_equal(np.stack(list(runner.generate(processed, 3)), 1)[:, 0], expected.tokens[:, 0])
    assert len(runner.timings.other_tokens) <= 2
    # Beams: two rows a prompt are computed as one, and go on from the rows that are named.
    doubled = {name: value.repeat(2, axis=0) for name, value in processed.items()}
    first = runner.prefill(doubled, beams=2)
    np.testing.assert_array_equal(first[0], first[1])
    tokens = expected.tokens[:, 0].repeat(2)
    np.testing.assert_allclose(
        runner.step(tokens, np.array([1, 0, 3, 2])), found[:, 1:2].repeat(2, axis=0), rtol=1e-3, atol=1e-3
    )


def test_run_answers_and_device_options_are_refused(artifacts, tmp_path):
    draw_scene(Split.TEST, 0).image.save(tmp_path / "scene.png")
    question = ("--image", tmp_path / "scene.png", "--prompt", "What colour is the circle?")
    result = vlmconvert("run", artifacts("llava"), *question)
    assert result.exit_code == 0, result.output
    assert result.stdout.strip().isalpha()
    result = vlmconvert("run", artifacts("llava"), *question, "--device", "GPU")
    assert result.exit_code == 2
    assert "leave out --device" in result.output


def test_evaluate_check_and_report(artifacts, tmp_path, store):
    folder = tmp_path / "artifact"
    shutil.copytree(artifacts("llava"), folder)
    result = vlmconvert("evaluate", folder, "--samples", "30", "--store", store)
    assert result.exit_code == 0, result.output
    figures = {
        item["metric"]: item for item in json.loads((folder / "evaluation" / "evaluation.json").read_text())["figures"]
    }
    assert figures["exact_match"]["value"] >= figures["exact_match"]["reference"] - 0.005
    assert 0 < figures["kl"]["value"] < 1e-3
    result = vlmconvert("check", folder, "--baseline", artifacts("llava"), "--samples", "20", "--max-kl", "1e-6")
    assert result.exit_code == 0, result.output
    result = vlmconvert("check", folder, "--baseline", artifacts("llava"), "--max-block-error", "0.1")
    assert result.exit_code == 2
    assert "is for Ascend and has none" in result.output
    result = vlmconvert("report", folder, "-o", tmp_path / "report.html")
    assert result.exit_code == 0, result.output
    assert [check for check in verify_files(folder, read_manifest(folder)) if check.outcome != "passed"] == []


def test_verify_names_a_broken_rule_and_a_flipped_bit(artifacts, tmp_path):
    folder = tmp_path / "artifact"
    shutil.copytree(artifacts("llava"), folder)
    (folder / "more.safetensors").write_bytes((folder / "quant_model_weight_w8a16.safetensors").read_bytes())
    found = [check.check for check in verify(folder, run=False) if check.outcome == "failed"]
    assert {"listed", "mindie: no stray file", "mindie: no duplicate key"} <= set(found)
    (folder / "more.safetensors").unlink()
    weights = folder / "quant_model_weight_w8a16.safetensors"
    content = bytearray(weights.read_bytes())
    content[-100] ^= 1
    weights.write_bytes(content)
    checks = {check.check: check for check in verify(folder) if check.outcome != "passed"}
    assert {name: check.outcome for name, check in checks.items()} == {"file": "failed", "run": "skipped"}


def test_verify_names_the_rule_that_a_changed_file_breaks(artifacts, tmp_path):
    folder = shutil.copytree(artifacts("llava"), tmp_path / "artifact")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if key != "quantize"}))
    found = {check.check: check.place for check in verify(folder, run=False) if check.outcome == "failed"}
    assert found == {"file": "config.json", "mindie: config keys": "config.json, quantize"}


def test_verify_holds_a_folder_of_another_tool_against_the_rules(artifacts, tmp_path):
    folder = shutil.copytree(artifacts("llava"), tmp_path / "artifact")
    for name in ("manifest.json", "manifest.json.sha256"):
        (folder / name).unlink()
    result = vlmconvert("verify", folder)
    assert result.exit_code == 0, result.output
    assert "no manifest to compare with" in result.output
    (folder / "preprocessor_config.json").unlink()
    result = vlmconvert("verify", folder)
    assert result.exit_code == 1
    assert "mindie: processor files" in result.output


def test_verify_has_no_rules_for_an_unknown_family(artifacts, tmp_path):
    folder = shutil.copytree(artifacts("llava"), tmp_path / "artifact")
    write_manifest(read_manifest(folder).model_copy(update={"family": "pixtral"}), folder)
    (check,) = (check for check in verify(folder, run=False) if check.outcome == "failed")
    assert (check.check, check.detail) == ("rules", "no rules are known for a pixtral model")


def test_bench(artifacts, tmp_path):
    options = ("--new-tokens", 2, "--repeats", 1, "--warmup", 0)
    files = ("--csv", tmp_path / "b.csv", "--json", tmp_path / "b.json")
    result = vlmconvert("bench", artifacts("llava"), *options, *files)
    assert result.exit_code == 0, result.output
    rows = list(csv.reader((tmp_path / "b.csv").open()))
    assert len(rows) == 2
