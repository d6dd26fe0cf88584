import json

import pytest

from manifests.io import CHECKSUM_NAME, MANIFEST_NAME, read_manifest, write_manifest
from passes.validate.graphs import verify_graph
from tests.conftest import vlmconvert
from tests.garbage import GARBAGE, LANGUAGE_MODEL, copy, flip_bit, rehash, zero_norm
from vlmconvert.judging.verify import verify

pytestmark = pytest.mark.slow

OPTIONS = ("--llm", "int4", "--vision", "int8-ptq", "--vision-samples", "8")
FILES = [
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "manifest.json",
    "manifest.json.sha256",
    "openvino_language_model.bin",
    "openvino_language_model.xml",
    "openvino_vision_encoder.bin",
    "openvino_vision_encoder.xml",
    "processor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
]


@pytest.fixture
def artifact(build, tmp_path):
    return copy(build(*OPTIONS), tmp_path / "artifact")


def findings(folder):
    return [check for check in verify(folder) if check.outcome == "failed"]


def test_an_intact_artifact_has_no_findings(build):
    folder = build(*OPTIONS)
    assert {path.name for path in folder.iterdir()} == {*FILES, "README.md", "run.json"}
    checks = list(verify(folder))
    assert [check for check in checks if check.outcome != "passed"] == []
    assert {check.check for check in checks} >= {
        "checksum",
        "schema",
        "file",
        "listed",
        "blocks",
        "inputs",
        "state",
        "run",
    }
    result = vlmconvert("verify", folder)
    assert result.exit_code == 0, result.output
    assert "no findings" in result.output


@pytest.mark.parametrize("share", [0.37, 1.0])
@pytest.mark.parametrize("name", FILES)
def test_one_flipped_bit_is_found_and_named(artifact, name, share):
    flip_bit(artifact / name, share)
    places = [check.place for check in findings(artifact)]
    expected = MANIFEST_NAME if name == CHECKSUM_NAME else name
    assert any(place.endswith(expected) for place in places), places


def test_what_may_change_is_not_a_finding(artifact):
    for name in ("README.md", "run.json", "LICENSE", ".gitattributes"):
        (artifact / name).write_text("changed")
    (artifact / "evaluation").mkdir()
    (artifact / "evaluation" / "predictions.jsonl").write_text("{}")
    assert findings(artifact) == []


def test_every_finding_is_listed(artifact, tmp_path):
    flip_bit(artifact / "openvino_vision_encoder.bin", 0.5)
    flip_bit(artifact / "tokenizer.json", 0.5)
    (artifact / "chat_template.jinja").unlink()
    (artifact / "generation_config.json").write_text("{}")
    (artifact / "added_tokens.json").write_text("{}")
    result = vlmconvert("verify", artifact, "--json", tmp_path / "checks.json")
    assert result.exit_code == 1
    for text in ("tokenizer.json", "missing", "2 bytes, the manifest says", "added_tokens.json", "not in the manifest"):
        assert text in result.output
    report = json.loads((tmp_path / "checks.json").read_text())
    assert not report["passed"]
    assert [check["check"] for check in report["checks"] if check["outcome"] == "failed"].count("file") == 4
    assert any(check["place"].startswith("vision_encoder, block ") for check in report["checks"])


def test_a_vision_side_that_fails_is_found(artifact, monkeypatch):
    from vlmconvert.families.mllama.family import Mllama

    inputs = Mllama.inputs

    def spoiled(self, processed, config):
        values = inputs(self, processed, config)
        if "pixel_values" in values:
            values["pixel_values"] = values["pixel_values"][..., :-1]
        return values

    monkeypatch.setattr(Mllama, "inputs", spoiled)
    (check,) = (check for check in verify(artifact) if check.outcome == "failed")
    assert check.check == "run"


def test_json_alone_on_standard_output(build):
    result = vlmconvert("verify", build(*OPTIONS), "--json", "-", "--no-run")
    assert result.exit_code == 0
    report = json.loads(result.stdout)
    assert report["passed"]
    assert [check["check"] for check in report["checks"] if check["outcome"] == "skipped"] == ["run"]


def test_a_folder_without_a_manifest_is_bad_input(tmp_path):
    result = vlmconvert("verify", tmp_path)
    assert result.exit_code == 2
    assert "holds no manifest.json" in result.output


@pytest.mark.parametrize(("spoil", "where"), GARBAGE.items())
def test_spoiled_weights_are_traced_to_their_blocks(artifact, spoil, where):
    component, blocks = where
    spoil(artifact)
    found = findings(artifact)
    assert [check.place for check in found if check.check == "file"] == [f"{component}, openvino_{component}.bin"]
    assert {check.place for check in found if check.check == "blocks"} == {
        f"{component}, block {block}" for block in blocks
    }


def test_blocks_of_another_build_are_found_though_the_files_fit(artifact):
    """A manifest whose file hashes were made anew, its blocks not."""
    blocks = [component.blocks for component in read_manifest(artifact).components]
    zero_norm(artifact)
    rehash(artifact)
    assert findings(artifact) == []
    manifest = read_manifest(artifact)
    components = [
        component.model_copy(update={"blocks": old}) for component, old in zip(manifest.components, blocks, strict=True)
    ]
    write_manifest(manifest.model_copy(update={"components": components}), artifact)
    assert [check.place for check in findings(artifact)] == ["language_model, block layers.3"]


@pytest.mark.parametrize(
    ("change", "check", "detail"),
    [
        ({"state": []}, "state", "the manifest says []"),
        ({"weights": {"int4": 1}}, "weights", "the manifest says {'int4': 1}"),
        ({"logits": "all"}, "logits", "last, the manifest says all"),
        ({"inputs": []}, "inputs", "14, the manifest says 0"),
        ({"dtype": "i32"}, "inputs", "input_ids is i64, the manifest says i32"),
        ({"name": "tokens"}, "inputs", "input_ids, the manifest says tokens"),
        ({"shape": ["batch", 7]}, "inputs", "input_ids has shape [?,?], the manifest says ['batch', 7]"),
    ],
)
def test_a_manifest_that_describes_another_graph(build, change, check, detail):
    folder = build(*OPTIONS)
    language = read_manifest(folder).components[1]
    if change.keys() & {"dtype", "name", "shape"}:
        change = {"inputs": [language.inputs[0].model_copy(update=change), *language.inputs[1:]]}
    language = language.model_copy(update=change)
    found = [item for item in verify_graph(language, folder / LANGUAGE_MODEL) if item.outcome != "passed"]
    assert [item.check for item in found] == [check]
    assert detail in found[0].detail
    assert found[0].place.startswith("language_model")


def test_an_artifact_that_does_not_run_is_found(artifact, monkeypatch):
    import numpy as np

    from vlmconvert.targets.runner import GraphRunner

    monkeypatch.setattr(GraphRunner, "prefill", lambda *_arguments: np.full((1, 1, 4), np.nan, np.float32))
    assert [(check.check, check.detail) for check in findings(artifact)] == [("run", "4 of 4 logits are not finite")]
