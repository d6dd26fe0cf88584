"""Reading and writing `manifest.json` and its JSON Schema.

python -m manifests.io   writes the schema again after a change of the model
"""

from __future__ import annotations

import json
from pathlib import Path

from pydantic import ValidationError

from manifests.errors import BadInputError
from manifests.files import sha256_file, write_atomically
from manifests.model import SCHEMA_VERSION, Manifest

__all__ = [
    "CHECKSUM_NAME",
    "MANIFEST_NAME",
    "SCHEMA_FILE",
    "checksum_line",
    "json_schema",
    "read_manifest",
    "read_manifest_file",
    "write_manifest",
]

MANIFEST_NAME = "manifest.json"
# The manifest covers every other file, and this one the manifest.
CHECKSUM_NAME = f"{MANIFEST_NAME}.sha256"
SCHEMA_FILE = Path(__file__).with_name("manifest-v1.schema.json")


def write_manifest(manifest: Manifest, folder: Path) -> Path:
    """Write the manifest and its checksum into `folder`; equal manifests give equal bytes."""
    path = folder / MANIFEST_NAME
    write_atomically(path, json.dumps(manifest.model_dump(mode="json"), indent=2, ensure_ascii=False) + "\n")
    write_atomically(folder / CHECKSUM_NAME, checksum_line(path))
    return path


def checksum_line(path: Path) -> str:
    """What the checksum's file says of a manifest, as `sha256sum --check` reads it."""
    return f"{sha256_file(path)}  {path.name}\n"


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of an artifact folder.

    Raises:
        BadInputError: if it is missing, is not JSON, has an unknown major version or does not fit the schema.
    """
    if not (folder / MANIFEST_NAME).exists():
        raise BadInputError(f"{folder} holds no {MANIFEST_NAME}: give a folder that vlmconvert has written")
    return read_manifest_file(folder / MANIFEST_NAME)


def read_manifest_file(path: Path) -> Manifest:
    """Read a manifest that may stand alone and under any name; see `read_manifest`."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadInputError(f"{path} cannot be read ({error}): convert the checkpoint again") from error
    version = str(data.get("schema_version", "")) if isinstance(data, dict) else ""
    if version.split(".")[0] != SCHEMA_VERSION.split(".")[0]:
        raise BadInputError(
            f"{path} has schema version {version or 'none'}, this vlmconvert reads {SCHEMA_VERSION}: "
            "use a vlmconvert of that version"
        )
    try:
        return Manifest.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise BadInputError(f"{path}: {where}: {first['msg']}; convert the checkpoint again") from error


def json_schema() -> str:
    """The JSON Schema of the manifest, as the text that is committed beside the model."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **Manifest.model_json_schema()}
    return json.dumps(schema, indent=2) + "\n"


if __name__ == "__main__":
    write_atomically(SCHEMA_FILE, json_schema())
