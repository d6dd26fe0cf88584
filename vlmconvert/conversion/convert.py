"""Converting a checkpoint to an artifact: open, plan, build, validate and, when everything is complete, publish."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from math import ceil
from pathlib import Path
from typing import TYPE_CHECKING, Any

from manifests.beside import MODEL_CARD_NAME, RUN_LOG_NAME
from manifests.errors import BadInputError, ConversionError, is_disk_full
from manifests.files import write_atomically
from manifests.io import write_manifest
from manifests.model import Calibration, CalibrationSettings, Manifest, Settings, SizeBudget
from manifests.model import Source as SourceRecord
from passes.store import Store, library_versions
from vlmconvert.console import Reporter, format_size
from vlmconvert.conversion.bounds import weight_bounds
from vlmconvert.conversion.budget import MEASURED_TOKENS, fitted_recipe, fitting
from vlmconvert.conversion.build import Build, Contents
from vlmconvert.conversion.disk import check_disk, check_store, on_one_disk, prune_store, store_limit
from vlmconvert.conversion.forecast import Forecast, choose_resources, forecast
from vlmconvert.conversion.helper import Helper
from vlmconvert.conversion.lock import one_conversion, one_writer
from vlmconvert.conversion.machine import max_memory, measure_machine
from vlmconvert.conversion.open import find_checkpoint, open_model
from vlmconvert.conversion.plan import Plan, make_plan
from vlmconvert.conversion.publish import Planned, check_output, check_replaceable, publish, staging
from vlmconvert.conversion.sample import calibration_samples, scarce_layers, sketch_sample
from vlmconvert.conversion.source import Source, hash_source, source_sizes
from vlmconvert.conversion.summary import folder_size, forecast_text, layers_table, plan_notes, plan_table, result_table
from vlmconvert.conversion.trial import try_processor
from vlmconvert.conversion.validate import Limits, validate
from vlmconvert.conversion.workers import Check, LocalWorkers, Workers, connect, parse_cluster
from vlmconvert.families.opened import OpenedModel
from vlmconvert.options import read_options
from vlmconvert.precisions import Side
from vlmconvert.recipes.from_options import chosen_precisions, recipe_from_options
from vlmconvert.recipes.recipe import Recipe, recipe_text
from vlmconvert.targets import load_target

if TYPE_CHECKING:
    from passes.checkpoint import Checkpoint
    from vlmconvert.targets.base import Target

__all__ = ["Converted", "Request", "convert"]

# Options of 4-bit passes that `max_size` chooses.
_BY_SIZE = ("group_size", "ratio", "all_layers", "scale_estimation")


@dataclass(frozen=True)
class Request:
    """One conversion.

    Attributes:
        store: folder where finished steps are kept.
        model: local folder or hub id; None is the demo checkpoint of the family.
        family: name of the checkpoint's family; None finds the family from config.json.
        target: name of the target that the artifact is made for.
        precisions: side -> precision; None, or a side that is missing, takes the target's default.
        pass_options: option of the precisions -> value; None takes the pass's default.
        target_options: option of the target -> value; None takes its default.
        calibration: settings of the calibration samples.
        max_size: maximum size of the component files, such as 4.5GB, or of each weight, such as 4.5bits; the formats of the
            layers of all sides without a precision are chosen by what they lose.
        recipe: recipe that takes the place of `target`, `precisions`, the options and `calibration`.
        output: folder to write; None names it after checkpoint, target and precisions.
        workers: number of processes that compress blocks; None takes as many as fit the cores and the memory.
        cluster: address of a cluster that makes the blocks; None makes them on this machine.
        max_memory: limit for the memory of the conversion, such as 8GiB; None takes that of the environment, if there is
            one.
        revision: branch, tag or commit of a hub id.
        token: access token for a gated hub id.
        ignore_unused: whether to leave out adapters and other tensors that the model of the config does not have.
        force: whether to replace a different artifact of vlmconvert at the output.
        dry_run: whether to stop after the plan.
        save_recipe: file to which the recipe is written.
        validate: whether to compare the artifact with the checkpoint.
        validation_samples: maximum number of held-out scenes for that comparison.
        validation_time: maximum share of the conversion's time that the comparison takes, once it has taken a minute; 0
            sets no limit.
        max_kl: maximum mean KL divergence from the checkpoint that passes, in nats; None takes that of the precisions.
        max_drop: maximum loss of accuracy that passes, in percentage points.
    """

    store: Path
    model: str | None = None
    family: str | None = None
    target: str = "openvino"
    precisions: Mapping[str, str | None] = field(default_factory=dict)
    pass_options: Mapping[str, Any] = field(default_factory=dict)
    target_options: Mapping[str, Any] = field(default_factory=dict)
    calibration: CalibrationSettings = field(default_factory=CalibrationSettings)
    max_size: str | None = None
    recipe: Recipe | None = None
    output: Path | None = None
    workers: int | None = None
    cluster: str | None = None
    max_memory: str | None = None
    revision: str | None = None
    token: str | None = None
    ignore_unused: bool = False
    force: bool = False
    dry_run: bool = False
    save_recipe: Path | None = None
    validate: bool = True
    validation_samples: int = 200
    validation_time: float = 0.25
    max_kl: float | None = None
    max_drop: float = 1.0


@dataclass(frozen=True)
class Converted:
    """The result of a conversion.

    Attributes:
        output: folder of the artifact; after a dry run, the folder that would be written.
        recipe: recipe of the artifact.
        manifest: manifest of the artifact; None after a dry run.
        seconds: seconds that the conversion took.
    """

    output: Path
    recipe: Recipe
    manifest: Manifest | None
    seconds: float

    @property
    def passed(self) -> bool:
        """Whether no limit of the validation is broken."""
        return self.manifest is None or all(item.passed for item in self.manifest.validation)


def convert(request: Request, reporter: Reporter) -> Converted:
    """Convert one checkpoint.

    Raises:
        BadInputError: if something is wrong with the input; raised before any work.
        ConversionError: if a pass failed; the output is left as it was before.
    """
    try:
        return _convert(request, reporter)
    except Exception as error:
        if is_disk_full(error):
            what = (
                f"the disk of the store {request.store}, of the output or of temporary files is full: free some space"
            )
        elif isinstance(error, OSError) and error.filename:
            what = f"{error.filename} cannot be used any more ({error.strerror}): put right what happened to it"
        else:
            raise
        raise ConversionError(f"{what} and run the same command again, which goes on from here") from error


def _convert(request: Request, reporter: Reporter) -> Converted:
    start = time.monotonic()
    limit, memory = store_limit(), max_memory(request.max_memory)
    target = load_target(request.recipe.target if request.recipe else request.target)
    target.check_installed()
    if request.cluster is not None:
        _check_cluster(request, target)
    if request.recipe is None:
        chosen_precisions(target, _asked(request))  # said before the checkpoint is opened, which takes seconds
    family, checkpoint = find_checkpoint(request.model, request.family, request.revision, request.token)
    with Helper() as helper, ExitStack() as cleanup:
        store = Store(request.store, checkpoint.model)
        check_store(store)
        store.remove_leftovers()
        model = open_model(family, checkpoint, helper, store, reporter, target.traced, request.ignore_unused)
        recipe, budget = request.recipe or _recipe(request, target, model), None
        if request.max_size is not None:
            recipe, budget = _fitted(request, recipe, target, model, store, memory, helper, reporter)
        plan = make_plan(recipe, target, model)
        name = f"{Path(checkpoint.model).name}-{_label(request, target) or plan.label}"
        output = request.output or Path(name)
        reporter.table(plan_table(plan, checkpoint.dtype))
        if (layers := layers_table(plan)) is not None:
            reporter.table(layers)
        validated = request.validate and target.runnable
        for line in plan_notes(plan, checkpoint.unread_files):
            reporter.say(line)
        max_kl = plan.max_kl if request.max_kl is None else request.max_kl
        if budget is not None:
            reporter.say(f"expected KL divergence of this choice: {budget.kl:.2g} nats, as what layers lose adds up")
        if validated:
            reporter.say(f"passes with a KL divergence of at most {max_kl:.3g} nats from the checkpoint")
        if validated != request.validate:
            reporter.say(f"not validated: vlmconvert cannot run {target.title}")
        environment = library_versions(*target.distributions_with(plan.options))
        settings = Settings(options=plan.options, calibration=plan.calibration if plan.calibrates else None)
        planned = Planned(
            passes={item.component.name: item.lines for item in plan.components},
            layers={item.component.name: item.layers for item in plan.components},
            environment=environment,
            sizes={file: size for item in plan.components for file, size in item.files.items()},
            sources=source_sizes(checkpoint),
            settings=settings,
        )
        check_output(output, checkpoint.folder, planned, request.force)
        if request.save_recipe is not None:
            write_atomically(request.save_recipe, recipe_text(recipe, plan.calibrates))
        limits = Limits(request.validation_samples, request.validation_time, max_kl, request.max_drop)
        samples = calibration_samples(plan, model)
        try_processor(model, helper, store, reporter)
        sketch = None
        if target.traced and (validated or plan.calibrates):
            sketch = sketch_sample(model, samples, plan.calibration.sequence_length, helper, store, reporter)
            for line in scarce_layers(plan, sketch, model.templates.shapes):
                reporter.say(line)
        cluster = cleanup.enter_context(_cluster(request, target, checkpoint, store)) if request.cluster else None
        linked = on_one_disk(store.root, output.parent)
        expect = partial(forecast, plan, model, sketch, measure_machine(), limits if validated else None, linked)
        wanted = cluster.count if cluster else request.workers
        blocks = max(len(item.component.blocks) for item in plan.components)
        resources, expected = choose_resources(wanted, bool(cluster), blocks, memory, expect)
        reporter.say(forecast_text(expected, resources))
        if request.dry_run:
            return Converted(output, recipe, None, time.monotonic() - start)
        _check_disk(expected, plan, store, output.parent, linked)

        cleanup.enter_context(one_writer(store, output))
        source = hash_source(checkpoint, reporter, weight_bounds(plan, model))
        cleanup.enter_context(_unchanged(source))
        cleanup.enter_context(one_conversion(store, source.identity(model), reporter))
        model = model.completed()
        with staging(output) as staged:
            workers = cluster or LocalWorkers(resources.workers)
            used = samples if plan.calibrates else None
            build = Build(model, plan, used, source, store, workers, resources.at_once, helper, reporter)
            contents = build.run(staged)
            manifest = _manifest(build, contents, name, environment, settings, budget)
            write_manifest(manifest, staged)
            if validated:
                seconds = time.monotonic() - start
                figures = validate(model, plan, manifest, staged, limits, seconds, memory, reporter)
                manifest = manifest.model_copy(update={"validation": figures})
                write_manifest(manifest, staged)
            _write_model_card(manifest, target, checkpoint.folder, staged)
            source.check_unchanged()
            publish(staged, output, checkpoint.folder, manifest, request.force, reporter.log)
    prune_store(store, limit, reporter)
    seconds = time.monotonic() - start
    _write_run_log(output, seconds, contents)
    reporter.table(result_table(manifest, plan, contents.seconds))
    for item in manifest.validation:
        if not item.passed:
            reporter.say(
                f"check failed: {item.metric} of the {item.component} is {item.value:g}, the limit is {item.threshold:g}"
            )
    reporter.say(f"{output}  ({format_size(folder_size(output))}, {seconds:.0f} s)")
    return Converted(output, recipe, manifest, seconds)


@contextmanager
def _unchanged(source: Source) -> Iterator[None]:
    """If the work fails since the checkpoint has changed meanwhile, say so instead of what came of it."""
    try:
        yield
    except Exception:
        source.check_unchanged()
        raise


def _check_cluster(request: Request, target: Target) -> None:
    """Refuse a cluster that cannot be used, before anything else is done."""
    assert request.cluster is not None
    parse_cluster(request.cluster)
    if request.workers is not None:
        raise BadInputError("--workers does not go with --cluster, whose workers are counted: leave it out")
    if not target.traced:
        raise BadInputError(f"--cluster does not go with --target {target.name}, which has no blocks: leave it out")


def _cluster(request: Request, target: Target, checkpoint: Checkpoint, store: Store) -> AbstractContextManager[Workers]:
    """Connect to the cluster of a request."""
    assert request.cluster is not None
    folder = checkpoint.folder.resolve()
    files = {folder / name: size for name, size in source_sizes(checkpoint).items()}
    return connect(request.cluster, Check.of(store, files, target.distributions))


def _check_disk(expected: Forecast, plan: Plan, store: Store, place: Path, linked: bool) -> None:
    """Refuse to start if the disks of the store and of the output have too little space left."""
    copied = 0 if linked else plan.size_after
    # What the store has of this checkpoint is either used, or can be removed.
    check_disk({store.root: expected.disk - copied - store.size(), place: copied}, ("--store", "--output"))


def _fitted(
    request: Request,
    recipe: Recipe,
    target: Target,
    model: OpenedModel,
    store: Store,
    memory: int | None,
    helper: Helper,
    reporter: Reporter,
) -> tuple[Recipe, SizeBudget]:
    """Choose the formats of layers by `max_size`; everything that can be refused is refused before anything is measured."""
    assert request.max_size is not None
    sides = [side for side, name in _asked(request).items() if name is None]
    if "language" in sides and (said := [name for name in _BY_SIZE if request.pass_options.get(name) is not None]):
        raise BadInputError(
            f"--{said[0].replace('_', '-')} does not go with --max-size, which chooses the formats: leave it out"
        )
    symmetric = bool(request.pass_options.get("symmetric"))
    options = read_options(target.options, request.target_options, f"--target {target.name}")
    asked = fitting(request.max_size, recipe, sides, target, options, model, symmetric)
    output = request.output or Path(f"{Path(model.checkpoint.model).name}-{_label(request, target)}")
    check_replaceable(output, model.checkpoint.folder, request.force)
    plan = make_plan(asked.recipe, target, model)
    samples = calibration_samples(plan, model)
    try_processor(model, helper, store, reporter)
    sketch = sketch_sample(model, samples, plan.calibration.sequence_length, helper, store, reporter)
    few = min(plan.calibration.samples, ceil(MEASURED_TOKENS / sketch.tokens))
    calibration = plan.calibration.model_copy(update={"samples": few, "vision_samples": few})
    plan = replace(plan, calibration=calibration)
    expect = partial(forecast, plan, model, sketch, measure_machine(), None, False)
    blocks = max(len(item.component.blocks) for item in plan.components)
    resources, _ = choose_resources(request.workers, False, blocks, memory, expect)
    source = hash_source(model.checkpoint, reporter, weight_bounds(plan, model))
    with _unchanged(source), one_conversion(store, source.identity(model), reporter), ExitStack() as cleanup:
        completed = model.completed()
        workers: Workers = LocalWorkers(resources.workers)
        if request.cluster is not None:
            workers = cleanup.enter_context(_cluster(request, target, model.checkpoint, store))
        build = Build(completed, plan, samples, source, store, workers, resources.at_once, helper, reporter)
        return fitted_recipe(asked, build)


def _label(request: Request, target: Target) -> str | None:
    """The part of the artifact's default name that takes the place of the plan's, if layers have formats by size."""
    return f"{target.name}-{''.join(request.max_size.split())}" if request.max_size is not None else None


def _recipe(request: Request, target: Target, model: OpenedModel) -> Recipe:
    """The recipe that the options of a request stand for."""
    options = read_options(target.options, request.target_options, f"--target {target.name}")
    return recipe_from_options(target, model, _asked(request), request.pass_options, options, request.calibration)


def _asked(request: Request) -> dict[Side, str | None]:
    """The precision that is asked for each side."""
    sides: tuple[Side, ...] = ("language", "vision")
    return {side: request.precisions.get(side) for side in sides}


def _manifest(
    build: Build,
    contents: Contents,
    name: str,
    environment: dict[str, str],
    settings: Settings,
    budget: SizeBudget | None,
) -> Manifest:
    """The manifest without figures of a validation."""
    model, plan = build.model, build.plan
    samples = build.samples
    return Manifest(
        name=name,
        family=model.family.name,
        target=plan.target.name,
        source=SourceRecord(
            model=model.checkpoint.model,
            revision=model.checkpoint.revision,
            architecture=model.family.architecture,
            dtype=model.checkpoint.dtype,
            files=list(build.source.files),
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
        environment=environment,
        size_budget=budget,
        run_plan=contents.run_plan,
        settings=settings,
    )


def _write_run_log(output: Path, seconds: float, contents: Contents) -> None:
    log = {
        "seconds": round(seconds, 1),
        "components": {component: round(taken, 1) for component, taken in contents.seconds.items()},
        "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }
    write_atomically(output / RUN_LOG_NAME, json.dumps(log, indent=2) + "\n")


def _write_model_card(manifest: Manifest, target: Target, checkpoint: Path, folder: Path) -> None:
    from vlmconvert.conversion.model_card import model_card, read_license

    model_card(manifest, target, read_license(checkpoint)).save(folder / MODEL_CARD_NAME)
