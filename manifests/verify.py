"""Verifying an artifact's files against its manifest, and the manifest against its checksum and its schema."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from manifests.beside import foreign_files
from manifests.errors import BadInputError
from manifests.files import sha256_file
from manifests.io import CHECKSUM_NAME, MANIFEST_NAME, check_names, checksum_line
from manifests.model import SCHEMA_VERSION, FileRecord, Manifest

__all__ = ["Finding", "failed", "passed", "skipped", "verify_files", "verify_manifest"]

# Names of files that people may add to an artifact, since no runtime reads them.
_FREE_PREFIXES = (".", "LICENSE", "NOTICE")
_FREE_SUFFIXES = {".md"}


class Finding(BaseModel):
    """The outcome of one check: what was checked, where, and the result.

    `place` names a file, a component or both, and the block if a single block of a component was checked.
    """

    model_config = ConfigDict(frozen=True)

    check: str
    place: str
    outcome: Literal["passed", "failed", "skipped"]
    detail: str


def passed(check: str, place: str, detail: str = "") -> Finding:
    """The finding of a check that passed."""
    return Finding(check=check, place=place, outcome="passed", detail=detail)


def failed(check: str, place: str, detail: str) -> Finding:
    """The finding of a check that failed; `detail` says what is wrong."""
    return Finding(check=check, place=place, outcome="failed", detail=detail)


def skipped(check: str, place: str, detail: str) -> Finding:
    """The finding of a check that could not run; `detail` says why."""
    return Finding(check=check, place=place, outcome="skipped", detail=detail)


def verify_manifest(folder: Path) -> tuple[Manifest | None, list[Finding]]:
    """Check the manifest against its checksum and against the schema.

    Returns:
        The manifest, or None if it contradicts the schema or itself; and the findings.

    Raises:
        BadInputError: if there is no manifest.
    """
    path, checksum = folder / MANIFEST_NAME, folder / CHECKSUM_NAME
    if not path.is_file():
        raise BadInputError(f"{folder} holds no {MANIFEST_NAME}: give a folder that vlmconvert has written")
    checks = []
    if not checksum.is_file():
        checks.append(failed("checksum", CHECKSUM_NAME, "missing"))
    elif checksum.read_bytes() != checksum_line(path).encode():
        checks.append(failed("checksum", MANIFEST_NAME, f"its SHA-256 is not the one in {CHECKSUM_NAME}"))
    else:
        checks.append(passed("checksum", MANIFEST_NAME))
    manifest = None
    findings = []
    try:
        data = json.loads(path.read_bytes())
        check_names(data, path)
        version = str(data["schema_version"])
        if version.split(".")[0] != SCHEMA_VERSION.split(".")[0]:
            findings.append(f"schema version {version}, and this vlmconvert reads {SCHEMA_VERSION}")
        else:
            manifest = Manifest.model_validate(data)
            findings += _contradictions(manifest)
            manifest = None if findings else manifest
    except ValidationError as error:
        findings += [f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors()]
    except (BadInputError, ValueError, KeyError, TypeError, RecursionError) as error:
        findings.append(f"not a manifest ({error!r})")
    checks += [failed("schema", MANIFEST_NAME, text) for text in findings] or [passed("schema", MANIFEST_NAME)]
    return manifest, checks


def verify_files(folder: Path, manifest: Manifest) -> Iterator[Finding]:
    """Check size and SHA-256 of every file in the manifest, and that the folder holds no other file that a runtime may read."""
    for component in manifest.components:
        for record in component.files:
            yield _file(folder, record, f"{component.name}, {record.path}")
    for record in manifest.assets:
        yield _file(folder, record, record.path)
    unexpected = [
        failed("listed", path.as_posix(), "not in the manifest")
        for path in foreign_files(folder, manifest)
        if not path.parts[0].startswith(_FREE_PREFIXES) and path.suffix not in _FREE_SUFFIXES
    ]
    yield from unexpected or [passed("listed", ".", "no files but the manifest's")]


def _file(folder: Path, record: FileRecord, place: str) -> Finding:
    path = folder / record.path
    if not path.is_file():
        return failed("file", place, "not a file" if path.exists() else "missing")
    if (size := path.stat().st_size) != record.size:
        return failed("file", place, f"{size} bytes, the manifest says {record.size}")
    if sha256_file(path) != record.sha256:
        return failed("file", place, "its SHA-256 is not the one in the manifest")
    return passed("file", place)


def _contradictions(manifest: Manifest) -> Iterator[str]:
    """Errors that the schema cannot exclude: files and components that are listed twice."""
    paths = [record.path for component in manifest.components for record in component.files]
    paths += [record.path for record in manifest.assets]
    names = [component.name for component in manifest.components]
    for kind, values in (("file", paths), ("component", names)):
        for value in sorted({value for value in values if values.count(value) > 1}):
            yield f"{kind} {value} is listed twice"
