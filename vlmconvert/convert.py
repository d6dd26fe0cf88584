"""From a command line to a finished folder: plan, build, validate, record, and only then give it its name."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.table import Table

from calibration.scenes import Split
from calibration.sources import load_samples
from manifests.errors import BadInputError
from manifests.files import file_record, write_atomically
from manifests.io import CHECKSUM_NAME, MANIFEST_NAME, read_manifest, write_manifest
from manifests.model import Calibration, Manifest, Source, Validation
from passes.checkpoint import fetch_checkpoint, open_checkpoint, read_config
from passes.store import Store, library_versions
from passes.validate.accuracy import ValidateAccuracyPass
from passes.validate.parity import ValidateParityPass
from vlmconvert.artifact import processor_files
from vlmconvert.console import Reporter, format_size
from vlmconvert.families import check_family, demo_checkpoint, family_module
from vlmconvert.genai import GENAI_FILES, write_genai_files
from vlmconvert.pipeline import Built, Conversion
from vlmconvert.plan import Options, Plan
from vlmconvert.reference import reference_model
from vlmconvert.targets import check_installed

if TYPE_CHECKING:
    from passes.validate.protocol import Batch

__all__ = ["Request", "convert"]

RUN_LOG = "run.json"


@dataclass(frozen=True)
class Request:
    """One conversion as the command line asks for it."""

    family: str
    model: str | None
    output: Path | None
    options: Options
    store: Path
    workers: int = 2
    revision: str | None = None
    token: str | None = None
    force: bool = False
    dry_run: bool = False
    validate: bool = True
    validation_samples: int = 200
    max_kl: float = 1.0
    max_drop: float = 1.0


def convert(request: Request, reporter: Reporter) -> tuple[Path | None, bool]:
    """Convert one checkpoint.

    Returns:
        The finished folder (None after a dry run), and whether all checks passed.

    Raises:
        BadInputError: before any work, if something is wrong with the input.
        ConversionError: if a pass failed; whatever stood at the output is still there.
    """
    start = time.monotonic()
    family = family_module(request.family)
    model = request.model or str(demo_checkpoint(request.family) or "")
    if not model:
        raise BadInputError(f"there is no embedded {request.family} checkpoint: name a folder or a hub id")

    def check(folder: Path) -> None:
        check_family(request.family, read_config(folder), model)

    folder, revision = fetch_checkpoint(model, request.revision, request.token, check)
    check(folder)
    checkpoint = open_checkpoint(folder, model if revision else None, revision)
    check_installed(request.options.target)
    name = f"{Path(checkpoint.model).name}-{request.options.target}-{request.options.llm}-{request.options.vision}"
    output = request.output or Path(name)
    conversion = Conversion(
        request.family, checkpoint, request.options, Store(request.store), request.workers, reporter
    )
    reporter.table(_plan_table(conversion.plan, checkpoint.dtype))
    for line in _plan_notes(conversion.plan):
        reporter.say(line)
    _check_output(output, conversion, request.force)
    if request.dry_run:
        conversion.helper.close()
        return None, True
    conversion.check_disk(output)

    built = conversion.build()
    output.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    try:
        manifest = _assemble(conversion, built, staging, name, family.ARCHITECTURE)
        write_manifest(manifest, staging)
        if request.validate:
            manifest = manifest.model_copy(update={"validation": _validate(request, conversion, staging, reporter)})
            write_manifest(manifest, staging)
        _write_model_card(manifest, staging)
        _publish(staging, output, manifest, request.force, reporter)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
    seconds = time.monotonic() - start
    log = {
        "seconds": round(seconds, 1),
        "components": {item.plan.component.name: round(item.seconds, 1) for item in built},
    }
    write_atomically(
        output / RUN_LOG, json.dumps({**log, "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z")}, indent=2) + "\n"
    )
    reporter.table(_result_table(manifest, built))
    failed = [item for item in manifest.validation if not item.passed]
    for item in failed:
        reporter.say(
            f"check failed: {item.metric} of the {item.component} is {item.value:g}, the limit is {item.threshold:g}"
        )
    reporter.say(f"{output}  ({format_size(_folder_size(output))}, {seconds:.0f} s)")
    return output, not failed


def _assemble(conversion: Conversion, built: list[Built], staging: Path, name: str, architecture: str) -> Manifest:
    """Fill the staging folder with everything but manifest and card."""
    checkpoint = conversion.checkpoint
    components = conversion.records(built, staging)
    write_atomically(staging / "config.json", json.dumps(conversion.config, indent=2, sort_keys=True) + "\n")
    for path in processor_files(checkpoint.folder):
        shutil.copyfile(path, staging / path.name)
    if conversion.options.target == "openvino" and family_module(conversion.family).TOKENIZER_GRAPHS:
        conversion.helper.run(write_genai_files, staging)
        conversion.helper.close()
    names = ["config.json", *GENAI_FILES, *(path.name for path in processor_files(staging))]
    paths = [staging / name for name in dict.fromkeys(names)]
    assets = [file_record(path, staging) for path in paths if path.exists()]
    samples = conversion.samples
    return Manifest(
        name=name,
        family=conversion.family,
        target=conversion.options.target,
        source=Source(
            model=checkpoint.model,
            revision=checkpoint.revision,
            architecture=architecture,
            dtype=checkpoint.dtype,
            files=conversion.source_files,
        ),
        components=components,
        assets=assets,
        calibration=None
        if samples is None
        else Calibration(
            source=samples.source,
            revision=samples.revision,
            samples=len(samples.samples),
            digest=samples.digest,
            seed=samples.seed,
        ),
        validation=[],
        environment=library_versions(conversion.options.target),
    )


def _validate(request: Request, conversion: Conversion, staging: Path, reporter: Reporter) -> list[Validation]:
    """Load the staged artifact as a user would, and measure it beside the checkpoint."""
    from calibration.inputs import load_processor
    from vlmconvert.runtime import Runner

    with reporter.stage("loading checkpoint and artifact"):
        processor = load_processor(staging)
        reference = reference_model(conversion, conversion.plan.size_after)
        artifact = Runner(staging)
    batches = list(_batches(processor, request.validation_samples))
    vision = next(component.name for component in conversion.components if component.side == "vision")
    sides = (vision, conversion.components[-1].name)

    def decode(tokens: Any) -> list[str]:
        texts: list[str] = processor.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return texts

    with reporter.stage("validating: parity", len(batches)) as step:
        figures = ValidateParityPass(request.max_kl)(reference, artifact, batches, artifact.ends, sides, step)
    with reporter.stage("validating: accuracy", len(batches)) as step:
        figures += ValidateAccuracyPass(request.max_drop)(reference, artifact, batches, artifact.ends, decode, step)
    return figures


def _batches(processor: Any, count: int, size: int = 25) -> Iterator[Batch]:
    """Held-out scenes, the first question of each, as left-padded batches."""
    from calibration.inputs import prompt_inputs
    from passes.validate.protocol import Batch

    samples = load_samples("scenes", count, split=Split.TEST).samples
    for first in range(0, count, size):
        chosen = samples[first : first + size]
        arrays = prompt_inputs(
            processor, [sample.image for sample in chosen], [sample.turns[0][0] for sample in chosen]
        )
        yield Batch(arrays, tuple(sample.turns[0][1] for sample in chosen))


def _check_output(output: Path, conversion: Conversion, force: bool) -> None:
    """Refuse an output that holds something else, before any work."""
    if force or not output.exists():
        return
    mend = "choose another folder with --output, or replace it with --force"
    if not output.is_dir():
        raise BadInputError(f"{output} exists and is a file: {mend}")
    if not any(output.iterdir()):
        return
    if not (output / MANIFEST_NAME).exists():
        raise BadInputError(f"{output} exists and vlmconvert did not write it: {mend}")
    existing = read_manifest(output)
    planned = {item.component.name: [str(step) for step in item.passes] for item in conversion.plan.components}
    if (
        {item.name: item.passes for item in existing.components} != planned
        or existing.source.files != conversion.source_files
        or existing.environment != library_versions(conversion.options.target)
    ):
        raise BadInputError(f"{output} holds a different result: {mend}")


def _publish(staging: Path, output: Path, manifest: Manifest, force: bool, reporter: Reporter) -> None:
    """Give the finished folder its name; what stood there goes only after the new one is in place."""
    if output.exists() and any(output.iterdir()) and not force:
        existing = read_manifest(output)
        if existing.model_copy(update={"validation": manifest.validation}) == manifest:
            reporter.log(f"{output} already holds this result")
            if manifest.validation:
                for name in (MANIFEST_NAME, CHECKSUM_NAME, "README.md"):
                    (staging / name).replace(output / name)
            return
        raise BadInputError(
            f"{output} holds a different result: choose another folder with --output, or replace it with --force"
        )
    staging.chmod(0o755)
    if not output.exists():
        staging.rename(output)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{output.name}-old-", dir=output.parent))
    output.rename(old / output.name)
    try:
        staging.rename(output)
    except OSError:
        (old / output.name).rename(output)
        raise
    shutil.rmtree(old)


def _write_model_card(manifest: Manifest, folder: Path) -> None:
    from vlmconvert.model_card import model_card

    model_card(manifest).save(folder / "README.md")


def _plan_table(plan: Plan, dtype: str) -> Table:
    table = Table(title=f"Plan ({dtype} checkpoint)", title_justify="left")
    for column in ("component", "precision", "blocks", "passes"):
        table.add_column(column, overflow="fold")
    for column in ("size before", "after (about)"):
        table.add_column(column, justify="right")
    for item in plan.components:
        table.add_row(
            item.component.name,
            item.precision,
            str(len(item.component.blocks)),
            "\n".join(str(step) for step in item.passes),
            format_size(item.size_before),
            format_size(item.size_after),
        )
    return table


def _plan_notes(plan: Plan) -> Iterator[str]:
    yield f"disk: about {format_size(plan.disk)} at the fullest"
    for item in plan.components:
        for fallback in item.fallbacks:
            yield f"fallback: {fallback}"
    if plan.unused_tensors:
        yield f"not read: {len(plan.unused_tensors)} tensors of the checkpoint, such as {plan.unused_tensors[0]}"


def _result_table(manifest: Manifest, built: list[Built]) -> Table:
    table = Table(title=manifest.name, title_justify="left")
    table.add_column("component")
    table.add_column("precision")
    for column in ("size before", "after", "KL", "accuracy before", "after", "time"):
        table.add_column(column, justify="right")

    def kl(component: str) -> str:
        values = [item.value for item in manifest.validation if item.metric == "kl" and item.component == component]
        return f"{values[0]:.2g}" if values else "-"

    for record, item in zip(manifest.components, built, strict=True):
        table.add_row(
            record.name,
            record.precision,
            format_size(item.plan.size_before),
            format_size(sum(file.size for file in record.files)),
            kl(record.name),
            "",
            "",
            f"{item.seconds:.1f} s",
        )
    accuracy = next((item for item in manifest.validation if item.metric == "exact_match"), None)
    table.add_section()
    table.add_row(
        "artifact",
        "",
        format_size(sum(item.plan.size_before for item in built)),
        format_size(sum(file.size for record in manifest.components for file in record.files)),
        kl("artifact"),
        f"{accuracy.reference:.1%}" if accuracy and accuracy.reference is not None else "-",
        f"{accuracy.value:.1%}" if accuracy else "-",
        f"{sum(item.seconds for item in built):.1f} s",
    )
    return table


def _folder_size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
