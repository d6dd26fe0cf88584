"""Opening a checkpoint: finding it, checking its metadata, and splitting it into components; no weight is read."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import TYPE_CHECKING

from manifests.errors import BadInputError
from passes.checkpoint import fetch_checkpoint, open_checkpoint, read_config
from passes.export.template import VERSION, Templates, prepare
from passes.processor_files import check_processor
from passes.split import check_tensors
from passes.store import Store, digest, library_versions
from vlmconvert import families
from vlmconvert.console import Reporter
from vlmconvert.conversion.helper import Helper
from vlmconvert.conversion.progress import files_made
from vlmconvert.families import check_family, family_of, load_family
from vlmconvert.families.opened import OpenedModel

if TYPE_CHECKING:
    from passes.checkpoint import Checkpoint
    from vlmconvert.families.base import Family

__all__ = ["find_checkpoint", "open_model", "source_digest"]


def find_checkpoint(
    model: str | None, family: str | None = None, revision: str | None = None, token: str | None = None
) -> tuple[Family, Checkpoint]:
    """Find a checkpoint and read its metadata.

    Args:
        model: local folder or hub id; None is the demo checkpoint of the family.
        family: name of the checkpoint's family; None finds the family from config.json.
        revision: branch, tag or commit of a hub id.
        token: access token for a gated hub id.

    Raises:
        BadInputError: if the checkpoint does not exist, is damaged, or is of another family.
    """
    named = load_family(family) if family else None
    if model is None:
        demo = named.demo if named else None
        if demo is None:
            what = f"{family} has no demo checkpoint" if family else "there is no checkpoint"
            raise BadInputError(f"{what}: give a folder or a hub id")
        model = str(demo)

    def check(folder: Path) -> None:
        config = read_config(folder)
        if named is None:
            family_of(config, model)
        else:
            check_family(named, config, model)

    folder, commit = fetch_checkpoint(model, revision, token, check)
    check(folder)
    checkpoint = open_checkpoint(folder, model if commit else None, commit)
    return family_of(checkpoint.config, model), checkpoint


def open_model(
    family: Family, checkpoint: Checkpoint, helper: Helper, store: Store, reporter: Reporter, trace: bool = True
) -> OpenedModel:
    """Split a checkpoint into components, and check every tensor's name, shape and dtype.

    Args:
        family: family of the checkpoint.
        checkpoint: metadata of the checkpoint.
        helper: process in which transformers describes the architecture and blocks are traced.
        store: keeps the descriptions and traces.
        reporter: shows progress.
        trace: whether blocks are traced; targets whose artifacts are graphs need the traces.

    Raises:
        BadInputError: if the processor's files, the config or a tensor is missing or wrong.
    """
    check_processor(checkpoint.folder, family.processor_files)
    key = digest(
        "templates",
        VERSION,
        checkpoint.config,
        sorted(checkpoint.tensors),
        family.name,
        trace,
        source_digest(family),
        library_versions(),
    )
    if key not in store:
        with reporter.stage("reading the architecture") as step:
            arguments = (checkpoint.folder, list(checkpoint.tensors), family.components)

            def make(output: Path) -> None:
                helper.run(prepare, *arguments, output, trace, meanwhile=files_made(output, "*.xml", step))

            store.get_or_make(key, make, "traces")
    templates = Templates(store.path(key))
    if not trace:
        templates.architecture.check(checkpoint)
    config = templates.config
    components = tuple(component.bound(templates.shapes) for component in family.components(config))
    rest = check_tensors(checkpoint, templates.names, components, templates.shapes)
    read = {*family.config_tensors.values()}
    if not trace:  # a runtime that builds the model's graph itself needs all tensors
        read.update(templates.architecture.shapes)
    unused = tuple(name for name in rest if name not in read)
    return OpenedModel(family, checkpoint, templates, config, components, unused)


def source_digest(family: Family) -> str:
    """Digest of the code of a family and of the code that families share; traces depend on it."""
    folders = {Path(families.__file__).parent, Path(inspect.getfile(type(family))).parent}
    files = sorted(path for folder in folders for path in folder.rglob("*.py"))
    return digest([path.read_text(encoding="utf-8") for path in files])
