import json
import subprocess

import jsonschema
import pytest
from pydantic import ValidationError

from manifests.errors import BadInputError
from manifests.io import CHECKSUM_NAME, MANIFEST_NAME, SCHEMA_FILE, json_schema, read_manifest, write_manifest
from manifests.model import FileRecord, Manifest


@pytest.fixture
def manifest() -> Manifest:
    return Manifest.model_validate(
        {
            "name": "demo",
            "family": "mllama",
            "target": "openvino",
            "source": {
                "model": "demo",
                "revision": None,
                "architecture": "MllamaForConditionalGeneration",
                "dtype": "BF16",
                "files": [{"path": "model.safetensors", "size": 3, "sha256": "0" * 64}],
            },
            "components": [],
            "assets": [],
            "calibration": None,
            "validation": [],
            "environment": {},
        }
    )


def test_committed_schema_is_that_of_the_model():
    assert SCHEMA_FILE.read_text(encoding="utf-8") == json_schema(), "run make schema"


def test_round_trip_fits_the_schema(manifest, tmp_path):
    path = write_manifest(manifest, tmp_path)
    assert read_manifest(tmp_path) == manifest
    jsonschema.validate(json.loads(path.read_text()), json.loads(SCHEMA_FILE.read_text()))


def test_equal_manifests_have_equal_bytes(manifest, tmp_path):
    first = write_manifest(manifest, tmp_path).read_bytes()
    assert write_manifest(manifest.model_copy(), tmp_path).read_bytes() == first
    assert {path.name for path in tmp_path.iterdir()} == {MANIFEST_NAME, CHECKSUM_NAME}


def test_the_checksum_is_one_that_sha256sum_reads(manifest, tmp_path):
    write_manifest(manifest, tmp_path)
    subprocess.run(["sha256sum", "--check", "--strict", CHECKSUM_NAME], cwd=tmp_path, check=True)


@pytest.mark.parametrize("version", ["2.0", "", "x"])
def test_unknown_major_version_is_refused(manifest, tmp_path, version):
    path = write_manifest(manifest, tmp_path)
    data = json.loads(path.read_text()) | {"schema_version": version}
    path.write_text(json.dumps(data))
    with pytest.raises(BadInputError, match="schema version"):
        read_manifest(tmp_path)


def test_damaged_manifests_are_one_sentence(manifest, tmp_path):
    with pytest.raises(BadInputError, match="holds no manifest.json"):
        read_manifest(tmp_path)
    path = write_manifest(manifest, tmp_path)
    path.write_text(path.read_text()[:50])
    with pytest.raises(BadInputError, match="cannot be read"):
        read_manifest(tmp_path)
    write_manifest(manifest, tmp_path)
    path.write_text(path.read_text().replace('"0000', '"000'))
    with pytest.raises(BadInputError, match=r"source\.files\.0\.sha256"):
        read_manifest(tmp_path)


@pytest.mark.parametrize("path", ["/etc/passwd", "../outside", "a/../../b"])
def test_paths_stay_inside(path):
    with pytest.raises(ValidationError):
        FileRecord(path=path, size=0, sha256="0" * 64)
