import csv
import os
import shutil
import signal
import time

import numpy as np
import pytest

from manifests.bench import Bench, read_bench, write_bench
from manifests.beside import foreign_files
from manifests.errors import BadInputError, ConversionError
from manifests.io import read_manifest
from tests.conftest import vlmconvert
from vlmconvert.console import Reporter
from vlmconvert.families import load_family
from vlmconvert.measuring.bench import BenchRequest, bench, bench_prompts
from vlmconvert.measuring.process import MeasuredProcess, Side

pytestmark = pytest.mark.slow

FLOAT = ("--llm", "fp32", "--vision", "fp32")


@pytest.fixture(scope="module")
def measured(build, demo, tmp_path_factory):
    """An artifact beside its checkpoint, one repeat, so that the figures of a row belong to one answer."""
    folder = tmp_path_factory.mktemp("bench")
    options = ("--new-tokens", 4, "--repeats", 1, "--warmup", 1, "--csv", folder / "b.csv", "--json", folder / "b.json")
    result = vlmconvert("bench", build(*FLOAT), "--batch", "1,2", "--baseline", demo, "--dtype", "f32", *options)
    assert result.exit_code == 0, result.output
    return folder, result.output


def test_every_side_and_batch_has_a_row(measured, build):
    record = Bench.model_validate_json((measured[0] / "b.json").read_text())
    assert [row.batch for row in record.rows] == [1, 2]
    assert [row.batch for row in record.baseline_rows] == [1, 2]
    assert record.baseline_label == "mllama (PyTorch f32)"
    assert record.device == "CPU"
    assert record.load_s > 0
    assert record.compile_s > 0
    for row in (*record.rows, *record.baseline_rows):
        assert (row.images, row.new_tokens) == (1, 4)
        for spread in (row.vision_ms, row.first_token_ms, row.per_token_ms, row.tokens_per_s):
            assert 0 < spread.low <= spread.median <= spread.high


def test_an_answer_has_exactly_the_tokens_that_were_asked_for(measured):
    """The demo ends its answers after two or three tokens."""
    record = Bench.model_validate_json((measured[0] / "b.json").read_text())
    for row in (*record.rows, *record.baseline_rows):
        seconds = (row.first_token_ms.median + 3 * row.per_token_ms.median) / 1000
        assert row.tokens_per_s.median == pytest.approx(row.batch * 4 / seconds, rel=1e-3)


def test_memory_is_that_of_the_side_alone(measured):
    """PyTorch is larger than the demo in OpenVINO, and this process is larger than both began."""
    record = Bench.model_validate_json((measured[0] / "b.json").read_text())
    assert 30e6 < record.peak_rss < int(record.environment["baseline_peak_rss"])


def test_table_and_csv_have_the_same_rows(measured):
    folder, output = measured
    rows = list(csv.DictReader((folder / "b.csv").open()))
    assert [(row["side"], row["batch"]) for row in rows] == [
        ("artifact", "1"),
        ("artifact", "2"),
        ("baseline", "1"),
        ("baseline", "2"),
    ]
    assert float(rows[0]["per_token_ms_low"]) <= float(rows[0]["per_token_ms"])
    assert "per token ratio" in output
    assert "mllama (PyTorch f32): load" in output


def test_the_record_lies_beside_the_artifact(build, tmp_path):
    folder = build(*FLOAT)
    result = vlmconvert("bench", folder, "--new-tokens", 2, "--repeats", 2, "--warmup", 0, "--images", 0)
    assert result.exit_code == 0, result.output
    record = read_bench(folder)
    assert record.rows[0].vision_ms.median == 0
    assert record.baseline_label is None
    write_bench(record, tmp_path)
    assert read_bench(tmp_path) == record


def test_an_artifact_with_its_record_is_intact_and_replaceable(build, tmp_path):
    folder = shutil.copytree(build(*FLOAT), tmp_path / "out")
    result = vlmconvert("bench", folder, "--new-tokens", 2, "--repeats", 1, "--warmup", 0, "--images", 0)
    assert result.exit_code == 0, result.output
    assert foreign_files(folder, read_manifest(folder)) == []
    verified = vlmconvert("verify", folder)
    assert verified.exit_code == 0, verified.output
    (folder / "timings.json").write_text("{}")
    verified = vlmconvert("verify", folder, "--no-run")
    assert verified.exit_code == 1, verified.output
    assert "timings.json" in verified.output


def test_a_folder_that_takes_no_record_is_refused_before_the_measurement(build, monkeypatch):
    folder, access = build(*FLOAT), os.access
    monkeypatch.setattr(os, "access", lambda path, mode: path != folder and access(path, mode))
    result = vlmconvert("bench", folder, "--new-tokens", 2, "--repeats", 1)
    assert result.exit_code == 2, result.output
    assert "is not writable: give a file for the record with --json" in result.output


def test_the_two_prompts_differ_in_their_images_alone(build):
    first, second = bench_prompts(build(*FLOAT), load_family("mllama"), batch=2, images=2)
    assert {name: value.shape for name, value in first.items()} == {name: value.shape for name, value in second.items()}
    assert [name for name in first if not np.array_equal(first[name], second[name])] == ["pixel_values"]
    assert first["aspect_ratio_mask"].all(), "a tile is empty"


def test_a_process_that_dies_is_an_error_not_a_hang(build):
    side = Side(build(*FLOAT), "demo")
    with MeasuredProcess(side) as process:
        os.kill(process._process.pid, signal.SIGKILL)
        time.sleep(0.1)
        with pytest.raises(ConversionError, match="the process that measures demo ended with code -9"):
            process.open()


def test_a_missing_baseline_is_refused_before_anything_is_opened(build, tmp_path):
    with pytest.raises(BadInputError, match="cannot be the baseline"):
        bench(BenchRequest(build(*FLOAT), baseline=tmp_path), Reporter())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--batch", "1,x"), "--batch 1,x is not a list"),
        (("--batch", "0"), "--batch 0 is not a list"),
        (("--new-tokens", "1"), "--new-tokens 1 is too small"),
        (("--ov-config", "FAST"), "--ov-config FAST is not KEY=VALUE"),
        (("--csv", "nowhere/b.csv"), "--csv nowhere/b.csv cannot be written"),
    ],
)
def test_bad_options_are_one_sentence_and_exit_2(build, options, message):
    result = vlmconvert("bench", build(*FLOAT), *options)
    assert result.exit_code == 2, result.output
    assert message in result.output
