"""Carrying out a plan: blocks in parallel, stitching, the finished folder."""

from __future__ import annotations

import ctypes
import gc
import importlib
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from calibration.activations import BlockInputs
from calibration.inputs import write_inputs
from calibration.sources import SampleSet, load_samples
from manifests.files import file_record, write_atomically
from manifests.model import Component as ComponentRecord
from manifests.model import FileRecord
from passes.base import BlockPass, Pass, named_failure
from passes.chain import CheckpointBlocks, FloatChain
from passes.checkpoint import Checkpoint
from passes.compress.sensitivity import layers_in_8_bit, read_scores
from passes.compress.weights import CompressInt4Pass
from passes.export.template import VERSION as TEMPLATE_VERSION
from passes.export.template import BlockSource, Templates, prepare
from passes.split import Block, Component, SplitPass
from passes.store import Store, digest, library_versions
from vlmconvert import families
from vlmconvert.artifact import Contents, check_disk, check_processor, processor_files, source_names
from vlmconvert.assets import write_assets
from vlmconvert.console import Reporter
from vlmconvert.families import FAMILIES, complete_config, family_module
from vlmconvert.plan import ComponentPlan, Options, Plan, make_plan
from vlmconvert.targets import target_module

if TYPE_CHECKING:
    from loky import ProcessPoolExecutor

__all__ = ["Built", "Conversion", "Helper"]

T = TypeVar("T")


class Helper:
    """A process for the work that needs torch and transformers, so that they leave memory when it is closed."""

    def __init__(self) -> None:
        self._pool: ProcessPoolExecutor | None = None

    def run(self, function: Callable[..., T], *arguments: Any) -> T:
        """Run a function in the helper process, which is started if it is not there."""
        from loky import ProcessPoolExecutor  # unlike multiprocessing's, it does not import the caller's script again

        if self._pool is None:
            # Importing transformers makes so many objects that collecting garbage takes a fifth of the time.
            self._pool = ProcessPoolExecutor(1, initializer=gc.set_threshold, initargs=(100_000, 50, 100))
        result: T = self._pool.submit(function, *arguments).result()
        return result

    def close(self, wait: bool = False) -> None:
        """End the process, which is idle; to `wait` for torch's own tidy end takes a second."""
        if self._pool is not None:
            self._pool.shutdown(wait=wait, kill_workers=not wait)
            self._pool = None


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
        self.helper = Helper()
        module = FAMILIES[family]
        check_processor(checkpoint.folder, family_module(family).PROCESSOR_FILES)
        with ThreadPoolExecutor(max(1, len(os.sched_getaffinity(0)) - 1)) as threads:
            # The weights' hashes name the results in the store. They are made, and what this process needs next is imported,
            # while the helper traces the blocks with a core to itself.
            threads.submit(importlib.import_module, "openvino")
            records = threads.map(
                lambda name: file_record(checkpoint.folder / name, checkpoint.folder), source_names(checkpoint)
            )
            self.templates = Templates(self._prepare(f"{module}:components"))
            self.config = complete_config(family, self.templates.config, self.templates.names, checkpoint)
            self.components: tuple[Component, ...] = family_module(family).components(self.config)
            in_config = set(family_module(family).CONFIG_TENSORS.values())
            unused = [
                name
                for name in SplitPass()(checkpoint, self.templates.names, self.components, self.templates.shapes)
                if name not in in_config
            ]
            self.plan: Plan = make_plan(
                options, checkpoint, self.components, self.templates.names, self.templates.shapes, unused
            )
            self.source_files = list(records)
        self.identity = digest(
            [record.sha256 for record in self.source_files if record.path in {"config.json", *checkpoint.weight_files}],
            TEMPLATE_VERSION,
            library_versions(),
        )
        self.samples: SampleSet | None = None
        self.built: list[Built] = []
        # Set while building for ONNX: the traced kinds, and finished components for OpenVINO whose weights are taken over.
        self.onnx_traces = Path()
        self.openvino_folders: dict[str, Path] = {}

    @property
    def names(self) -> dict[str, str]:
        """In-memory tensor name -> name in the checkpoint's files."""
        return self.templates.names

    @property
    def environment(self) -> dict[str, str]:
        """Versions of the libraries that the result depends on."""
        return library_versions(self.options.target)

    def check_disk(self, output: Path) -> None:
        """Refuse to start if the plan will not fit, in the store and at the output."""
        check_disk(self.plan.disk, {"--output": output.parent, "--store": self.store.root})

    def build(self) -> None:
        """Make every component in the store; what it already has is taken from there."""
        chain = self._calibrate() if self.plan.calibrates_llm or self.plan.calibrates_vision else None
        if self.options.target == "onnx":
            self.onnx_traces = self._trace_for_onnx()
        # What torch's exporter imports leaves semaphores behind in a process that is killed.
        self.helper.close(wait=self.options.target == "onnx")
        self.built = [self._build_component(item, chain) for item in self.plan.components]
        if chain is not None:
            chain.clear()
            self.store.remove(chain.samples.name)

    def write(self, output: Path) -> Contents:
        """Put what was built into an existing empty folder, and all that goes with it."""
        seconds = {item.plan.component.name: item.seconds for item in self.built}
        return Contents(self._records(output), write_assets(self, output), seconds)

    def _records(self, output: Path) -> list[ComponentRecord]:
        """Put finished components into `output` and describe them from the files themselves."""
        for item in self.built:
            for record in item.files:
                place = target_module(item.plan.target).place_file
                place(item.folder / record.path, output / record.path)
        return [
            target_module(item.plan.target).describe_component(item.plan, item.files, output) for item in self.built
        ]

    def _prepare(self, describe: str) -> Path:
        folder = self.checkpoint.folder
        key = digest(
            "templates",
            TEMPLATE_VERSION,
            self.checkpoint.config,
            sorted(self.checkpoint.tensors),
            describe,
            _source_digest(),
            library_versions(),
        )
        if key in self.store:
            return self.store.path(key)
        with self.reporter.stage("reading the architecture"):
            return self.store.get_or_make(
                key, lambda output: self.helper.run(prepare, folder, list(self.checkpoint.tensors), describe, output)
            )

    def _calibrate(self) -> FloatChain:
        options = self.options
        count = max(
            options.samples if self.plan.calibrates_llm else 1,
            options.vision_samples if self.plan.calibrates_vision else 1,
        )
        self.samples = load_samples(options.calibration, count, options.seed)
        if options.calibration != "scenes":
            self.samples = self.samples.with_sizes(family_module(self.family).calibration_sizes(self.config))
        # Each component's results depend on its own samples only, so that changing one leaves the other alone.
        settings = ("inputs", 1, options.sequence_length, self.identity, self.processor_digest())
        key = digest(*settings, self.samples.digest)
        if key not in self.store:
            adapt = f"{FAMILIES[self.family]}:inputs"
            with self.reporter.stage(f"processing {len(self.samples.samples)} samples"):
                self.store.get_or_make(
                    key,
                    lambda output: self.helper.run(
                        write_inputs,
                        self.checkpoint.folder,
                        self.samples,
                        adapt,
                        self.config,
                        options.sequence_length,
                        output,
                    ),
                )
        return FloatChain(
            self.store,
            CheckpointBlocks(self.checkpoint, self.templates),
            self.components,
            self.config,
            self.identity,
            self.store.path(key),
            digest(*settings, self.samples.first(options.samples).digest),
            options.samples,
        )

    def processor_digest(self) -> list[str]:
        """Hashes of the processor's files."""
        return [file_record(path, self.checkpoint.folder).sha256 for path in processor_files(self.checkpoint.folder)]

    def _build_component(self, plan: ComponentPlan, chain: FloatChain | None) -> Built:
        start = time.monotonic()
        component = plan.component
        if plan.openvino is not None:
            self.openvino_folders[component.name] = self._build_component(plan.openvino, chain).folder
        in_8_bit = self._in_8_bit(plan, chain)
        keys = [
            self._block_key(plan, plan.block_pass, index, chain, in_8_bit) for index in range(len(component.blocks))
        ]
        key = digest(
            "component",
            1,
            keys,
            [str(item) for item in plan.passes],
            [item.version for item in plan.passes],
            self.onnx_traces.name,
            self.samples.first(self.options.vision_samples).digest if self.samples and plan.quantize else None,
        )
        title = f"{component.name.replace('_', ' ')}"
        files = self._stored(key)
        if files is not None:
            self.reporter.log(f"{title}: found in the store")
        else:
            if isinstance(plan.block_pass, BlockPass) and plan.openvino is None:
                self._make_blocks(plan, plan.block_pass, dict(enumerate(keys)), chain, in_8_bit)
            with self.reporter.stage(f"{title}: putting it together"):
                self.store.get_or_make(key, lambda folder: self._write_component(plan, keys, chain, folder))
            files = _read_records(self.store.path(key))
            for block_key in keys:
                self.store.remove(block_key)
        return Built(plan, self.store.path(key), files, time.monotonic() - start)

    def _stored(self, key: str) -> list[FileRecord] | None:
        """Records of a component in the store; one whose files have changed since is forgotten."""
        if key not in self.store:
            return None
        folder = self.store.path(key)
        files = _read_records(folder)
        if any(file_record(folder / record.path, folder) != record for record in files):
            self.store.remove(key)
            return None
        return files

    def _in_8_bit(self, plan: ComponentPlan, chain: FloatChain | None) -> frozenset[str]:
        """The tensors that stay in 8 bit because the plan lets only a share go to 4 bit."""
        if plan.sensitivity is None or not isinstance(plan.block_pass, CompressInt4Pass):
            return frozenset()
        keys = {index: self._block_key(plan, plan.sensitivity, index, chain) for index in plan.ranked}
        self._make_blocks(plan, plan.sensitivity, keys, chain)
        scores = [score for key in keys.values() for score in read_scores(self.store.path(key))]
        return layers_in_8_bit(scores, plan.block_pass.ratio)

    def _block_key(
        self,
        plan: ComponentPlan,
        block_pass: Pass,
        index: int,
        chain: FloatChain | None,
        in_8_bit: frozenset[str] = frozenset(),
    ) -> str:
        block = plan.component.blocks[index]
        inputs = None
        if block_pass.needs_activations(block.role):
            assert chain is not None
            inputs = chain.inputs_key(chain.number(plan.component, block))
        parts = (block.kind, block.tensors, block.role, inputs, sorted(in_8_bit & set(block.tensors.values())))
        return digest("block", str(block_pass), block_pass.version, self.identity, *parts)

    def _make_blocks(
        self,
        plan: ComponentPlan,
        block_pass: BlockPass,
        keys: dict[int, str],
        chain: FloatChain | None,
        in_8_bit: frozenset[str] = frozenset(),
    ) -> None:
        from joblib import Parallel, delayed

        blocks = plan.component.blocks
        missing = [index for index, key in keys.items() if key not in self.store]
        # Embeddings and LM head first: they need no activations, and as the last one would keep a single worker busy.
        missing.sort(key=lambda index: block_pass.needs_activations(blocks[index].role))
        # Where no block takes activations, memory is that of the weights: the largest are not to meet others.
        alone = [] if any(block_pass.needs_activations(block.role) for block in blocks) else _largest(blocks, missing)
        failure: list[BaseException] = []

        def tasks(indexes: list[int]) -> Iterator[Any]:
            # Runs in joblib's dispatching thread, which would swallow an exception.
            try:
                for index in indexes:
                    block = blocks[index]
                    activations: tuple[BlockInputs, ...] = ()
                    if block_pass.needs_activations(block.role):
                        assert chain is not None
                        activations = chain.inputs(chain.number(plan.component, block))
                    of_block = in_8_bit & set(block.tensors.values())
                    source = BlockSource(self.checkpoint, self.templates, block, activations, of_block)
                    yield delayed(_make_block)(
                        self.store, keys[index], block_pass, plan.component.name, source, self.workers
                    )
            except BaseException as error:
                failure.append(error)

        what = plan.precision if block_pass is plan.block_pass else "sensitivity"
        title = f"{plan.component.name.replace('_', ' ')}: {what}"
        waiting = set(missing)

        def made() -> Iterator[str]:
            together = [index for index in missing if index not in alone]
            for indexes, ahead in ((alone, 1), (together, "n_jobs + 1")):
                parallel = Parallel(
                    n_jobs=self.workers, return_as="generator_unordered", batch_size=1, pre_dispatch=ahead
                )
                yield from parallel(tasks(indexes))

        with self.reporter.stage(title, len(missing)) as step:
            for name in made():
                step(name)
                waiting -= {index for index in waiting if blocks[index].name == name}
                if chain is not None and plan.component is self.components[-1] and block_pass is plan.block_pass:
                    chain.forget(
                        {chain.number(plan.component, block) for i, block in enumerate(blocks) if i not in waiting}
                    )
        if failure:
            raise failure[0]

    def _write_component(self, plan: ComponentPlan, keys: list[str], chain: FloatChain | None, folder: Path) -> None:
        _write_records(folder, target_module(plan.target).write_component(self, plan, keys, chain, folder))

    def _trace_for_onnx(self) -> Path:
        """A folder with every kind of block as torch exports it to ONNX."""
        from passes.onnx.trace import VERSION, trace_kinds

        key = digest("onnx traces", VERSION, self.templates.config, _source_digest(), library_versions("onnx"))
        if key in self.store:
            return self.store.path(key)
        with self.reporter.stage("tracing for ONNX"):
            return self.store.get_or_make(
                key, lambda output: self.helper.run(trace_kinds, self.config, self.components, output)
            )


_RECORDS = "records.json"


def _write_records(folder: Path, known: Sequence[FileRecord] = ()) -> None:
    """Finish a component's folder: its files' records, and no way to change them by accident."""
    by_path = {record.path: record for record in known}
    records = []
    for path in sorted(folder.iterdir()):
        records.append(by_path.get(path.name) or file_record(path, folder))
        path.chmod(0o444)
    write_atomically(folder / _RECORDS, json.dumps([record.model_dump() for record in records]))


def _read_records(folder: Path) -> list[FileRecord]:
    return [FileRecord(**record) for record in json.loads((folder / _RECORDS).read_text(encoding="utf-8"))]


def _largest(blocks: Sequence[Block], indexes: list[int]) -> list[int]:
    """Those blocks whose weights are a vocabulary's."""
    return [index for index in indexes if blocks[index].role in {"embeddings", "head"}]


def _make_block(store: Store, key: str, item: BlockPass, component: str, source: BlockSource, workers: int) -> str:
    _keep_to_own_cores(workers)
    with named_failure(item, component, source.block.name), _torch_left_out():
        store.get_or_make(key, lambda output: item.run(source, output))
    _give_memory_back()
    return source.block.name


@contextmanager
def _torch_left_out() -> Iterator[None]:
    """Let NNCF, which takes torch along where it finds it, be imported without: it saves 0.2 GB in every process."""
    if "torch" in sys.modules:
        yield
        return
    sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules["torch"]


def _give_memory_back() -> None:
    """Return what a block has left unused, which glibc keeps for the process."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


def _keep_to_own_cores(workers: int) -> None:
    """Give a worker process its share of the cores: OpenVINO would start a thread for every core in each of them."""
    process = multiprocessing.current_process()
    cores = sorted(os.sched_getaffinity(0))
    if process.name.startswith("LokyProcess-") and len(cores) > workers - 1 > 0 and not hasattr(process, "own_cores"):
        share = int(process.name.rpartition("-")[2]) % workers
        os.sched_setaffinity(0, cores[share::workers])
        process.own_cores = True  # type: ignore[attr-defined]


def _source_digest() -> str:
    """Digest of the families' code, on which traces depend."""
    folder = Path(families.__file__).parent
    return digest([path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.py"))])
