"""Hashes of what the demo checkpoints become; `python -m tests.golden.record` writes `hashes.json` anew.

Only what does not depend on the processor is here: weights that are rounded, none that are chosen by what the model computes.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

from manifests.beside import RUN_LOG_NAME
from manifests.io import CHECKSUM_NAME, MANIFEST_NAME
from passes.store import library_versions
from tests.conftest import vlmconvert
from vlmconvert.targets import TARGETS, load_target

__all__ = ["ARTIFACTS", "HASHES", "convert", "file_hashes", "versions"]

HASHES = Path(__file__).with_name("hashes.json")

# Name -> what is typed after `vlmconvert`.
ARTIFACTS = {
    "mllama-openvino-int4-int8": ("mllama", "--llm", "int4", "--vision", "int8"),
    "mllama-ascend-w8a16": ("mllama", "--target", "ascend"),
    "llava-onnx-int8-int8": ("llava", "--target", "onnx", "--llm", "int8", "--vision", "int8"),
    "llava-openvino-fp16-fp16": ("llava", "--llm", "fp16", "--vision", "fp16"),
}


def convert(name: str, folder: Path, store: Path) -> Path:
    """Make one of `ARTIFACTS` in a folder, under its name."""
    output = folder / name
    result = vlmconvert(*ARTIFACTS[name], "-o", output, "--store", store, "--no-validate")
    assert result.exit_code == 0, result.output
    return output


def file_hashes(artifact: Path) -> dict[str, str]:
    """SHA-256 of every file; of the manifest without library versions and its own."""
    files = sorted(path for path in artifact.iterdir() if path.name not in {RUN_LOG_NAME, CHECKSUM_NAME})
    return {path.name: hashlib.sha256(_content(path)).hexdigest() for path in files}


def versions() -> dict[str, str]:
    """Versions of the libraries on which the bytes depend, without the build of torch."""
    more = {name for target in TARGETS.builtin for name in load_target(target).distributions}
    return {name: version.partition("+")[0] for name, version in library_versions(*sorted(more)).items()}


def _content(path: Path) -> bytes:
    if path.name != MANIFEST_NAME:
        return path.read_bytes()
    manifest: dict[str, Any] = json.loads(path.read_bytes())
    del manifest["environment"], manifest["schema_version"]
    return json.dumps(manifest).encode()


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        made = {artifact: file_hashes(convert(artifact, folder, folder / "store")) for artifact in ARTIFACTS}
    HASHES.write_text(json.dumps({"versions": versions(), "artifacts": made}, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
