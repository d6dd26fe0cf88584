"""Finding the checkpoint that an artifact was made from, in order to compare the two."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from manifests.errors import BadInputError
from manifests.files import file_record
from manifests.model import Manifest
from passes.processor_files import processor_files
from passes.store import Store
from vlmconvert.console import Reporter
from vlmconvert.conversion.helper import Helper
from vlmconvert.conversion.open import find_checkpoint, open_model
from vlmconvert.conversion.source import hash_source
from vlmconvert.families import load_family
from vlmconvert.families.opened import OpenedModel

__all__ = ["MeasuredCheckpoint", "open_checkpoint_of"]


@dataclass(frozen=True)
class MeasuredCheckpoint:
    """The checkpoint of an artifact.

    Attributes:
        model: the checkpoint, with a completed config.
        identity: digest of the checkpoint's weights and of the library versions.
    """

    model: OpenedModel
    identity: str

    @property
    def folder(self) -> Path:
        """Folder of the checkpoint."""
        return self.model.checkpoint.folder

    @property
    def processor_digest(self) -> list[str]:
        """SHA-256 of each of the processor's files."""
        return [file_record(path, self.folder).sha256 for path in processor_files(self.folder)]


def open_checkpoint_of(
    artifact: Path, manifest: Manifest, model: str | None, token: str | None, store: Store, reporter: Reporter
) -> MeasuredCheckpoint:
    """Open the checkpoint that an artifact was made from, and compare its files with the manifest.

    Args:
        artifact: folder of the artifact.
        manifest: manifest of the artifact.
        model: local folder or hub id of the checkpoint; None takes the hub id that the manifest names, or the demo.
        token: access token for a gated hub id.
        store: keeps transformers' description of the architecture.
        reporter: shows progress.

    Raises:
        BadInputError: if the checkpoint cannot be found, or the artifact was made from another checkpoint.
    """
    revision = None
    if model is None:
        demo = load_family(manifest.family).demo
        if manifest.source.revision is not None:
            model, revision = manifest.source.model, manifest.source.revision
        elif demo is not None and manifest.source.model == demo.name:
            model = str(demo)
        else:
            raise BadInputError(
                f"{artifact} was made from the local folder {manifest.source.model}: give its path with --checkpoint, "
                "or measure without the checkpoint with --no-checkpoint"
            )
    family, checkpoint = find_checkpoint(model, manifest.family, revision, token)
    with Helper() as helper:
        opened = open_model(family, checkpoint, helper, store, reporter, ignore_unused=True)
    source = hash_source(checkpoint, reporter)
    expected = {record.path: record for record in manifest.source.files}
    for record in source.files:
        if expected.get(record.path) not in (record, None):
            raise BadInputError(
                f"{artifact} was not made from {checkpoint.folder}, whose {record.path} differs: give the checkpoint that it was "
                "made from"
            )
    return MeasuredCheckpoint(opened.completed(), source.identity(opened))
