"""Putting an Ascend artifact together: weights, description, config, every sidecar, and the plan to run it."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from manifests.errors import BadInputError
from manifests.files import file_record, write_atomically
from manifests.model import FileRecord
from manifests.run_plan import RunPlan
from passes.architecture import Architecture, read_architecture
from passes.checkpoint import Checkpoint
from passes.compress.w8a16 import CompressW8A16Pass
from passes.export.ascend import AscendWeights, artifact_config, plan_weights, write_config
from passes.export.run_plan import run_plan
from vlmconvert.artifact import processor_files

__all__ = ["ENGINES", "SHARD_SIZE", "AscendArtifact", "AscendOptions", "Run", "inspect", "plan_ascend", "write_ascend"]

ENGINES = ("own", "msmodelslim")
SHARD_SIZE = 4_000_000_000
_PROCESSOR, _PREPROCESSOR, _TOKENIZER = "processor_config.json", "preprocessor_config.json", "tokenizer_config.json"

# Runs a function in a process of its own, such as `vlmconvert.pipeline.Helper.run`. After msmodelslim that process is good for
# nothing else: see `passes.compress.msmodelslim`.
Run = Callable[..., Any]


@dataclass(frozen=True)
class AscendOptions:
    """How an artifact is made.

    Attributes:
        quantize: the pass with its options.
        engine: `own` streams; `msmodelslim` holds the whole model in memory.
        shard_size: bytes that a weight file may have.
        workers: weight files that are written at once.
    """

    quantize: CompressW8A16Pass = field(default_factory=CompressW8A16Pass)
    engine: Literal["own", "msmodelslim"] = "own"
    shard_size: int = SHARD_SIZE
    workers: int = 1


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
    if options.engine == "msmodelslim" and options.quantize.outlier_suppression != "none":
        raise BadInputError("--outlier-suppression goes with our own engine: leave out --engine msmodelslim")
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
        from passes.compress.msmodelslim import calibrate, plan_calibrated

        with tempfile.TemporaryDirectory(prefix=".msmodelslim-", dir=folder) as temporary:
            raw = Path(temporary)
            run(calibrate, checkpoint, architecture, options.quantize, raw)
            weights = plan_calibrated(checkpoint, architecture, options.quantize, options.shard_size, raw)
            files = weights.write(folder, options.workers)
    else:
        files = weights.write(folder, options.workers)
    config = artifact_config(checkpoint, architecture)
    assets = [write_config(config, folder), *write_sidecars(checkpoint.folder, folder)]
    return AscendArtifact(weights, files, assets, run_plan(weights, config))


def write_sidecars(source: Path, folder: Path) -> list[FileRecord]:
    """Copy every file of processor and tokenizer, and let transformers 4, with which MindIE reads them, find its way.

    It looks for the image processor in a file of its own, and does not know the class by which transformers 5 calls a tokenizer
    that is one file.
    """
    for path in processor_files(source):
        shutil.copyfile(path, folder / path.name)
    if (folder / _PROCESSOR).is_file() and not (folder / _PREPROCESSOR).is_file():
        processor = _read(folder / _PROCESSOR)
        if isinstance(processor.get("image_processor"), dict):
            own = {key: processor[key] for key in ("processor_class",) if key in processor}
            _write(folder / _PREPROCESSOR, {**processor["image_processor"], **own})
    if (folder / _TOKENIZER).is_file():
        tokenizer = _read(folder / _TOKENIZER)
        if tokenizer.get("tokenizer_class") == "TokenizersBackend":
            _write(folder / _TOKENIZER, {**tokenizer, "tokenizer_class": "PreTrainedTokenizerFast"})
    return [file_record(path, folder) for path in processor_files(folder)]


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BadInputError(f"{path.name} is not JSON ({error}): fetch the file again") from error
    return content if isinstance(content, dict) else {}


def _write(path: Path, content: dict[str, Any]) -> None:
    write_atomically(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")
