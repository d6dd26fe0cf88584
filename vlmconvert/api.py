"""The public Python API: the functions behind the commands, all of them available from `import vlmconvert`.

Heavy libraries are imported only when a function is called.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Sequence

    from manifests.check_report import CheckReport
    from manifests.evaluation import Evaluation
    from manifests.model import Manifest
    from manifests.verify import Finding
    from vlmconvert.console import Reporter
    from vlmconvert.conversion.convert import Converted
    from vlmconvert.recipes.recipe import Recipe
    from vlmconvert.running.model import VisionLanguageModel

    StrPath = str | os.PathLike[str]

__all__ = [
    "bom",
    "check",
    "convert",
    "evaluate",
    "forbid_network",
    "load",
    "load_processor",
    "read_manifest",
    "sign",
    "verify",
]


def convert(
    checkpoint: StrPath | None = None,
    *,
    family: str | None = None,
    output: StrPath | None = None,
    target: str = "openvino",
    llm: str | None = None,
    vision: str | None = None,
    max_size: str | None = None,
    recipe: StrPath | Recipe | None = None,
    calibration: str = "mixed",
    samples: int = 64,
    vision_samples: int = 100,
    sequence_length: int = 0,
    seed: int = 0,
    workers: int | None = None,
    max_memory: str | None = None,
    cluster: str | None = None,
    store: StrPath | None = None,
    revision: str | None = None,
    token: str | None = None,
    ignore_unused: bool = False,
    force: bool = False,
    dry_run: bool = False,
    save_recipe: StrPath | None = None,
    validate: bool = True,
    validation_samples: int = 200,
    validation_time: float = 0.25,
    max_kl: float | None = None,
    max_drop: float = 1.0,
    reporter: Reporter | None = None,
    **options: Any,
) -> Converted:
    """Convert a checkpoint into an artifact.

    Args:
        checkpoint: local folder or hub id; None converts the demo checkpoint of the family.
        family: name of the checkpoint's family; None finds the family from config.json.
        output: folder to write; None names it after the checkpoint, target and precisions, in the working directory.
        target: runtime that the artifact is made for.
        llm: precision of the language model; None takes the target's default.
        vision: precision of the vision encoder; None takes the target's default.
        max_size: maximum size of the component files, such as 4.5GB, or of each weight, such as 4.5bits; 8 bit, 4 bit or
            float is chosen for each layer of a side without a precision by what it loses.
        recipe: a recipe or the path of its file; it takes the place of target, precisions, options and calibration.
        calibration: source of the calibration samples.
        samples: number of calibration samples for passes over single blocks, 0 for none.
        vision_samples: number of calibration samples for passes that quantize activations.
        sequence_length: maximum number of tokens of a sample, 0 for no limit.
        seed: seed that selects the calibration samples.
        workers: number of processes that compress blocks; None takes as many as fit the cores and the memory.
        max_memory: limit for the memory of the conversion, such as 8GiB; None takes that of the environment variable
            VLMCONVERT_MAX_MEMORY, if there is one.
        cluster: address of a Dask or Ray cluster that makes the blocks, such as dask://host:8786; None makes them on this
            machine.
        store: folder where finished steps are kept; None is `~/.cache/vlmconvert`.
        revision: branch, tag or commit of a hub id.
        token: access token for a gated hub id.
        ignore_unused: whether to leave out adapters and other tensors that the model of the config does not have.
        force: whether to replace a different artifact of vlmconvert at the output.
        dry_run: whether to stop after the plan.
        save_recipe: file to which the recipe is written that the options stand for.
        validate: whether to compare the artifact with the checkpoint.
        validation_samples: maximum number of held-out scenes for that comparison.
        validation_time: maximum share of the conversion's time that the comparison takes, once it has taken a minute; 0
            sets no limit.
        max_kl: maximum mean KL divergence from the checkpoint that passes, in nats; None takes that of the precisions.
        max_drop: maximum loss of accuracy that passes, in percentage points.
        reporter: shows progress; None shows nothing.
        options: options of the precisions and of the target, such as `group_size=128` or `logits="all"`.

    Returns:
        The output folder, the recipe, the manifest, and whether all checks passed.

    Raises:
        BadInputError: if something is wrong with the input; raised before any work.
        ConversionError: if a pass failed; the output is left as it was before.
    """
    from manifests.errors import BadInputError
    from manifests.model import CalibrationSettings
    from vlmconvert.conversion.convert import Request
    from vlmconvert.conversion.convert import convert as run
    from vlmconvert.precisions import precision_options
    from vlmconvert.recipes.recipe import Recipe, read_recipe
    from vlmconvert.targets import load_target

    for name, value, least in (
        ("samples", samples, 0),
        ("sequence_length", sequence_length, 0),
        ("vision_samples", vision_samples, 1),
        ("validation_samples", validation_samples, 1),
        ("validation_time", validation_time, 0),
        ("workers", 1 if workers is None else workers, 1),
    ):
        if not value >= least:
            raise BadInputError(f"--{name.replace('_', '-')} {value} is too small: use {least} or more")
    settings = CalibrationSettings(
        source=calibration,
        samples=samples,
        vision_samples=vision_samples,
        sequence_length=sequence_length,
        seed=seed,
    )
    if recipe is not None:
        asked = {"llm": llm, "vision": vision, "max_size": max_size, **options}
        said = [name for name, value in asked.items() if value is not None]
        said += ["target"] if target != "openvino" else []
        said += ["calibration"] if settings != CalibrationSettings() else []
        if said:
            raise BadInputError(f"{said[0]} is already set by the recipe: leave it out")
    of_target = {option.name for option in load_target(target).options}
    of_passes = {option.name for option in precision_options(target)}
    if unknown := sorted(options.keys() - of_target - of_passes):
        raise BadInputError(
            f"{unknown[0]} is not an option of target {target}: its options are {', '.join(sorted(of_target | of_passes))}"
        )
    request = Request(
        store=_store(store),
        model=None if checkpoint is None else os.fspath(checkpoint),
        family=family,
        target=target,
        precisions={"language": llm, "vision": vision},
        pass_options={name: value for name, value in options.items() if name in of_passes},
        target_options={name: value for name, value in options.items() if name in of_target},
        calibration=settings,
        max_size=max_size,
        recipe=recipe if recipe is None or isinstance(recipe, Recipe) else read_recipe(Path(recipe)),
        output=_path(output),
        workers=workers,
        max_memory=max_memory,
        cluster=cluster,
        revision=revision,
        token=token,
        ignore_unused=ignore_unused,
        force=force,
        dry_run=dry_run,
        save_recipe=_path(save_recipe),
        validate=validate,
        validation_samples=validation_samples,
        validation_time=validation_time,
        max_kl=max_kl,
        max_drop=max_drop,
    )
    return run(request, reporter or _silent())


def load(
    folder: StrPath,
    device: str = "CPU",
    ov_config: Mapping[str, Any] | None = None,
    cache_dir: StrPath | None = None,
) -> VisionLanguageModel:
    """Open an artifact from its manifest.

    Args:
        folder: the artifact.
        device: OpenVINO device name, such as CPU, GPU or AUTO.
        ov_config: OpenVINO compile options.
        cache_dir: folder where OpenVINO keeps compiled models, so that the next call opens them faster.

    Returns:
        A model with transformers' `generate`. Prepare its inputs with `load_processor(folder)` or, for models that take no
        videos, with transformers' `AutoProcessor`.

    Raises:
        BadInputError: if the folder is not an artifact, or OpenVINO refuses the device or an option.
    """
    from vlmconvert.running.model import VisionLanguageModel

    return VisionLanguageModel(Path(folder), device, ov_config, _path(cache_dir))


def load_processor(folder: StrPath) -> Any:
    """Open the processor of an artifact or a checkpoint, from local files.

    It is transformers' own processor with three differences: images are processed with Pillow; videos, for which transformers
    needs torchvision, go through the image processor frame by frame; and `apply_chat_template` finds the checkpoint's chat
    template in whichever file it is kept.

    Args:
        folder: an artifact or a checkpoint.

    Raises:
        BadInputError: if a file is missing or damaged, or no file has a chat template.
    """
    from passes.checkpoint import read_config
    from vlmconvert.families import family_of

    return family_of(read_config(Path(folder)), str(folder)).load_processor(Path(folder))


def read_manifest(folder: StrPath) -> Manifest:
    """Read the manifest of an artifact.

    Args:
        folder: the artifact.

    Raises:
        BadInputError: if the manifest is missing, damaged, or of a version that this vlmconvert cannot read.
    """
    from manifests.io import read_manifest as read

    return read(Path(folder))


def verify(
    folder: StrPath, *, device: str = "CPU", run: bool = True, public_key: StrPath | None = None
) -> list[Finding]:
    """Check an artifact against its manifest: its files, its graphs, the weights of every block, and that it runs.

    Args:
        folder: the artifact.
        device: device of the artifact's runtime.
        run: whether to ask the artifact about an image; this takes as much memory as using it.
        public_key: PEM file of the key with which the artifact must be signed; None checks no signature.

    Returns:
        One finding for everything that was checked; the `outcome` of a finding is `failed` if something is wrong.

    Raises:
        BadInputError: if the folder is not an artifact, or a key is given and it cannot be used or there is no signature.
    """
    from vlmconvert.judging.verify import verify as checks

    return list(checks(Path(folder), device, run, _path(public_key)))


def sign(folder: StrPath, private_key: StrPath) -> Path:
    """Sign all files of an artifact, without a network.

    Args:
        folder: the artifact.
        private_key: PEM file of an elliptic-curve key without a password.

    Returns:
        The signature, `model.sig` in the artifact.

    Raises:
        BadInputError: if the folder is not an artifact, the key cannot be used, or the extra `sign` is not installed.
        CheckFailedError: if the artifact is not intact.
    """
    from manifests.signing import sign as write_signature

    return write_signature(Path(folder), Path(private_key))


def bom(folder: StrPath) -> str:
    """Describe an artifact as a CycloneDX 1.6 ML-BOM.

    Args:
        folder: the artifact.

    Returns:
        The BOM as JSON; equal artifacts have equal BOMs.

    Raises:
        BadInputError: if the folder is not an artifact, or the extra `bom` is not installed.
    """
    from vlmconvert.report.bom import bom as describe

    return describe(Path(folder))


def forbid_network() -> None:
    """Forbid connections to other hosts in this process and in those that it starts from now on; this cannot be undone.

    Hub ids are then found in the local cache alone. It is what `--offline` and VLMCONVERT_OFFLINE=1 do.

    Raises:
        NetworkForbiddenError: not here, but from then on in whatever tries to reach another host; it is an OSError, too.
    """
    from manifests.network import forbid_network as forbid

    forbid()


def evaluate(
    folder: StrPath,
    *,
    checkpoint: StrPath | None = None,
    data: str = "scenes",
    samples: int = 200,
    seed: int = 0,
    metrics: Sequence[str] | None = None,
    max_new_tokens: int = 32,
    batch: int = 25,
    block_samples: int = 8,
    output: StrPath | None = None,
    evalai: StrPath | None = None,
    token: str | None = None,
    store: StrPath | None = None,
    device: str = "CPU",
    ov_config: Mapping[str, str] | None = None,
    cache_dir: StrPath | None = None,
    reporter: Reporter | None = None,
) -> Evaluation:
    """Measure an artifact on data, and compare it with the checkpoint that it was made from.

    Args:
        folder: the artifact.
        checkpoint: local folder or hub id; None takes the checkpoint that the manifest names, "" measures the artifact alone.
        data: source of the questions.
        samples: maximum number of questions.
        seed: seed that selects the questions.
        metrics: names of metrics; None takes exact_match and, with a checkpoint, token_agreement, kl and perplexity.
        max_new_tokens: maximum number of tokens of an answer.
        batch: number of questions that are answered together.
        block_samples: number of samples on which the error of each block is measured, 0 to leave it out.
        output: folder for the results; None is the folder `evaluation` in the artifact.
        evalai: file for the answers in the format of EvalAI.
        token: access token for a gated hub id.
        store: folder where answers are kept; None is `~/.cache/vlmconvert`.
        device: device of the artifact's runtime.
        ov_config: options of that runtime.
        cache_dir: folder where OpenVINO keeps compiled models.
        reporter: shows progress; None shows nothing.

    Returns:
        The figures, and where they come from.

    Raises:
        BadInputError: if the artifact, the checkpoint, the data or a metric cannot be used.
    """
    from vlmconvert.measuring.evaluate import DEFAULT_METRICS, TEXT_METRICS, EvaluationRequest
    from vlmconvert.measuring.evaluate import evaluate as run

    names = tuple(metrics) if metrics else DEFAULT_METRICS
    if checkpoint == "" and not metrics:
        names = tuple(name for name in names if name in TEXT_METRICS)
    request = EvaluationRequest(
        folder=Path(folder),
        checkpoint=None if checkpoint is None else os.fspath(checkpoint),
        data=data,
        samples=samples,
        seed=seed,
        metrics=names,
        max_new_tokens=max_new_tokens,
        batch=batch,
        output=_path(output),
        evalai=_path(evalai),
        block_samples=block_samples,
        store=_store(store),
        device=device,
        ov_config=ov_config or {},
        cache_dir=_path(cache_dir),
        token=token,
    )
    return run(request, reporter or _silent())


def check(
    folder: StrPath,
    baseline: StrPath,
    *,
    data: str | None = None,
    samples: int | Literal["auto"] = 200,
    max_drop: float = 1.0,
    max_kl: float | None = None,
    max_block_error: float | None = None,
    max_size_ratio: float | None = None,
    max_latency_ratio: float | None = None,
    device: str = "CPU",
    ov_config: Mapping[str, str] | None = None,
    cache_dir: StrPath | None = None,
    reporter: Reporter | None = None,
) -> CheckReport:
    """Compare an artifact with a baseline on the same samples.

    Args:
        folder: the artifact.
        baseline: another artifact, or the path of its manifest.json.
        data: source of the samples; None takes the data that both were evaluated on or, without such data, scenes.
        samples: number of samples, if they are not taken from evaluations; `auto` takes as many as `max_drop` needs.
        max_drop: maximum loss of a score, in percentage points.
        max_kl: maximum mean KL divergence from the baseline, in nats; None takes that of the artifact's precisions, if the
            baseline has graphs, or almost none if both were made of the same in the same way.
        max_block_error: maximum relative error of a block compared with the baseline's block; None checks no blocks.
        max_size_ratio: maximum size as a multiple of the baseline's size; None only reports the size.
        max_latency_ratio: maximum time for each token as a multiple of the baseline's time; None measures no latency.
        device: device of the runtime, for both artifacts.
        ov_config: options of the runtime, for both artifacts.
        cache_dir: folder where OpenVINO keeps compiled models.
        reporter: shows progress; None shows nothing.

    Returns:
        Every check with its limit; `passed` says whether no limit is broken.

    Raises:
        BadInputError: if one of the two is not an artifact, or a limit needs something that the baseline does not have.
    """
    from vlmconvert.judging.check import check as compare
    from vlmconvert.judging.request import CheckRequest

    request = CheckRequest(
        folder=Path(folder),
        baseline=Path(baseline),
        data=data,
        samples=samples,
        max_drop=max_drop,
        max_kl=max_kl,
        max_block_error=max_block_error,
        max_size_ratio=max_size_ratio,
        max_latency_ratio=max_latency_ratio,
        device=device,
        ov_config=ov_config or {},
        cache_dir=_path(cache_dir),
    )
    return compare(request, reporter or _silent())


def _path(path: StrPath | None) -> Path | None:
    return None if path is None else Path(path)


def _store(path: StrPath | None) -> Path:
    from passes.store import default_store

    return default_store() if path is None else Path(path)


def _silent() -> Reporter:
    from vlmconvert.console import Reporter

    return Reporter(quiet=True)
