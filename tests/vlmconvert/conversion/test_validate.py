"""Validation within limits of memory and time."""

import numpy as np
import psutil
import pytest

from calibration.sources import held_out_texts
from manifests.io import read_manifest
from passes.validate.comparison import Comparison, Distance
from passes.validate.texts import ValidateTextsPass
from tests.checkpoints import write_checkpoint
from tests.conftest import vlmconvert
from vlmconvert.conversion import validate

INT4 = ("--llm", "int4", "--vision", "int8", "--max-drop", "100")
OPTIONS = {"openvino": INT4, "onnx": INT4, "ascend": ("--llm", "w8a16")}


VALIDATED = [
    ("llava", "openvino"),
    pytest.param("llava", "onnx", marks=pytest.mark.exhaustive),
    ("mllama", "ascend"),
]


def figures(folder):
    return {(item.metric, item.component): item for item in read_manifest(folder).validation}


@pytest.mark.slow
@pytest.mark.parametrize(("family", "target"), VALIDATED)
def test_block_by_block_has_the_figures_of_the_whole(family, target, store, tmp_path, monkeypatch):
    options = ("--target", target, *OPTIONS[target], "--validation-samples", 6, "--store", store)
    whole = vlmconvert(family, *options, "-o", tmp_path / "whole")
    monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 1000})())
    blocks = vlmconvert(family, *options, "-o", tmp_path / "blocks")
    assert (whole.exit_code, blocks.exit_code) == (0, 0), blocks.output
    assert "validating block by block: sample 1:" in blocks.output
    assert "loading checkpoint and artifact" not in blocks.output
    expected, found = (figures(tmp_path / name) for name in ("whole", "blocks"))
    assert found.keys() == expected.keys()
    # The checkpoint's own answers are the right ones here, so both ways look at the same tokens. ONNX Runtime quantizes
    # activations in MatMulNBits, where values that differ in the last bits may be rounded to other codes.
    assert expected["exact_match", "artifact"].reference == 1
    for key, item in expected.items():
        assert found[key].samples == item.samples == 6
        assert found[key].value == pytest.approx(item.value, rel=0.03), key
        assert found[key].reference == item.reference


@pytest.mark.slow
def test_it_stops_when_its_time_is_over_and_says_so(store, tmp_path, monkeypatch):
    monkeypatch.setattr(validate, "MINUTE", 0)
    options = ("mllama", "--llm", "fp16", "--vision", "fp16", "--validation-samples", 60, "--store", store)
    result = vlmconvert(*options, "--validation-time", "1e-9", "-o", tmp_path / "few")
    assert result.exit_code == 0, result.output
    assert "validated on 25 of 60 samples" in result.output
    assert {item.samples for item in read_manifest(tmp_path / "few").validation} == {25}
    result = vlmconvert(*options, "--validation-time", "0", "-o", tmp_path / "all")
    assert "validated on" not in result.output
    assert {item.samples for item in read_manifest(tmp_path / "all").validation} == {60}


@pytest.mark.parametrize("share", ["-0.1", "nan"])
def test_a_share_that_is_none_is_refused(share, tmp_path):
    result = vlmconvert("mllama", "--validation-time", share, "-o", tmp_path / "out")
    assert result.exit_code == 2
    assert "--validation-time" in result.output
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("in_blocks", [False, True])
def test_texts_judge_where_a_checkpoint_cannot_answer_scenes(in_blocks, store, tmp_path, monkeypatch):
    folder = write_checkpoint(tmp_path / "random")
    if in_blocks:
        monkeypatch.setattr(psutil, "virtual_memory", lambda: type("Memory", (), {"available": 1000})())
    options = ("--llm", "int4", "--vision", "int8", "--validation-samples", 4, "--store", store, "-o", tmp_path / "out")
    result = vlmconvert("llava", folder, *options)
    assert result.exit_code == 0, result.output
    assert "passes with a KL divergence of at most 0.71 nats" in result.output
    assert "not judged by scenes, of which the checkpoint answers 0%" in " ".join(result.output.split())
    found = figures(tmp_path / "out")
    accuracy, kl = found["exact_match", "artifact"], found["text_kl", "artifact"]
    assert (accuracy.threshold, accuracy.passed) == (None, True)
    assert kl.samples == len(held_out_texts()) == 12
    assert kl.threshold == 0.71
    perplexity = found["text_perplexity", "artifact"]
    assert perplexity.threshold == pytest.approx(perplexity.reference * np.exp(0.71), rel=1e-5)
    assert "not judged by scenes" in (tmp_path / "out" / "README.md").read_text()
    # Those figures alone can fail an artifact.
    again = vlmconvert("llava", folder, *options[:-1], tmp_path / "strict", "--max-kl", kl.value / 2)
    assert again.exit_code == 1
    assert "check failed: text_kl of the artifact is" in again.output


def test_figures_along_texts_and_their_limits():
    def comparison(kl: float, losses: tuple[float, float], tokens: int):
        distance = Distance(np.full(tokens, kl), np.arange(tokens) % 4 > 0, 1.0)
        return Comparison({"artifact": distance}, (0, 0), 1, np.full((tokens, 2), losses))

    figures = ValidateTextsPass(0.5)([comparison(0.1, (1.0, 1.5), 4), comparison(0.3, (1.0, 1.7), 12)])
    found = {item.metric: item for item in figures}
    assert found["text_kl"].value == pytest.approx(0.25)
    assert (found["text_agreement"].value, found["text_agreement"].threshold) == (0.75, 0.5)
    assert found["text_perplexity"].reference == pytest.approx(np.e, rel=1e-5)
    assert found["text_perplexity"].value == pytest.approx(np.exp(1.65), rel=1e-5)
    assert [item.passed for item in figures] == [True, True, False]
    assert {item.samples for item in figures} == {2}
