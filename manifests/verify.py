"""Verifying an artifact's files against its manifest, and the manifest against its checksum and its model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from manifests.errors import BadInputError
from manifests.evaluation import EVALUATION_FOLDER
from manifests.files import sha256_file
from manifests.io import CHECKSUM_NAME, MANIFEST_NAME, checksum_line
from manifests.model import SCHEMA_VERSION, FileRecord, Manifest

__all__ = ["Check", "failed", "passed", "skipped", "verify_files", "verify_manifest"]

# What may lie beside the files of a manifest: it is written for people or by later runs, and no runtime reads it.
_FREE_NAMES = {MANIFEST_NAME, CHECKSUM_NAME, "run.json", EVALUATION_FOLDER}
_FREE_PREFIXES = (".", "LICENSE", "NOTICE")
_FREE_SUFFIXES = {".md"}


class Check(BaseModel):
    """One thing that was looked at: what, where, and how it is.

    `place` is a file, a component, or both; inside a component also a block.
    """

    model_config = ConfigDict(frozen=True)

    check: str
    place: str
    outcome: Literal["passed", "failed", "skipped"]
    detail: str


def passed(check: str, place: str, detail: str = "") -> Check:
    """A check that found nothing."""
    return Check(check=check, place=place, outcome="passed", detail=detail)


def failed(check: str, place: str, detail: str) -> Check:
    """A finding."""
    return Check(check=check, place=place, outcome="failed", detail=detail)


def skipped(check: str, place: str, detail: str) -> Check:
    """A check that an earlier finding has made impossible."""
    return Check(check=check, place=place, outcome="skipped", detail=detail)


def verify_manifest(folder: Path) -> tuple[Manifest | None, list[Check]]:
    """Check the manifest against its checksum and against the schema.

    Returns:
        The manifest, or None if it cannot be relied on, and what was found.

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
        version = str(data["schema_version"])
        if version.split(".")[0] != SCHEMA_VERSION.split(".")[0]:
            findings.append(f"schema version {version}, this vlmconvert reads {SCHEMA_VERSION}")
        else:
            manifest = Manifest.model_validate(data)
            findings += _contradictions(manifest)
            manifest = None if findings else manifest
    except ValidationError as error:
        findings += [f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in error.errors()]
    except (ValueError, KeyError, TypeError) as error:
        findings.append(f"not a manifest ({error!r})")
    checks += [failed("schema", MANIFEST_NAME, text) for text in findings] or [passed("schema", MANIFEST_NAME)]
    return manifest, checks


def verify_files(folder: Path, manifest: Manifest) -> Iterator[Check]:
    """Check size and SHA-256 of every file that the manifest lists, and that nothing else lies there that a runtime could read."""
    listed = set()
    for component in manifest.components:
        for record in component.files:
            listed.add(record.path)
            yield _file(folder, record, f"{component.name}, {record.path}")
    for record in manifest.assets:
        listed.add(record.path)
        yield _file(folder, record, record.path)
    unexpected = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        top = name.parts[0]
        free = top in _FREE_NAMES or top.startswith(_FREE_PREFIXES) or name.suffix in _FREE_SUFFIXES
        if path.is_file() and not free and name.as_posix() not in listed:
            unexpected.append(failed("listed", name.as_posix(), "not in the manifest"))
    yield from unexpected or [passed("listed", ".", "nothing beside the manifest's files")]


def _file(folder: Path, record: FileRecord, place: str) -> Check:
    path = folder / record.path
    if not path.is_file():
        return failed("file", place, "missing")
    if (size := path.stat().st_size) != record.size:
        return failed("file", place, f"{size} bytes, the manifest says {record.size}")
    if sha256_file(path) != record.sha256:
        return failed("file", place, "its SHA-256 is not the one in the manifest")
    return passed("file", place)


def _contradictions(manifest: Manifest) -> Iterator[str]:
    """What the schema allows and yet cannot be."""
    paths = [record.path for component in manifest.components for record in component.files]
    paths += [record.path for record in manifest.assets]
    names = [component.name for component in manifest.components]
    for kind, values in (("file", paths), ("component", names)):
        for value in sorted({value for value in values if values.count(value) > 1}):
            yield f"{kind} {value} is listed twice"
    for component in manifest.components:
        suffixes = sorted(Path(record.path).suffix for record in component.files)
        if component.format == "ascend-w8a16":
            if set(suffixes) != {".json", ".safetensors"}:
                yield f"component {component.name} does not have weights and their description"
            continue
        expected = {"openvino": [".bin", ".xml"], "onnx": [".data", ".onnx"]}[component.format]
        if suffixes != expected:
            yield f"component {component.name} does not have one {expected[1]} and one {expected[0]}"
    formats = {component.format.split("-")[0] for component in manifest.components}
    if formats - {manifest.target}:
        yield f"the target is {manifest.target}, and components are of {', '.join(sorted(formats - {manifest.target}))}"
    if (manifest.run_plan is not None) != (manifest.target == "ascend"):
        yield "a run plan goes with the target ascend, and with no other"
