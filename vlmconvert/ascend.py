"""Putting an Ascend artifact together: weights, description, config, every sidecar, and the plan to run it."""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

from manifests.errors import BadInputError
from manifests.files import file_record, write_atomically
from manifests.model import Component as ComponentRecord
from manifests.model import FileRecord
from manifests.run_plan import RunPlan
from passes.architecture import Architecture, read_architecture
from passes.checkpoint import Checkpoint
from passes.compress.msmodelslim import calibrate, check_options, plan_calibrated
from passes.compress.w8a16 import CompressW8A16Pass
from passes.export.ascend import AscendWeights, artifact_config, plan_weights, write_config
from passes.export.run_plan import plan_lengths, run_plan
from passes.split import Component
from passes.store import library_versions
from vlmconvert.artifact import Contents, check_disk, check_processor, processor_files, source_names
from vlmconvert.console import Reporter
from vlmconvert.families import complete_config, family_module
from vlmconvert.pipeline import Helper
from vlmconvert.plan import PlanLine

__all__ = [
    "ENGINES",
    "SHARD_SIZE",
    "AscendArtifact",
    "AscendConversion",
    "AscendOptions",
    "AscendPlan",
    "inspect",
    "plan_ascend",
    "write_ascend",
]

ENGINES = ("vlmconvert", "msmodelslim")
SHARD_SIZE = 4_000_000_000
_COMPONENT, _PRECISION = "model", "w8a16"
# Options of --vision -> dtype of a checkpoint that is already that.
_FLOATS = {"fp32": "F32", "fp16": "F16"}
_PROCESSOR, _TOKENIZER = "processor_config.json", "tokenizer_config.json"
# Parts of processor_config.json as transformers 5 writes it -> the file in which transformers 4 looks for each.
_PROCESSOR_PARTS = {"image_processor": "preprocessor_config.json", "video_processor": "video_preprocessor_config.json"}
_CHAT_TEMPLATE, _OLD_CHAT_TEMPLATE = "chat_template.jinja", "chat_template.json"

# Runs a function in a process of its own, such as `vlmconvert.pipeline.Helper.run`. After msmodelslim that process is good for
# nothing else: see `passes.compress.msmodelslim`.
Run = Callable[..., Any]


@dataclass(frozen=True)
class AscendOptions:
    """How an artifact is made.

    Attributes:
        quantize: the pass with its options.
        engine: `vlmconvert` streams; `msmodelslim` holds the whole model in memory.
        shard_size: bytes that a weight file may have.
        workers: weight files that are written at once.
        vision: what the user wants the vision encoder to be; the checkpoint's own float if empty, and no other is made.
    """

    target: ClassVar[Literal["ascend"]] = "ascend"
    label: ClassVar[str] = "ascend-w8a16"

    quantize: CompressW8A16Pass = field(default_factory=CompressW8A16Pass)
    engine: Literal["vlmconvert", "msmodelslim"] = "vlmconvert"
    shard_size: int = SHARD_SIZE
    workers: int = 1
    vision: str = ""


@dataclass(frozen=True)
class AscendArtifact:
    """What was written.

    Attributes:
        weights: the tensors.
        files: records of the weight files, their index and the description.
        assets: records of config and sidecars.
        plan: how to run it.
    """

    weights: AscendWeights
    files: list[FileRecord]
    assets: list[FileRecord]
    plan: RunPlan


@dataclass(frozen=True)
class AscendPlan:
    """What a person is shown before any work starts; see `vlmconvert.plan.Plan`."""

    lines: tuple[PlanLine, ...]
    unused_tensors: tuple[str, ...]
    size_after: int
    disk: int


class AscendConversion:
    """One run, with the interface of `vlmconvert.pipeline.Conversion` as far as `vlmconvert.convert` asks.

    Making it checks everything on metadata and plans; no weight is read before `write`.

    Raises:
        BadInputError: if anything is wrong with the checkpoint or the options.
    """

    samples = None

    def __init__(self, family: str, checkpoint: Checkpoint, options: AscendOptions, reporter: Reporter) -> None:
        self.family, self.checkpoint, self.options, self.reporter = family, checkpoint, options, reporter
        self.helper = Helper()
        check_processor(checkpoint.folder, family_module(family).PROCESSOR_FILES)
        with ThreadPoolExecutor(1) as threads:
            # The helper imports transformers meanwhile.
            records = threads.map(
                lambda name: file_record(checkpoint.folder / name, checkpoint.folder), source_names(checkpoint)
            )
            with reporter.stage("reading the architecture"):
                self.architecture = inspect(checkpoint, self.helper.run)
            weights = plan_ascend(checkpoint, self.architecture, options)
            self.source_files = list(records)
        self.config = complete_config(family, self.architecture.config, self.names, checkpoint)
        self.components: tuple[Component, ...] = family_module(family).components(self.config)
        used = {self.architecture.source(name) for name in self.architecture.shapes}
        line = PlanLine(
            name=_COMPONENT,
            precision=_PRECISION,
            blocks=sum(len(component.blocks) for component in self.components),
            passes=(str(options.quantize),),
            fallbacks=(),
            size_before=sum(checkpoint.tensors[name].byte_size for name in used),
            size_after=weights.size,
            # What the other engine leaves as float has its dtype.
            files=weights.file_sizes if options.engine == "vlmconvert" else {},
        )
        unused = checkpoint.tensors.keys() - used
        files = 2 if options.engine == "msmodelslim" else 1
        self.plan = AscendPlan((line,), tuple(sorted(unused)), weights.size, files * weights.size)

    @property
    def names(self) -> dict[str, str]:
        """In-memory tensor name -> name in the checkpoint's files."""
        return self.architecture.names

    @property
    def environment(self) -> dict[str, str]:
        """Versions of the libraries that the result depends on."""
        return library_versions("msmodelslim" if self.options.engine == "msmodelslim" else self.options.target)

    def check_disk(self, output: Path) -> None:
        """Refuse to start if the plan will not fit at the output."""
        check_disk(self.plan.disk, {"--output": output.parent})

    def build(self) -> None:
        """Nothing is kept in the store: one reading of the checkpoint makes the artifact."""

    def write(self, output: Path) -> Contents:
        """Make the artifact in an existing empty folder."""
        start = time.monotonic()
        if self.options.engine == "vlmconvert":
            self.helper.close()  # transformers leaves memory
        with self.reporter.stage(f"{_COMPONENT}: {_PRECISION}"):
            made = write_ascend(self.checkpoint, self.architecture, self.options, output, self.helper.run)
        self.helper.close()
        record = ComponentRecord(
            name=_COMPONENT,
            role="vision encoder, projector and language model; the runtime has their graphs",
            format="ascend-w8a16",
            precision=_PRECISION,
            files=made.files,
            inputs=[],
            outputs=[],
            state=[],
            logits=None,
            weights=made.weights.weights,
            blocks={},
            passes=[str(self.options.quantize)],
            fallbacks=[],
        )
        return Contents([record], made.assets, {_COMPONENT: time.monotonic() - start}, made.plan)


def inspect(checkpoint: Checkpoint, run: Run) -> Architecture:
    """Ask transformers for the architecture, in the process behind `run`, and check the checkpoint against it.

    Raises:
        BadInputError: if the config is refused, or the tensors are not those that it implies.
    """
    architecture: Architecture = run(read_architecture, checkpoint.folder, list(checkpoint.tensors))
    architecture.check(checkpoint)
    return architecture


def plan_ascend(checkpoint: Checkpoint, architecture: Architecture, options: AscendOptions) -> AscendWeights:
    """The artifact's layout, from metadata; what the other engine writes has the same names and shapes.

    Raises:
        BadInputError: if the options do not fit the checkpoint.
    """
    if options.shard_size < 1:
        raise BadInputError(f"--shard-size {options.shard_size} is too small: give the bytes of a file, such as 4GB")
    if options.vision and _FLOATS.get(options.vision) != checkpoint.dtype:
        raise BadInputError(
            f"--vision {options.vision} does not go with --target ascend: its runtimes compute the vision encoder in the "
            f"checkpoint's own {checkpoint.dtype}; leave the option out"
        )
    if options.engine == "msmodelslim":
        check_options(options.quantize)
    return plan_weights(checkpoint, architecture, options.quantize, options.shard_size)


def write_ascend(
    checkpoint: Checkpoint, architecture: Architecture, options: AscendOptions, folder: Path, run: Run
) -> AscendArtifact:
    """Write everything but manifest and card into an existing empty folder.

    Raises:
        BadInputError: if a weight is NaN or infinite and that is not allowed, or the engine is not installed.
    """
    weights = plan_ascend(checkpoint, architecture, options)
    if options.engine == "msmodelslim":
        with tempfile.TemporaryDirectory(prefix=".msmodelslim-", dir=folder) as temporary:
            raw = Path(temporary)
            run(calibrate, checkpoint, architecture, options.quantize, raw)
            weights = plan_calibrated(checkpoint, architecture, options.quantize, options.shard_size, raw)
            files = weights.write(folder, options.workers)
    else:
        files = weights.write(folder, options.workers)
    family = family_module(str(architecture.config["model_type"]).replace("_", "-"))
    config = artifact_config(checkpoint, architecture, family.ASCEND)
    assets = [write_config(config, folder), *write_sidecars(checkpoint.folder, folder)]
    lengths = plan_lengths(config, family.image_tokens(config))
    return AscendArtifact(weights, files, assets, run_plan(weights, config, family.ASCEND, **lengths))


def write_sidecars(source: Path, folder: Path) -> list[FileRecord]:
    """Copy every file of processor and tokenizer, and let transformers 4, with which MindIE reads them, find its way.

    It looks for image and video processor in files of their own and refuses them elsewhere, looks for the chat template in JSON,
    does not know the class by which transformers 5 calls a tokenizer that is one file, and calls a list of special tokens
    otherwise. transformers 5 reads the result as it reads the source.
    """
    for path in processor_files(source):
        shutil.copyfile(path, folder / path.name)
    if (folder / _CHAT_TEMPLATE).is_file() and not (folder / _OLD_CHAT_TEMPLATE).is_file():
        template = (folder / _CHAT_TEMPLATE).read_text(encoding="utf-8")
        _write(folder / _OLD_CHAT_TEMPLATE, {"chat_template": template})
    processor = _read(folder / _PROCESSOR) if (folder / _PROCESSOR).is_file() else {}
    parts = {key: value for key in _PROCESSOR_PARTS if isinstance(value := processor.get(key), dict)}
    for key, part in parts.items():
        # Where there is such a file too, transformers 5 does not look at it.
        own = {name: processor[name] for name in ("processor_class",) if name in processor}
        _write(folder / _PROCESSOR_PARTS[key], {**part, **own})
    if parts:
        _write(folder / _PROCESSOR, {key: value for key, value in processor.items() if key not in parts})
    if (folder / _TOKENIZER).is_file():
        tokenizer = _read(folder / _TOKENIZER)
        before = dict(tokenizer)
        if tokenizer.get("tokenizer_class") == "TokenizersBackend":
            tokenizer["tokenizer_class"] = "PreTrainedTokenizerFast"
        if isinstance(tokenizer.get("extra_special_tokens"), list):
            tokenizer["additional_special_tokens"] = tokenizer.pop("extra_special_tokens")
        if tokenizer != before:
            _write(folder / _TOKENIZER, tokenizer)
    return [file_record(path, folder) for path in processor_files(folder)]


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BadInputError(f"{path.name} is not JSON ({error}): fetch the file again") from error
    return content if isinstance(content, dict) else {}


def _write(path: Path, content: dict[str, Any]) -> None:
    write_atomically(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
