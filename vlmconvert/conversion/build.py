"""Carrying out a plan: the passes of every component run, and their results are put into the folder of the artifact."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, closing
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from calibration.inputs import write_inputs
from calibration.sources import SampleSet
from manifests.files import file_record, read_json, write_atomically
from manifests.model import ComponentRecord, FileRecord
from manifests.run_plan import RunPlan
from passes.base import Context, Intermediate
from passes.block_pass import BlockPass, SplitBlocks
from passes.chain import CheckpointBlocks, FloatChain
from passes.export.template import BlockSource
from passes.opened import OpenedCheckpoint
from passes.processor_files import processor_files
from passes.split import SplitPass
from passes.store import Store, digest, library_versions
from passes.vocabulary import Component, kinds_of
from vlmconvert.console import Reporter
from vlmconvert.conversion.helper import Helper
from vlmconvert.conversion.open import source_digest
from vlmconvert.conversion.plan import Plan
from vlmconvert.conversion.progress import PERCENT, ChainProgress, files_made, growth
from vlmconvert.conversion.schedule import make_blocks
from vlmconvert.conversion.source import Source
from vlmconvert.conversion.workers import Workers
from vlmconvert.families.opened import OpenedModel
from vlmconvert.targets.base import ComponentPlan

__all__ = ["Build", "Contents"]

T = TypeVar("T")
_RECORDS = "records.json"


@dataclass(frozen=True)
class Contents:
    """The content of a new artifact.

    Attributes:
        components: the manifest's records of the components.
        assets: records of config, processor and tokenizer.
        seconds: name of a component -> seconds that it took.
        run_plan: the commands that start the artifact in its runtimes; None if the target has no such plan.
    """

    components: list[ComponentRecord]
    assets: list[FileRecord]
    seconds: dict[str, float]
    run_plan: RunPlan | None


@dataclass(frozen=True)
class _Built:
    """A finished component: its plan, the folder of its files, and their records."""

    plan: ComponentPlan
    folder: Path
    files: list[FileRecord]


class Build:
    """A running conversion; targets get it as a `Job`.

    Args:
        model: the checkpoint, with a completed config.
        plan: the plan of the conversion.
        samples: the calibration samples; None if no pass needs any.
        source: the checkpoint's files with their hashes.
        store: keeps results of passes and finished components.
        workers: processes that make blocks.
        at_once: number of samples that are computed at the same time.
        helper: process for work that needs torch.
        reporter: shows progress.
    """

    def __init__(
        self,
        model: OpenedModel,
        plan: Plan,
        samples: SampleSet | None,
        source: Source,
        store: Store,
        workers: Workers,
        at_once: int,
        helper: Helper,
        reporter: Reporter,
    ) -> None:
        self.model, self.plan, self.samples = model, plan, samples
        self.blocks, self.at_once = workers, at_once
        self.workers = workers.count
        self.options: Mapping[str, Any] = plan.options
        self.store, self.source, self.helper, self.reporter = store, source, helper, reporter
        self.identity = source.identity(model)
        self.seconds: dict[str, float] = {}
        self._chain: FloatChain | None = None
        self.progress = ChainProgress(reporter, plan.sample_counts)
        self._onnx_traces: Path | None = None

    def run(self, folder: Path) -> Contents:
        """Write the artifact without its manifest into an existing empty folder."""
        target = self.plan.target
        walked = [(item, self._walk(item)) for item in self.plan.components]
        self.close_helper()
        built = [self._finish(item, made) for item, made in walked]
        self.clear()
        for item in built:
            for record in item.files:
                target.place(item.folder / record.path, folder / record.path)
        records = [target.describe(item.plan, item.files, folder) for item in built]
        assets = target.write_assets(self, folder)
        run_plan = target.run_plan(self, self.plan.components, folder)
        return Contents(records, assets, self.seconds, run_plan)

    def clear(self) -> None:
        """Remove from the store the samples and all activations."""
        if self._chain is not None:
            self._chain.clear()
            self.store.remove(self._chain.samples.name)

    def close_helper(self) -> None:
        """End the helper process, to free the memory of torch and transformers."""
        self.helper.close()

    def in_helper(self, function: Callable[..., T], *arguments: Any) -> T:
        """See `Job`."""
        return self.helper.run(function, *arguments)

    def stage(self, title: str, total: int | None = None) -> AbstractContextManager[Callable[[str], None]]:
        """See `Job`."""
        return self.reporter.stage(title, total)

    def context(self, item: ComponentPlan) -> Context:
        """The services that the passes of a component get."""
        return _ComponentContext(self, item)

    def split(self, item: ComponentPlan) -> SplitBlocks:
        """The blocks of a component, before any pass has changed them."""
        made = SplitPass()(self._start, self.context(item))
        assert isinstance(made, SplitBlocks)
        return made

    # Shared by all components: activations and traces.

    @property
    def chain(self) -> FloatChain:
        """See `passes.base.Context`."""
        if self._chain is None:
            self._chain = self._make_chain()
        return self._chain

    def forget_activations(self, component: Component, done: set[int]) -> None:
        """Remove the activations that only finished blocks have needed from the disk.

        Args:
            component: component that the blocks belong to.
            done: indexes of the finished blocks.
        """
        if self._chain is not None and component.name in self._chain.counts:
            self._chain.done({self._chain.number(component, component.blocks[index]) for index in done})

    def _make_chain(self) -> FloatChain:
        assert self.samples is not None
        samples, folder, length = self.samples, self.model.checkpoint.folder, self.plan.calibration.sequence_length
        # The results of a component depend only on its own samples, so that another number of samples for one component
        # leaves the results of the others valid.
        processor = [file_record(path, folder).sha256 for path in processor_files(folder)]
        of_inputs = ("inputs", 1, length, self.identity, processor)
        key = digest(*of_inputs, samples.digest)
        if key not in self.store:
            arguments = (folder, samples, self.model.family, self.model.config, length)
            total = len(samples.samples)
            with self.reporter.stage("processing samples", total) as step:
                self._make_in_helper(
                    key, f"{total} calibration samples", step, "*.safetensors", write_inputs, *arguments
                )
        counts = self.plan.sample_counts
        chain = FloatChain(
            self.store,
            CheckpointBlocks(self.model.checkpoint, self.model.templates, self.at_once),
            tuple(component for component in self.model.components if component.name in counts),
            self.model.config,
            self.identity,
            self.store.path(key),
            cache(lambda count: digest(*of_inputs, samples.first(count).digest)),
            counts,
            self.at_once,
            self.progress.step,
        )
        chain.done(
            {
                chain.number(plan.component, block)
                for plan in self.plan.components
                if plan.component.name in counts
                for block in plan.component.blocks
                if not any(step.needs_activations(block.role) for step in plan.steps)
            }
        )
        return chain

    @property
    def onnx_traces(self) -> Path:
        """See `passes.base.Context`."""
        if self._onnx_traces is None:
            self._onnx_traces = self._trace_for_onnx()
        return self._onnx_traces

    def _trace_for_onnx(self) -> Path:
        from passes.onnx.trace import VERSION, trace_kinds

        versions = library_versions(*self.plan.target.distributions)
        key = digest("onnx traces", VERSION, self.model.templates.config, source_digest(self.model.family), versions)
        if key not in self.store:
            arguments = (self.model.config, self.model.components)
            self.helper.patient = True
            with self.reporter.stage("tracing for ONNX", len(kinds_of(self.model.components))) as step:
                self._make_in_helper(key, "ONNX traces", step, "*.onnx", trace_kinds, *arguments)
        return self.store.path(key)

    def _make_in_helper(
        self,
        key: str,
        what: str,
        step: Callable[[str], None],
        pattern: str,
        function: Callable[..., None],
        *arguments: Any,
    ) -> None:
        """Let the helper process make an entry of the store; a file in it that fits the pattern is one step."""

        def make(output: Path) -> None:
            self.helper.run(function, *arguments, output, meanwhile=files_made(output, pattern, step))

        self.store.get_or_make(key, make, what)

    # The work on one component.

    @property
    def _start(self) -> OpenedCheckpoint:
        return OpenedCheckpoint(self.model.checkpoint, self.model.templates, self.identity)

    def _walk(self, item: ComponentPlan) -> Intermediate:
        """Call every pass in turn. Long work is only prepared here; `_finish` runs it."""
        context = self.context(item)
        made: Intermediate = self._start
        for step in item.steps:
            made = step(made, context)
        return made

    def _finish(self, item: ComponentPlan, made: Intermediate) -> _Built:
        """Run the long work of a component's passes, and write the component's files into the store."""
        start = time.monotonic()
        name, target = item.component.name, self.plan.target
        title = name.replace("_", " ")
        versions = library_versions(*target.distributions_with(self.options))
        key = digest("component", 3, target.name, name, made.key, self.options, versions)
        kept = self._kept(key)
        if kept is not None:
            self.reporter.log(f"{title}: found in the store")
        else:
            made.prepare()
            with self.stage(f"{title}: writing", PERCENT) as step:

                def write(output: Path) -> None:
                    with growth(output, item.size_after, step):
                        files = target.write_component(item, made, output, self)
                    _write_records(output, files)

                self.store.get_or_make(key, write, f"{title}, {item.precision} for {target.name}")
            made.discard()
            kept = _read_records(self.store.path(key))
        self.seconds[name] = time.monotonic() - start
        return _Built(item, self.store.path(key), kept)

    def _kept(self, key: str) -> list[FileRecord] | None:
        """Records of a component in the store; None if it is not there, or its files have changed since."""
        if key not in self.store:
            return None
        folder = self.store.path(key)
        files = _read_records(folder)
        if any(file_record(folder / record.path, folder) != record for record in files):
            self.store.remove(key)
            return None
        return files


class _ComponentContext:
    """The `Context` that the passes of one component get; see `passes.base.Context`."""

    def __init__(self, build: Build, item: ComponentPlan) -> None:
        self.build = build
        self.component: Component = item.component
        self.identity = build.identity
        self.layers = item.layers
        self.store = build.store
        self.samples = build.plan.calibration.samples
        self.vision_samples = build.plan.calibration.vision_samples

    @property
    def chain(self) -> FloatChain:
        return self.build.chain

    @property
    def onnx_traces(self) -> Path:
        return self.build.onnx_traces

    def in_helper(self, function: Callable[..., T], *arguments: Any) -> T:
        return self.build.in_helper(function, *arguments)

    def stage(self, title: str, total: int | None = None) -> AbstractContextManager[Callable[[str], None]]:
        return self.build.stage(title, total)

    def make_blocks(
        self, item: BlockPass, keys: Mapping[int, str], source: Callable[[int], BlockSource], last: bool
    ) -> None:
        self.build.close_helper()
        component, blocks = self.component, self.component.blocks
        missing = {index: key for index, key in keys.items() if key not in self.store}
        done = set(range(len(blocks))) - missing.keys()
        with (
            self.stage(f"{component.name.replace('_', ' ')}: {item.name}", len(missing)) as step,
            closing(self.build.progress),
        ):
            for index in make_blocks(item, component, missing, source, self.store, self.build.blocks):
                step(blocks[index].name)
                done.add(index)
                if last:
                    self.build.forget_activations(component, done)


def _write_records(folder: Path, known: list[FileRecord]) -> None:
    """Finish the folder of a component in the store: make its files read-only, and write their records."""
    by_path = {record.path: record for record in known}
    records = []
    for path in sorted(folder.iterdir()):
        records.append(by_path.get(path.name) or file_record(path, folder))
        path.chmod(0o444)
    write_atomically(folder / _RECORDS, json.dumps([record.model_dump() for record in records]))


def _read_records(folder: Path) -> list[FileRecord]:
    return [FileRecord(**record) for record in read_json(folder / _RECORDS, f"delete {folder}")]
