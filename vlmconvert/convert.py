"""From a command line to a finished folder: plan, build, validate, record, and only then give it its name."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from rich.table import Table

from calibration.scenes import Split
from calibration.sources import load_samples
from manifests.errors import BadInputError
from manifests.files import write_atomically
from manifests.io import CHECKSUM_NAME, MANIFEST_NAME, read_manifest, write_manifest
from manifests.model import Calibration, FileRecord, Manifest, Source, Validation
from passes.checkpoint import Checkpoint, fetch_checkpoint, open_checkpoint, read_config
from passes.store import Store
from passes.validate.accuracy import ValidateAccuracyPass
from passes.validate.parity import ValidateParityPass
from vlmconvert.artifact import Contents
from vlmconvert.ascend import AscendConversion, AscendOptions
from vlmconvert.console import Reporter, format_size
from vlmconvert.families import check_family, demo_checkpoint, family_module
from vlmconvert.pipeline import Conversion, Helper
from vlmconvert.plan import Options, PlanLine
from vlmconvert.reference import Opened, reference_model
from vlmconvert.targets import check_installed

if TYPE_CHECKING:
    from calibration.sources import SampleSet
    from passes.validate.protocol import Batch

__all__ = ["Request", "convert"]

RUN_LOG = "run.json"


@dataclass(frozen=True)
class Request:
    """One conversion as the command line asks for it."""

    family: str
    options: Options | AscendOptions
    store: Path
    model: str | None = None
    output: Path | None = None
    workers: int = 2
    revision: str | None = None
    token: str | None = None
    force: bool = False
    dry_run: bool = False
    validate: bool = True
    validation_samples: int = 200
    max_kl: float = 1.0
    max_drop: float = 1.0


class _Plan(Protocol):
    """What will be done, as far as a person is told."""

    @property
    def lines(self) -> tuple[PlanLine, ...]: ...

    @property
    def unused_tensors(self) -> tuple[str, ...]: ...

    @property
    def size_after(self) -> int: ...

    @property
    def disk(self) -> int: ...


class _Work(Opened, Protocol):
    """One run for any target: `vlmconvert.pipeline.Conversion` or `vlmconvert.ascend.AscendConversion`.

    Attributes:
        helper: the process that made it, if it still runs.
        source_files: what the checkpoint consists of.
        samples: what compression has looked at.
    """

    helper: Helper
    source_files: list[FileRecord]

    @property
    def samples(self) -> SampleSet | None: ...

    @property
    def plan(self) -> _Plan: ...

    @property
    def environment(self) -> dict[str, str]: ...

    def check_disk(self, output: Path) -> None: ...

    def build(self) -> None: ...

    def write(self, output: Path) -> Contents: ...


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
    name = f"{Path(checkpoint.model).name}-{request.options.label}"
    output = request.output or Path(name)
    conversion = _open(request, checkpoint, reporter)
    reporter.table(_plan_table(conversion.plan, checkpoint.dtype))
    for line in _plan_notes(conversion.plan):
        reporter.say(line)
    _check_output(output, conversion, request.force)
    if request.dry_run:
        conversion.helper.close()
        return None, True
    conversion.check_disk(output)

    conversion.build()
    with _staging(output) as staging:
        contents = conversion.write(staging)
        manifest = _manifest(conversion, contents, request, name, family.ARCHITECTURE)
        write_manifest(manifest, staging)
        if request.validate:
            manifest = manifest.model_copy(update={"validation": _validate(request, conversion, staging, reporter)})
            write_manifest(manifest, staging)
        _write_model_card(manifest, staging)
        _publish(staging, output, manifest, request.force, reporter)
    seconds = time.monotonic() - start
    log = {
        "seconds": round(seconds, 1),
        "components": {component: round(taken, 1) for component, taken in contents.seconds.items()},
    }
    write_atomically(
        output / RUN_LOG, json.dumps({**log, "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z")}, indent=2) + "\n"
    )
    reporter.table(_result_table(manifest, conversion.plan.lines, contents.seconds))
    failed = [item for item in manifest.validation if not item.passed]
    for item in failed:
        reporter.say(
            f"check failed: {item.metric} of the {item.component} is {item.value:g}, the limit is {item.threshold:g}"
        )
    reporter.say(f"{output}  ({format_size(_folder_size(output))}, {seconds:.0f} s)")
    return output, not failed


def _open(request: Request, checkpoint: Checkpoint, reporter: Reporter) -> _Work:
    """Check everything on metadata, and plan."""
    if isinstance(request.options, AscendOptions):
        return AscendConversion(request.family, checkpoint, request.options, reporter)
    store = Store(request.store)
    return Conversion(request.family, checkpoint, request.options, store, request.workers, reporter)


def _manifest(conversion: _Work, contents: Contents, request: Request, name: str, architecture: str) -> Manifest:
    """The manifest before validation."""
    checkpoint, samples = conversion.checkpoint, conversion.samples
    return Manifest(
        name=name,
        family=conversion.family,
        target=request.options.target,
        source=Source(
            model=checkpoint.model,
            revision=checkpoint.revision,
            architecture=architecture,
            dtype=checkpoint.dtype,
            files=conversion.source_files,
        ),
        components=contents.components,
        assets=contents.assets,
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
        environment=conversion.environment,
        run_plan=contents.run_plan,
    )


def _validate(request: Request, conversion: _Work, staging: Path, reporter: Reporter) -> list[Validation]:
    """Load the staged artifact as a user would, and measure it beside the checkpoint."""
    from calibration.inputs import load_processor
    from vlmconvert.runtime import open_runner

    with reporter.stage("loading checkpoint and artifact"):
        processor = load_processor(staging)
        reference = reference_model(conversion, conversion.plan.size_after)
        artifact = open_runner(staging)
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


def _check_output(output: Path, conversion: _Work, force: bool) -> None:
    """Refuse an output that holds something else, before any work."""
    if output.exists() and not output.is_dir():
        raise BadInputError(f"{output} exists and is a file: choose another folder with --output")
    if force or not output.exists() or not any(output.iterdir()):
        return
    mend = "choose another folder with --output, or replace it with --force"
    if not (output / MANIFEST_NAME).exists():
        raise BadInputError(f"{output} exists and vlmconvert did not write it: {mend}")
    existing = read_manifest(output)
    planned = {line.name: list(line.passes) for line in conversion.plan.lines}
    sizes = {file.path: file.size for item in existing.components for file in item.files}
    if (
        {item.name: item.passes for item in existing.components} != planned
        or existing.source.files != conversion.source_files
        or existing.environment != conversion.environment
        or not all(line.files.items() <= sizes.items() for line in conversion.plan.lines)
    ):
        raise BadInputError(f"{output} holds a different result: {mend}")


@contextmanager
def _staging(output: Path) -> Iterator[Path]:
    """A hidden folder beside the output; what is left of it goes, and so do folders above that hold nothing else."""
    made = [folder for folder in output.parents if not folder.exists()]
    output.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    try:
        yield staging
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        for folder in made:
            with suppress(OSError):  # not empty
                folder.rmdir()


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


def _plan_table(plan: _Plan, dtype: str) -> Table:
    table = Table(title=f"Plan ({dtype} checkpoint)", title_justify="left")
    for column in ("component", "precision", "blocks", "passes"):
        table.add_column(column, overflow="fold")
    for column in ("size before", "after (about)"):
        table.add_column(column, justify="right")
    for line in plan.lines:
        sizes = (format_size(line.size_before), format_size(line.size_after))
        table.add_row(line.name, line.precision, str(line.blocks), "\n".join(line.passes), *sizes)
    return table


def _plan_notes(plan: _Plan) -> Iterator[str]:
    yield f"disk: about {format_size(plan.disk)} at the fullest"
    for line in plan.lines:
        for fallback in line.fallbacks:
            yield f"fallback: {fallback}"
    if plan.unused_tensors:
        yield f"not read: {len(plan.unused_tensors)} tensors of the checkpoint, such as {plan.unused_tensors[0]}"


def _result_table(manifest: Manifest, lines: tuple[PlanLine, ...], seconds: dict[str, float]) -> Table:
    table = Table(title=manifest.name, title_justify="left")
    table.add_column("component")
    table.add_column("precision")
    for column in ("size before", "after", "KL", "accuracy before", "after", "time"):
        table.add_column(column, justify="right")

    def kl(component: str) -> str:
        values = [item.value for item in manifest.validation if item.metric == "kl" and item.component == component]
        return f"{values[0]:.2g}" if values else "-"

    for record, line in zip(manifest.components, lines, strict=True):
        table.add_row(
            record.name,
            record.precision,
            format_size(line.size_before),
            format_size(sum(file.size for file in record.files)),
            kl(record.name),
            "",
            "",
            f"{seconds[record.name]:.1f} s",
        )
    accuracy = next((item for item in manifest.validation if item.metric == "exact_match"), None)
    table.add_section()
    table.add_row(
        "artifact",
        "",
        format_size(sum(line.size_before for line in lines)),
        format_size(sum(file.size for record in manifest.components for file in record.files)),
        kl("artifact"),
        f"{accuracy.reference:.1%}" if accuracy and accuracy.reference is not None else "-",
        f"{accuracy.value:.1%}" if accuracy else "-",
        f"{sum(seconds.values()):.1f} s",
    )
    return table


def _folder_size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
