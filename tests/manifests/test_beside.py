"""One list for what verify finds and what --force replaces; the names are those that the commands use."""

from __future__ import annotations

from pathlib import PurePath

import pytest

from manifests.bench import BENCH_NAME
from manifests.beside import (
    MODEL_CARD_NAME,
    REPORT_NAME,
    RUN_LOG_NAME,
    SIGNATURE_NAME,
    foreign_files,
    foreign_results,
)
from manifests.evaluation import EVALUATION_FOLDER, IMAGES_FOLDER, DataRecord, Evaluation, write_evaluation
from manifests.model import Manifest, Source
from vlmconvert.commands.report import report

MANIFEST = Manifest(
    name="demo",
    family="x",
    target="openvino",
    source=Source(model="demo", revision=None, architecture="x", dtype="BF16", files=[]),
    components=[],
    assets=[],
    calibration=None,
    validation=[],
    environment={},
)


def write(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("")


def test_what_commands_leave_is_known(tmp_path):
    names = (
        "manifest.json",
        "manifest.json.sha256",
        MODEL_CARD_NAME,
        RUN_LOG_NAME,
        BENCH_NAME,
        REPORT_NAME,
        SIGNATURE_NAME,
    )
    write(tmp_path, *names, ".vlmconvert-0123.tmp", ".vlmconvert-abc/evaluation.json")
    data = DataRecord(source="scenes", revision=None, seed=0, samples=1, digest="0" * 64)
    evaluation = Evaluation(artifact="demo", manifest_sha256="0" * 64, data=data, figures=[], blocks=[], environment={})
    for results in (tmp_path / EVALUATION_FOLDER, tmp_path / EVALUATION_FOLDER / "coco"):
        write(results, f"{IMAGES_FOLDER}/0.png", f"{IMAGES_FOLDER}/17.png")
        write_evaluation(evaluation, [], results)
    assert foreign_files(tmp_path, MANIFEST) == []
    assert foreign_results(tmp_path / EVALUATION_FOLDER / "coco") == []
    # A folder of results in another one is lost if that is written again.
    nested = foreign_results(tmp_path / EVALUATION_FOLDER)
    assert {path.parts[0] for path in nested} == {"coco"}
    assert len(nested) == 4


@pytest.mark.parametrize(
    "name",
    [
        "notes.txt",
        "bench.csv",
        ".hidden",
        "more/bench.json",
        "bench.json/x",
        "evaluation/notes.txt",
        "evaluation/images/me.png",
        "evaluation/images/1.jpg",
        "images/1.png",
        "evaluation",
    ],
)
def test_foreign_files_are_found(tmp_path, name):
    write(tmp_path, "run.json", name)
    assert foreign_files(tmp_path, MANIFEST) == [PurePath(name)]


def test_links_are_foreign_and_not_followed(tmp_path):
    write(tmp_path / "photos", "me.jpg")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "more").symlink_to(tmp_path / "photos")
    (tmp_path / "out" / "gone").symlink_to("nowhere")
    assert foreign_files(tmp_path / "out", MANIFEST) == [PurePath("gone"), PurePath("more")]


def test_names_are_those_of_the_commands():
    (output,) = (parameter for parameter in report.params if parameter.name == "output")
    assert str(output.default) == REPORT_NAME
