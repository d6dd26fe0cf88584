"""`vlmconvert describe`: a checkpoint, an Ascend artifact, and answers of MindIE."""

from __future__ import annotations

import json
import shutil

import pytest

from calibration.scenes import CAPTION_QUESTION, Split, draw_scene
from manifests.descriptions import Decoding, read_descriptions
from manifests.files import sha256_file
from passes.processor_files import processor_files
from tests.conftest import vlmconvert
from tests.passes.ascend.conversion import convert
from vlmconvert.measuring.describe import described, list_images, open_describer


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    for number in range(3):
        draw_scene(Split.TEST, number).image.save(folder / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def artifact(demo, tmp_path_factory):
    folder = tmp_path_factory.mktemp("artifact") / "w8a16"
    convert(demo, folder)
    for path in processor_files(demo):
        (folder / path.name).write_bytes(path.read_bytes())
    return folder


def test_checkpoint_and_artifact_are_asked_alike(demo, artifact, images, tmp_path):
    said = {}
    for folder in (demo, artifact):
        output = tmp_path / f"{folder.name}.json"
        result = vlmconvert(
            "describe", folder, "--images", images, "-o", output, "--max-new-tokens", 24, "--batch", 2,
            "--prompt", CAPTION_QUESTION,
        )  # fmt: skip
        assert result.exit_code == 0, result.output
        said[folder.name] = read_descriptions(output)
    first, second = said.values()
    assert (first.model, second.model) == ("mllama", "w8a16")
    assert first.decoding == second.decoding == Decoding(prompt=CAPTION_QUESTION, max_new_tokens=24)
    assert [item.image for item in first.descriptions] == ["0.png", "1.png", "2.png"]
    assert [item.sha256 for item in first.descriptions] == [sha256_file(images / f"{n}.png") for n in range(3)]
    # The demo describes what it sees, and 8 bit take nothing from that.
    assert all(len(item.text.split()) >= 3 for item in first.descriptions)
    assert [item.text for item in first.descriptions] == [item.text for item in second.descriptions]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mllama.json", "w8a16.json"]


def test_a_model_under_the_name_of_another_begins_again(artifact, images, tmp_path):
    folder = shutil.copytree(artifact, tmp_path / "w8a16")
    first = open_describer(folder)
    weights = next(folder.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes())
    second = open_describer(folder)
    assert first.name == second.name
    partial = tmp_path / "out.partial"
    decoding = Decoding(prompt="What?", max_new_tokens=2)
    asked = []
    for describer in (first, first, second):
        describer.describe = lambda paths, _decoding: asked.append(len(paths)) or ["a"] * len(paths)
        described(describer, list_images(images), decoding, partial, batch=3)
    assert asked == [3, 3]


def test_answers_of_mindie(artifact, images, tmp_path):
    answers = tmp_path / "predict_result.json"
    answers.write_text(json.dumps({f"/data/{n}.png": f"image {n}" for n in range(3)}))
    output = tmp_path / "out.json"
    result = vlmconvert(
        "describe",
        artifact,
        "--answers",
        answers,
        "--images",
        images,
        "-o",
        output,
        "--count",
        2,
        "--max-new-tokens",
        30,
        "--prompt",
        "What is this?",
    )
    assert result.exit_code == 0, result.output
    found = read_descriptions(output)
    assert found.decoding == Decoding(prompt="What is this?", max_new_tokens=30)
    assert [(item.image, item.text) for item in found.descriptions] == [("0.png", "image 0"), ("1.png", "image 1")]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "no model to ask"),
        (("model", "--endpoint", "http://localhost:1/v1"), "--endpoint already chooses the model"),
        (("--endpoint", "localhost:1"), "is not an address"),
        (("model", "--max-new-tokens", 0), "--max-new-tokens 0 is too small"),
        (("nowhere",), "config.json is missing"),
        (("nowhere", "--answers", "predict_result.json"), "--prompt is missing: give it with --answers"),
    ],
)
def test_bad_input(images, tmp_path, arguments, message):
    result = vlmconvert("describe", *arguments, "--images", images, "-o", tmp_path / "out.json")
    assert result.exit_code == 2
    assert message in result.output
    assert not (tmp_path / "out.json").exists()
