"""Opening a finished artifact to run it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from manifests.errors import BadInputError
from manifests.io import read_manifest
from passes.checkpoint import read_config
from vlmconvert.families import family_of, load_family
from vlmconvert.targets import load_target

if TYPE_CHECKING:
    from vlmconvert.targets.runner import ArtifactRunner

__all__ = ["open_runner"]


def open_runner(
    folder: Path,
    device: str = "CPU",
    ov_config: Mapping[str, Any] | None = None,
    cache_dir: Path | None = None,
) -> ArtifactRunner:
    """Open an artifact of any target, so that it can be run; an artifact for Ascend runs in torch, without an NPU.

    Args:
        folder: the artifact.
        device: device name of the artifact's runtime.
        ov_config: options of that runtime.
        cache_dir: folder where OpenVINO keeps compiled models.

    Raises:
        BadInputError: if the folder is not an artifact, or its runtime does not have the device or an option.
    """
    manifest = read_manifest(folder)
    for record in (*manifest.assets, *(file for component in manifest.components for file in component.files)):
        if not (folder / record.path).is_file():  # a runtime would wait for a pipe for ever
            raise BadInputError(f"{folder / record.path} is missing or not a file: fetch the artifact again")
    family = load_family(manifest.family)
    described = family_of(read_config(folder), str(folder))
    if described.name != family.name:
        raise BadInputError(
            f"{folder} is a {family.name} by its manifest and a {described.name} by its config.json: fetch the artifact again"
        )
    target = load_target(manifest.target)
    try:
        return target.open_runner(folder, manifest, family, device, ov_config or {}, cache_dir)
    except (AttributeError, LookupError, TypeError, ValueError) as error:
        raise BadInputError(
            f"{folder} cannot be opened, since its files do not fit each other ({type(error).__name__}: {error}): fetch the "
            "artifact again"
        ) from error
