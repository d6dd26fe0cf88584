import json

import pytest

from manifests.errors import BadInputError
from manifests.io import CHECKSUM_NAME, MANIFEST_NAME, write_manifest
from manifests.model import ComponentRecord, FileRecord, Manifest, Source
from manifests.verify import verify_files, verify_manifest


@pytest.fixture
def folder(tmp_path):
    files = []
    for name in ("graph.xml", "graph.bin"):
        (tmp_path / name).write_bytes(b"")
        files.append(
            FileRecord(path=name, size=0, sha256="e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855")
        )
    component = ComponentRecord(
        name="model",
        role="",
        format="openvino",
        precision="fp16",
        files=files,
        inputs=[],
        outputs=[],
        state=[],
        logits=None,
        weights={},
        blocks={},
        passes=[],
        fallbacks=[],
    )
    source = Source(model="demo", revision=None, architecture="x", dtype="BF16", files=[])
    manifest = Manifest(
        name="demo",
        family="mllama",
        target="openvino",
        source=source,
        components=[component],
        assets=[],
        calibration=None,
        validation=[],
        environment={},
    )
    write_manifest(manifest, tmp_path)
    return tmp_path, manifest


def details(checks):
    return [check.detail for check in checks if check.outcome == "failed"]


def test_an_intact_folder(folder):
    path, manifest = folder
    assert verify_manifest(path)[0] == manifest
    assert details(verify_manifest(path)[1]) == details(verify_files(path, manifest)) == []


def test_every_byte_of_the_manifest_is_covered(folder):
    path, _ = folder
    data = (path / MANIFEST_NAME).read_bytes()
    for position in range(len(data)):
        changed = bytearray(data)
        changed[position] ^= 1 << position % 8
        (path / MANIFEST_NAME).write_bytes(changed)
        assert any(check.check == "checksum" and check.outcome == "failed" for check in verify_manifest(path)[1])


def test_every_fault_of_a_manifest_is_listed(folder):
    path, _ = folder
    data = json.loads((path / MANIFEST_NAME).read_text())
    data["target"] = 7
    data["components"][0]["files"][0]["size"] = -1
    data["more"] = 1
    (path / MANIFEST_NAME).write_text(json.dumps(data))
    manifest, checks = verify_manifest(path)
    assert manifest is None
    assert [text.partition(":")[0] for text in details(checks)] == [
        f"its SHA-256 is not the one in {CHECKSUM_NAME}",
        "target",
        "components.0.files.0.size",
        "more",
    ]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema_version": "2.0"}', "\xff"])
def test_what_is_no_manifest_is_a_finding(folder, text):
    path, _ = folder
    (path / MANIFEST_NAME).write_text(text, encoding="latin-1")
    manifest, checks = verify_manifest(path)
    assert manifest is None
    assert [check.check for check in checks if check.outcome == "failed"] == ["checksum", "schema"]


def test_a_missing_checksum_is_a_finding(folder):
    path, _ = folder
    (path / CHECKSUM_NAME).unlink()
    assert details(verify_manifest(path)[1]) == ["missing"]


def test_a_missing_manifest_is_bad_input(tmp_path):
    with pytest.raises(BadInputError, match="holds no manifest.json"):
        verify_manifest(tmp_path)


def test_contradictions_that_the_schema_allows(folder):
    path, manifest = folder
    component = manifest.components[0]
    short = component.model_copy(update={"files": component.files[:1]})
    write_manifest(manifest.model_copy(update={"components": [component, short]}), path)
    assert details(verify_manifest(path)[1]) == [
        "file graph.xml is listed twice",
        "component model is listed twice",
    ]


def test_unlisted_files_in_subfolders_are_found(folder):
    path, manifest = folder
    (path / "more").mkdir()
    (path / "more" / "model.safetensors").write_text("")
    (path / ".cache").mkdir()
    (path / ".cache" / "x.json").write_text("")
    checks = [check for check in verify_files(path, manifest) if check.outcome == "failed"]
    assert [(check.check, check.place) for check in checks] == [("listed", "more/model.safetensors")]
