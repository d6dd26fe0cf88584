"""The BOM fits CycloneDX's own schema, says what the manifest says, and is the same for the same artifact."""

from __future__ import annotations

import json
import sys

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator

import vlmconvert as api
from manifests.beside import MODEL_CARD_NAME
from manifests.files import sha256_file
from manifests.io import MANIFEST_NAME, read_manifest, write_manifest
from manifests.model import Calibration, Validation
from tests.conftest import vlmconvert
from tests.garbage import copy


def components(content):
    """All components of a BOM, those inside others too."""
    found = [content["metadata"]["component"], *content["components"]]
    for component in found:
        found += component.get("components", [])
        found += component.get("pedigree", {}).get("ancestors", [])
    return found


def named(content, kind):
    return {component["name"]: component for component in components(content) if component["type"] == kind}


@pytest.fixture
def artifact(build, tmp_path):
    """An artifact of a gated checkpoint on the hub, with calibration, a fallback and measured figures."""
    folder = copy(build("--llm", "fp16", "--vision", "fp16"), tmp_path / "artifact")
    manifest = read_manifest(folder)
    vision, language = manifest.components
    language = language.model_copy(update={"precision": "int4-awq", "fallbacks": ["lm_head: int8, as its rows are 7"]})
    figures = [
        Validation(
            metric="kl", component="artifact", reference=None, value=0.0125, threshold=1, passed=True, samples=8
        ),
        Validation(
            metric="accuracy", component="artifact", reference=1, value=0.5, threshold=1, passed=False, samples=8
        ),
    ]
    update = {
        "source": manifest.source.model_copy(update={"model": "meta-llama/Llama-3.2-11B-Vision", "revision": "0" * 40}),
        "components": [vision, language],
        "calibration": Calibration(source="coco", revision=None, samples=64, digest="1" * 64, seed=0),
        "validation": figures,
    }
    write_manifest(manifest.model_copy(update=update), folder)
    card = folder / MODEL_CARD_NAME
    card.write_text(card.read_text().replace("---\n", "---\nlicense: other\nlicense_name: llama3.2\n", 1))
    return folder


def test_the_bom_says_what_the_manifest_says(artifact):
    content = json.loads(api.bom(artifact))
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(json.dumps(content)) is None
    manifest = read_manifest(artifact)
    model = content["metadata"]["component"]
    assert (content["specVersion"], model["type"]) == ("1.6", "machine-learning-model")
    assert model["licenses"] == [{"license": {"name": "llama3.2"}}]
    card = model["modelCard"]
    assert card["modelParameters"]["modelArchitecture"] == "MllamaForConditionalGeneration"
    assert card["modelParameters"]["datasets"] == [{"ref": named(content, "data")["coco"]["bom-ref"]}]
    assert card["quantitativeAnalysis"]["performanceMetrics"] == [
        {"type": "kl", "value": "0.0125", "slice": "artifact"},
        {"type": "accuracy", "value": "0.5", "slice": "artifact"},
    ]
    assert [item["value"] for item in card["properties"]] == ["1 (passed)", "1 (failed)"]
    [checkpoint] = model["pedigree"]["ancestors"]
    assert checkpoint["purl"] == f"pkg:huggingface/meta-llama/Llama-3.2-11B-Vision@{'0' * 40}"
    said = {
        item["name"]: item["value"] for item in named(content, "machine-learning-model")["language_model"]["properties"]
    }
    assert said["vlmconvert:precision"] == "int4-awq"
    assert said["vlmconvert:fallback:1"] == "lm_head: int8, as its rows are 7"
    assert [said[f"vlmconvert:pass:{place}"] for place in range(1, len(manifest.components[1].passes) + 1)] == (
        manifest.components[1].passes
    )
    libraries = {name: item["purl"] for name, item in named(content, "library").items()}
    assert libraries.keys() == manifest.environment.keys()
    assert libraries["numpy"] == f"pkg:pypi/numpy@{manifest.environment['numpy']}"
    [depends] = [item["dependsOn"] for item in content["dependencies"] if item["ref"] == model["bom-ref"]]
    assert set(depends) == {item["bom-ref"] for item in content["components"]}


def test_every_file_is_listed_with_its_hash(artifact):
    content = json.loads(api.bom(artifact))
    manifest = read_manifest(artifact)
    listed = {
        item["bom-ref"].removeprefix("file:"): item["hashes"][0]["content"]
        for item in components(content)
        if item["type"] == "file"
    }
    expected = {f"checkpoint/{record.path}": record.sha256 for record in manifest.source.files}
    for path in artifact.iterdir():
        if path.name not in {MODEL_CARD_NAME, "run.json", "manifest.json.sha256"}:
            expected[path.name] = sha256_file(path)
    assert listed == expected


def test_the_same_artifact_has_the_same_bom(artifact, tmp_path):
    first = tmp_path / "bom.json"
    assert vlmconvert("bom", artifact, "-o", first).exit_code == 0
    moved = copy(artifact, tmp_path / "elsewhere")
    (moved / "run.json").write_text("{}")
    result = vlmconvert("bom", moved)
    assert result.exit_code == 0
    assert result.stdout == first.read_text()
    manifest = read_manifest(moved)
    write_manifest(manifest.model_copy(update={"validation": []}), moved)
    assert json.loads(api.bom(moved))["serialNumber"] != json.loads(first.read_text())["serialNumber"]


@pytest.mark.parametrize(
    ("front", "licenses"),
    [
        ("license: apache-2.0", [{"license": {"id": "Apache-2.0"}}]),
        ("license: llama3.2", [{"license": {"name": "llama3.2"}}]),
        ("license: [mit]", None),
        ("license: {a: b", None),
        ("", None),
    ],
)
def test_licenses(artifact, front, licenses):
    (artifact / MODEL_CARD_NAME).write_text(f"---\n{front}\n---\n")
    text = api.bom(artifact)
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    assert json.loads(text)["metadata"]["component"].get("licenses") == licenses


def test_an_artifact_without_calibration_and_figures(build):
    text = api.bom(build("--llm", "fp16", "--vision", "fp16"))
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
    assert "data" not in {item["type"] for item in components(json.loads(text))}


def test_what_is_no_artifact_and_what_cannot_be_written(artifact, tmp_path):
    assert vlmconvert("bom", tmp_path).exit_code == 2
    result = vlmconvert("bom", artifact, "-o", tmp_path / "nowhere" / "bom.json")
    assert (result.exit_code, "--output" in result.output) == (2, True)
    (artifact / MANIFEST_NAME).write_text("[]")
    assert vlmconvert("bom", artifact).exit_code == 2


def test_a_missing_extra_is_named(artifact, monkeypatch):
    monkeypatch.setitem(sys.modules, "cyclonedx.model.bom", None)
    result = vlmconvert("bom", artifact)
    assert result.exit_code == 2
    assert 'pip install "vlmconvert[bom]"' in result.output


def test_the_license_of_the_checkpoint_comes_along(demo, store, tmp_path):
    checkpoint = copy(demo, tmp_path / "checkpoint")
    (checkpoint / "README.md").write_text("---\nlicense: apache-2.0\ntags: [x]\n---\n# A model\n")
    options = ("--llm", "fp16", "--vision", "fp16", "--no-validate", "--store", store)
    result = vlmconvert("mllama", checkpoint, *options, "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    assert json.loads(api.bom(tmp_path / "out"))["metadata"]["component"]["licenses"] == [
        {"license": {"id": "Apache-2.0"}}
    ]
