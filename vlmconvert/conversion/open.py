"""Opening a checkpoint: finding it, checking its metadata, and splitting it into components; no weight is read."""

from __future__ import annotations

import inspect
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from manifests.errors import BadInputError
from passes.architecture import check_sizes, refuse_kernels
from passes.checkpoint import fetch_checkpoint, open_checkpoint, read_config
from passes.export.template import VERSION, Templates, prepare, trace
from passes.limits import run_limited
from passes.processor_files import check_processor
from passes.split import check_tensors
from passes.store import Store, digest, library_versions
from passes.unused import refuse_adapters
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

# Seconds on the processor to describe an architecture; the largest models take a tenth of them.
_SECONDS = 120
_TOO_LARGE = "config.json describes a model that takes too much time or memory to make: correct the config"


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
    family: Family,
    checkpoint: Checkpoint,
    helper: Helper,
    store: Store,
    reporter: Reporter,
    traced: bool = True,
    ignore_unused: bool = False,
) -> OpenedModel:
    """Split a checkpoint into components, and check every tensor's name, shape and dtype before anything is traced.

    Args:
        family: family of the checkpoint.
        checkpoint: metadata of the checkpoint.
        helper: process in which transformers describes the architecture and blocks are traced.
        store: keeps the descriptions and traces.
        reporter: shows progress.
        traced: whether blocks are traced; targets whose artifacts are graphs need the traces.
        ignore_unused: whether to leave out adapters and other tensors that the model of the config does not have.

    Raises:
        BadInputError: if the processor's files, the config or a tensor is missing or wrong.
    """
    check_processor(checkpoint.folder, family.processor_files)
    check_sizes(checkpoint)
    refuse_kernels(checkpoint)
    key = digest(
        "architecture",
        VERSION,
        checkpoint.config,
        sorted(checkpoint.tensors),
        family.name,
        source_digest(family),
        library_versions(),
    )
    of_traces = digest("traces", key)

    def prepared(output: Path) -> None:
        arguments = (checkpoint.folder, list(checkpoint.tensors), family.components)
        helper.run_limited(_TOO_LARGE, run_limited, _SECONDS, prepare, *arguments, output)

    known = all(item in store for item in ((key, of_traces) if traced else (key,)))
    with nullcontext(_ignored) if known else reporter.stage("reading the architecture") as step:
        templates = Templates(store.get_or_make(key, prepared, "architecture"))
        model = _split(family, checkpoint, templates, whole=not traced, ignore_unused=ignore_unused)
        if not traced:
            return model

        def traces(output: Path) -> None:
            arguments = (templates.folder, family.components, output)
            helper.run(trace, *arguments, meanwhile=files_made(output, "*.xml", step))

        return replace(model, templates=Templates(store.get_or_make(of_traces, traces, "traces")))


def _ignored(label: str) -> None:
    """Takes the place of a step of a stage that is not shown, since its results are in the store."""


def _split(
    family: Family, checkpoint: Checkpoint, templates: Templates, whole: bool, ignore_unused: bool
) -> OpenedModel:
    """Split a checkpoint whose architecture is known; see `open_model`.

    Args:
        family: family of the checkpoint.
        checkpoint: metadata of the checkpoint.
        templates: the description of the architecture.
        whole: whether all tensors of the model are needed, because a runtime builds its graph itself.
        ignore_unused: see `open_model`.
    """
    architecture, config = templates.architecture, templates.config
    if not ignore_unused:
        foreign = (in_file for name, in_file in architecture.names.items() if name not in architecture.shapes)
        refuse_adapters(checkpoint.folder, foreign)
    if whole:
        architecture.check(checkpoint, ignore_unused)
    components = tuple(component.bound(templates.shapes) for component in family.components(config))
    rest = check_tensors(checkpoint, templates.names, components, templates.shapes)
    read = {*family.config_tensors.values(), *(architecture.shapes if whole else ())}
    unused = tuple(name for name in rest if name not in read)
    return OpenedModel(family, checkpoint, templates, config, components, unused)


def source_digest(family: Family) -> str:
    """Digest of the code of a family and of the code that families share; traces depend on it."""
    folders = {Path(families.__file__).parent, Path(inspect.getfile(type(family))).parent}
    files = sorted(path for folder in folders for path in folder.rglob("*.py"))
    return digest([path.read_text(encoding="utf-8") for path in files])
