"""Carrying out a plan: blocks in parallel, stitching, the finished folder."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

from calibration.activations import BlockInputs
from calibration.inputs import write_inputs
from calibration.sources import SampleSet, load_samples
from manifests.errors import BadInputError, VlmConvertError
from manifests.files import file_record
from manifests.model import Component as ComponentRecord
from manifests.model import FileRecord, Port
from passes.base import BlockPass, PassManager, run_block_pass
from passes.chain import FloatChain
from passes.checkpoint import Checkpoint
from passes.export.ir import count_weights, detach, write
from passes.export.openvino import BLOCK_FILE, ExportOpenvinoPass
from passes.export.stitch import StitchPass, block_names
from passes.export.template import VERSION as TEMPLATE_VERSION
from passes.export.template import BlockSource, Templates, prepare
from passes.split import Component, SplitPass
from passes.store import Store, digest, library_versions
from vlmconvert.console import Reporter
from vlmconvert.families import FAMILIES, family_module
from vlmconvert.plan import ComponentPlan, Options, Plan, make_plan

__all__ = ["Built", "Conversion", "in_child"]

T = TypeVar("T")


def in_child(function: Callable[..., T], *arguments: Any) -> T:
    """Run a function in a process of its own, so that what it loads leaves memory with it."""
    from loky import ProcessPoolExecutor  # unlike multiprocessing's, it does not import the caller's script again

    with ProcessPoolExecutor(1) as pool:
        result: T = pool.submit(function, *arguments).result()
        return result


@dataclass(frozen=True)
class Built:
    """A finished component in the store."""

    plan: ComponentPlan
    folder: Path
    files: list[FileRecord]
    seconds: float


class Conversion:
    """One run: a checkpoint, options, and a store.

    Making it opens the checkpoint, checks everything on metadata and plans; no weight is read before `build`.

    Raises:
        BadInputError: if anything is wrong with the checkpoint or the options.
    """

    def __init__(
        self, family: str, checkpoint: Checkpoint, options: Options, store: Store, workers: int, reporter: Reporter
    ) -> None:
        self.family = family
        self.checkpoint = checkpoint
        self.options = options
        self.store = store
        self.workers = workers
        self.reporter = reporter
        module = FAMILIES[family]
        self._check_processor(family_module(family).PROCESSOR_FILES)
        with ThreadPoolExecutor() as threads:
            # The weights' hashes name the results in the store; they are made while the blocks are traced.
            records = threads.map(lambda name: file_record(checkpoint.folder / name, checkpoint.folder), self._source_names())
            self.templates = Templates(self._prepare(f"{module}:components"))
            self.components: tuple[Component, ...] = family_module(family).components(self.templates.config)
            unused = SplitPass()(checkpoint, self.templates.names, self.components, self.templates.shapes)
            self.plan: Plan = make_plan(
                options, checkpoint, self.components, self.templates.names, self.templates.shapes, unused
            )
            self.source_files = list(records)
        self.identity = digest(
            [record.model_dump() for record in self.source_files if not record.path.endswith((".jinja", ".txt"))],
            TEMPLATE_VERSION,
            library_versions(),
        )
        self.samples: SampleSet | None = None

    def check_disk(self, output: Path) -> None:
        """Refuse to start if the plan will not fit, in the store and at the output.

        Raises:
            BadInputError: with the bytes that are missing.
        """
        for place in {self.store.root, output.parent}:
            existing = next(path for path in (place, *place.resolve().parents) if path.exists())
            free = shutil.disk_usage(existing).free
            if free < self.plan.disk:
                raise BadInputError(
                    f"{place} has {free / 1e9:.1f} GB free, and the plan needs about {self.plan.disk / 1e9:.1f} GB: free some "
                    "space, or choose other places with --output and --store"
                )

    def build(self) -> list[Built]:
        """Make every component; what the store already has is taken from there."""
        chain = self._calibrate() if self.plan.calibrates_llm or self.plan.calibrates_vision else None
        built = [self._build_component(item, chain) for item in self.plan.components]
        if chain is not None:
            chain.clear()
        return built

    def records(self, built: list[Built], output: Path) -> list[ComponentRecord]:
        """Put finished components into `output` and describe them from the files themselves."""
        records = []
        for item in built:
            for record in item.files:
                _link_or_copy(item.folder / record.path, output / record.path)
            records.append(_describe(item, output))
        return records

    def _source_names(self) -> list[str]:
        names = ["config.json", *self.checkpoint.weight_files]
        names += [path.name for path in processor_files(self.checkpoint.folder)]
        return sorted(set(names))

    def _check_processor(self, required: tuple[tuple[str, ...], ...]) -> None:
        folder = self.checkpoint.folder
        for alternatives in required:
            if not any((folder / name).is_file() for name in alternatives):
                raise BadInputError(f"{folder} lacks {' or '.join(alternatives)}: copy the processor's files from the model's page")

    def _prepare(self, describe: str) -> Path:
        folder = self.checkpoint.folder
        key = digest(
            "templates",
            TEMPLATE_VERSION,
            self.checkpoint.config,
            sorted(self.checkpoint.tensors),
            describe,
            _source_digest(describe),
            library_versions(),
        )
        if key in self.store:
            return self.store.path(key)
        with self.reporter.stage("reading the architecture"):
            return self.store.get_or_make(
                key, lambda output: in_child(prepare, folder, list(self.checkpoint.tensors), describe, output)
            )

    def _calibrate(self) -> FloatChain:
        options = self.options
        count = max(options.samples if self.plan.calibrates_llm else 1, options.vision_samples if self.plan.calibrates_vision else 1)
        self.samples = load_samples(options.calibration, count, options.seed)
        key = digest("inputs", 1, self.samples.digest, options.sequence_length, self.identity, self._processor_digest())
        if key not in self.store:
            adapt = f"{FAMILIES[self.family]}:inputs"
            with self.reporter.stage(f"processing {len(self.samples.samples)} samples"):
                self.store.get_or_make(
                    key,
                    lambda output: in_child(
                        write_inputs,
                        self.checkpoint.folder,
                        self.samples,
                        adapt,
                        self.templates.config,
                        options.sequence_length,
                        output,
                    ),
                )
        return FloatChain(
            self.store,
            self.checkpoint,
            self.templates,
            self.components,
            self.identity,
            self.store.path(key),
            digest(key, options.samples),
            options.samples,
        )

    def _processor_digest(self) -> list[str]:
        return [file_record(path, self.checkpoint.folder).sha256 for path in processor_files(self.checkpoint.folder)]

    def _build_component(self, plan: ComponentPlan, chain: FloatChain | None) -> Built:
        start = time.monotonic()
        component = plan.component
        keys = [self._block_key(plan, index, chain) for index in range(len(component.blocks))]
        key = digest(
            "component",
            1,
            keys,
            [str(item) for item in plan.passes],
            [item.version for item in plan.passes],
            chain.samples_key if chain is not None and plan.quantize else None,
        )
        title = component.name.replace("_", " ")
        if key in self.store:
            self.reporter.log(f"{title}: found in the store")
        else:
            if isinstance(plan.block_pass, BlockPass):
                self._make_blocks(plan, plan.block_pass, keys, chain)
            with self.reporter.stage(f"{title}: putting it together"):
                self.store.get_or_make(key, lambda folder: self._assemble(plan, keys, chain, folder))
            for block_key in keys:
                self.store.remove(block_key)
        folder = self.store.path(key)
        files = [file_record(path, folder) for path in sorted(folder.iterdir())]
        return Built(plan, folder, files, time.monotonic() - start)

    def _block_key(self, plan: ComponentPlan, index: int, chain: FloatChain | None) -> str:
        block = plan.component.blocks[index]
        inputs = None
        if plan.needs_activations(block):
            assert chain is not None
            inputs = chain.inputs_key(chain.number(plan.component, block))
        parts = (block.kind, block.tensors, block.role, inputs)
        return digest("block", str(plan.block_pass), plan.block_pass.version, self.identity, *parts)

    def _make_blocks(self, plan: ComponentPlan, block_pass: BlockPass, keys: list[str], chain: FloatChain | None) -> None:
        from joblib import Parallel, delayed

        component = plan.component
        missing = [index for index, key in enumerate(keys) if key not in self.store]
        done = {chain.number(component, block) for i, block in enumerate(component.blocks) if i not in missing} if chain else set()
        failure: list[BaseException] = []

        def tasks() -> Iterator[Any]:
            # Runs in joblib's dispatching thread, which would swallow an exception.
            try:
                for index in missing:
                    block = component.blocks[index]
                    activations: tuple[BlockInputs, ...] = ()
                    if plan.needs_activations(block):
                        assert chain is not None
                        activations = chain.inputs(chain.number(component, block))
                    source = BlockSource(self.checkpoint, self.templates, block, activations)
                    yield delayed(_make_block)(self.store, keys[index], block_pass, component.name, source)
            except BaseException as error:
                failure.append(error)

        title = f"{component.name.replace('_', ' ')}: {plan.precision}"
        parallel = Parallel(n_jobs=self.workers, return_as="generator_unordered", batch_size=1, pre_dispatch="n_jobs")
        with self.reporter.stage(title, len(missing)) as step:
            for name in parallel(tasks()):
                step(name)
                if chain is not None and component is self.components[-1]:
                    done.add(chain.number(component, next(block for block in component.blocks if block.name == name)))
                    chain.forget(done)
        if failure:
            raise failure[0]

    def _detached(self, plan: ComponentPlan, keys: list[str]) -> Iterator[Any]:
        """The blocks with their weights detached: from the store, or straight from the checkpoint if only exported."""
        for block, key in zip(plan.component.blocks, keys, strict=True):
            if isinstance(plan.block_pass, ExportOpenvinoPass):
                yield plan.block_pass(BlockSource(self.checkpoint, self.templates, block))
            else:
                yield detach(self.store.path(key) / BLOCK_FILE, block_names(block))

    def _assemble(self, plan: ComponentPlan, keys: list[str], chain: FloatChain | None, folder: Path) -> None:
        component = plan.component
        model, weights = StitchPass()(component, self._detached(plan, keys))
        model = PassManager(component.name, plan.graph_passes)(model)
        _set_runtime_options(model, plan.precision)
        xml = folder / f"{component.file_stem}.xml"
        if plan.quantize is None:
            write(model, weights, xml)
            return
        assert chain is not None
        with tempfile.TemporaryDirectory(prefix=".float-", dir=folder) as temporary:
            source = Path(temporary) / xml.name
            write(model, weights, source)
            names = [port.name for port in component.inputs]
            samples = tuple(
                {name: (path, name) for name in names} for path in sorted(chain.samples.iterdir())[: self.options.vision_samples]
            )
            in_child(plan.quantize.run, source, samples, xml)


def _make_block(store: Store, key: str, item: BlockPass, component: str, source: BlockSource) -> str:
    store.get_or_make(key, lambda output: run_block_pass(item, component, source, output))
    return source.block.name


def _set_runtime_options(model: Any, precision: str) -> None:
    """Keep the cache as exact as the weights; OpenVINO's default on CPU is an 8-bit cache."""
    model.set_rt_info("f32" if precision == "fp32" else "f16", ["runtime_options", "KV_CACHE_PRECISION"])


def _source_digest(describe: str) -> str:
    """Digest of the family's own code, on which traces depend."""
    module = describe.partition(":")[0]
    folder = Path(family_module(module.rpartition(".")[2]).__file__ or "").parent
    stem = module.rpartition(".")[2]
    return digest([path.read_text(encoding="utf-8") for path in sorted(folder.glob(f"{stem}*.py"))])


def processor_files(folder: Path) -> list[Path]:
    """Processor, tokenizer, chat template and generation config files of a checkpoint."""
    names = {
        "added_tokens.json",
        "chat_template.jinja",
        "chat_template.json",
        "generation_config.json",
        "merges.txt",
        "preprocessor_config.json",
        "processor_config.json",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "vocab.json",
    }
    return [path for path in sorted(folder.iterdir()) if path.name in names]


def _link_or_copy(source: Path, target: Path) -> None:
    """Let a finished, read-only file stand in a second place, without its bytes if the file system can."""
    try:
        target.hardlink_to(source)
    except OSError:
        shutil.copyfile(source, target)


def _describe(item: Built, output: Path) -> ComponentRecord:
    import openvino as ov

    component = item.plan.component
    xml = output / f"{component.file_stem}.xml"
    model = ov.Core().read_model(xml)
    declared = {port.name: port for port in (*component.inputs, *component.outputs)}
    state = [node.get_variable_id() for node in model.get_ordered_ops() if node.get_type_name() == "ReadValue"]
    logits = item.plan.component.logits
    last = logits and model.output("logits").partial_shape[1].is_static
    return ComponentRecord(
        name=component.name,
        role=component.role,
        format="openvino",
        precision=item.plan.precision,
        files=item.files,
        inputs=[_port(port, declared) for port in model.inputs],
        outputs=[_port(port, declared) for port in model.outputs],
        state=sorted(state),
        logits=None if not logits else "last" if last else "all",
        weights=count_weights(xml),
        passes=[str(step) for step in item.plan.passes],
        fallbacks=list(item.plan.fallbacks),
    )


def _port(port: Any, declared: dict[str, Port]) -> Port:
    """A graph's own port: dtype and static sizes from the graph, names of dynamic dims from the family."""
    name = next((name for name in port.get_names() if name in declared), port.get_any_name())
    dims = declared[name].shape if name in declared else [f"dim_{axis}" for axis in range(len(port.partial_shape))]
    shape = [
        size.get_length() if size.is_static else dim if isinstance(dim, str) else -1
        for size, dim in zip(port.partial_shape, dims, strict=True)
    ]
    return Port(name=name, dtype=port.element_type.get_type_name(), shape=shape)
