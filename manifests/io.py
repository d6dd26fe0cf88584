"""Reading and writing `manifest.json` and its JSON Schema.

python -m manifests.io   writes the schema again after a change of the model
"""

from __future__ import annotations

import hashlib
import json
import unicodedata
from pathlib import Path
from typing import Any

from manifests.errors import BadInputError
from manifests.files import checked_record, read_json, sha256_file, write_atomically
from manifests.model import SCHEMA_VERSION, Manifest

__all__ = [
    "CHECKSUM_NAME",
    "MANIFEST_NAME",
    "SCHEMA_FILE",
    "check_names",
    "checksum_line",
    "json_schema",
    "manifest_digest",
    "read_manifest",
    "read_manifest_file",
    "write_manifest",
]

MANIFEST_NAME = "manifest.json"
# The manifest holds the SHA-256 of every other file, and this file holds that of the manifest.
CHECKSUM_NAME = f"{MANIFEST_NAME}.sha256"
SCHEMA_FILE = Path(__file__).with_name("manifest-v1.schema.json")


def write_manifest(manifest: Manifest, folder: Path) -> Path:
    """Write the manifest and its checksum into `folder`; equal manifests give equal bytes."""
    path = folder / MANIFEST_NAME
    write_atomically(path, json.dumps(manifest.model_dump(mode="json"), indent=2, ensure_ascii=False) + "\n")
    write_atomically(folder / CHECKSUM_NAME, checksum_line(path))
    return path


def checksum_line(path: Path) -> str:
    """Content of the checksum file for a manifest, in the format that `sha256sum --check` reads."""
    return f"{sha256_file(path)}  {path.name}\n"


def read_manifest(folder: Path) -> Manifest:
    """Read the manifest of an artifact folder.

    Raises:
        BadInputError: if the manifest is missing, is not JSON, has an unknown major version or does not fit the schema.
    """
    if not (folder / MANIFEST_NAME).exists():
        raise BadInputError(f"{folder} holds no {MANIFEST_NAME}: give a folder that vlmconvert has written")
    return read_manifest_file(folder / MANIFEST_NAME)


def check_names(content: Any, path: Path) -> None:
    """Refuse a manifest with characters that would command a terminal, or mislead who reads what it shows.

    Raises:
        BadInputError: if a text or a key has one.
    """
    pending = [content]
    while pending:
        item = pending.pop()
        if isinstance(item, dict):
            pending += [*item, *item.values()]
        elif isinstance(item, list):
            pending += item
        elif isinstance(item, str) and any(unicodedata.category(letter) in {"Cc", "Cf", "Cs"} for letter in item):
            raise BadInputError(f"{path} has characters that no name has, in {item!r:.80}: fetch the artifact again")


def read_manifest_file(path: Path) -> Manifest:
    """Read a manifest file of any name, with or without its artifact; see `read_manifest`."""
    mend = "convert the checkpoint again"
    data = read_json(path, mend)
    check_names(data, path)
    version = str(data.get("schema_version", "")) if isinstance(data, dict) else ""
    if version.split(".")[0] != SCHEMA_VERSION.split(".")[0]:
        raise BadInputError(
            f"{path} has schema version {version or 'none'}, and this vlmconvert reads {SCHEMA_VERSION}: "
            "use a vlmconvert that reads that version"
        )
    return checked_record(data, path, Manifest, "a manifest", mend)


def manifest_digest(manifest: Manifest) -> str:
    """SHA-256 of a manifest without its validation figures, which do not change how the artifact answers.

    Only fields that the manifest's file holds are hashed, so that a new field of the schema leaves the digest of an older
    manifest as it is.
    """
    content = manifest.model_copy(update={"validation": []}).model_dump(mode="json", exclude_unset=True)
    text = json.dumps([content], sort_keys=True, separators=(",", ":"), ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()


def json_schema() -> str:
    """The JSON Schema of the manifest, as the text that is committed beside the model."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **Manifest.model_json_schema()}
    return json.dumps(schema, indent=2) + "\n"


if __name__ == "__main__":
    write_atomically(SCHEMA_FILE, json_schema())
