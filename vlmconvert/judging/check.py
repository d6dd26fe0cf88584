"""Comparing an artifact with a baseline on the same samples, and each figure with its limit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
from rich.table import Table

from calibration.scenes import Split
from calibration.sources import load_samples
from manifests.check_report import Check, CheckReport, TestRecord
from manifests.errors import BadInputError
from manifests.evaluation import (
    EVALUATION_FOLDER,
    BlockError,
    Evaluation,
    Prediction,
    read_evaluation,
    read_predictions,
)
from manifests.io import manifest_digest, read_manifest, read_manifest_file
from manifests.leftovers import scratch_folder
from manifests.model import Manifest
from passes.validate.accuracy import LEAST_ACCURACY
from passes.validate.comparison import kl_divergence
from passes.validate.greedy import forced_logits, greedy
from passes.validate.paired import compare_paired
from vlmconvert.console import Reporter, format_size
from vlmconvert.judging.limits import enough_samples, usual_kl
from vlmconvert.measuring.bench import BenchRequest, bench
from vlmconvert.measuring.blocks import artifact_blocks, block_errors
from vlmconvert.measuring.evaluate import EvaluationRequest, evaluate, in_batches, load_questions
from vlmconvert.running.open import open_runner

__all__ = ["CheckRequest", "check", "check_table"]

_BATCH = 25
_STEPS = 16  # maximum number of tokens of an answer, as in validation
_LATENCY_TOKENS = 32
_BLOCK_SAMPLES = 4
# Scores of a prediction that compare it with the checkpoint and do not say how good the answer is.
_NO_QUALITY = {"kl", "token_agreement"}


@dataclass(frozen=True)
class CheckRequest:
    """One comparison and its limits; a limit of None is not checked, unless said otherwise.

    Attributes:
        folder: the artifact.
        baseline: folder of another artifact, or the path of its manifest.json.
        data: source of the samples; None takes the data that both were evaluated on or, without such data, scenes.
        samples: number of samples, if they are not taken from evaluations; `auto` takes as many as `max_drop` needs.
        max_drop: maximum loss of each score, in percentage points.
        max_kl: maximum mean KL divergence from the baseline along the baseline's answers, in nats; None takes that of the
            artifact's precisions if the baseline has graphs, or almost none if both were made of the same in the same way.
        max_block_error: maximum relative error of a block's output compared with the baseline's block.
        max_size_ratio: maximum size of the component files as a multiple of the baseline's size.
        max_latency_ratio: maximum time for each token as a multiple of the baseline's time.
        device: OpenVINO device name.
        ov_config: OpenVINO compile options, for both artifacts.
        cache_dir: folder where OpenVINO keeps compiled models.
    """

    folder: Path
    baseline: Path
    data: str | None = None
    samples: int | Literal["auto"] = 200
    max_drop: float = 1.0
    max_kl: float | None = None
    max_block_error: float | None = None
    max_size_ratio: float | None = None
    max_latency_ratio: float | None = None
    device: str = "CPU"
    ov_config: Mapping[str, str] = field(default_factory=dict)
    cache_dir: Path | None = None


@dataclass(frozen=True)
class _Party:
    """The artifact or the baseline; `folder` is None for a baseline that is only a manifest.json."""

    label: str
    manifest: Manifest
    folder: Path | None

    @property
    def graphs(self) -> Path | None:
        """The folder, if it has all component files, so that the artifact can answer; otherwise None."""
        files = [record.path for component in self.manifest.components for record in component.files]
        return self.folder if self.folder and all((self.folder / path).exists() for path in files) else None

    @property
    def has_blocks(self) -> bool:
        """Whether the artifact has all component files, and these can be cut into blocks."""
        return self.graphs is not None and self.is_graphs

    @property
    def is_graphs(self) -> bool:
        """Whether artifacts of this target are graphs, which can be cut into blocks."""
        return artifact_blocks(self.folder or Path(), self.manifest) is not None


def check(request: CheckRequest, reporter: Reporter) -> CheckReport:
    """Compare an artifact with a baseline.

    Raises:
        BadInputError: if one of the two is not an artifact, or a limit needs something that the baseline does not have.
    """
    artifact, baseline = _party(request.folder), _party(request.baseline)
    if artifact.graphs is None:
        raise BadInputError(f"{request.folder} lacks files that its manifest names: convert the checkpoint again")
    _check_request(request, artifact, baseline)
    if request.samples == "auto":
        request = replace(request, samples=enough_samples(request.max_drop))
    data, quality = _quality(request, artifact, baseline, reporter)
    if baseline.graphs is not None:
        limit = (
            usual_kl(artifact.graphs, artifact.manifest, baseline.manifest)
            if request.max_kl is None
            else request.max_kl
        )
        texts = any(item.limit is None for item in quality)
        quality.append(_divergence(request, limit, artifact.graphs, baseline.graphs, reporter, texts))
    both = artifact.has_blocks and baseline.has_blocks
    errors: list[BlockError] = []
    if both and (request.max_block_error is not None or not all(item.passed for item in quality)):
        errors = _block_errors(request, artifact, baseline, reporter)
    if request.max_block_error is not None:
        quality.append(_block_check(errors, request.max_block_error))
    checks = [*quality, _size(request, artifact.manifest, baseline.manifest)]
    if request.max_latency_ratio is not None and baseline.graphs is not None:
        checks.append(_latency(request, request.max_latency_ratio, artifact.graphs, baseline.graphs, reporter))
    return CheckReport(
        artifact=artifact.label,
        baseline=baseline.label,
        data=data,
        checks=checks,
        worst_block=None if all(item.passed for item in quality) else _worst_block(errors, artifact, baseline),
    )


def check_table(report: CheckReport) -> Table:
    """Table of all checks, with their limits and verdicts."""
    table = Table(title=f"{report.artifact} against {report.baseline}", title_justify="left")
    table.add_column("check")
    for column in ("baseline", "artifact", "value", "limit"):
        table.add_column(column, justify="right")
    table.add_column("verdict")
    table.add_column("", overflow="fold")
    for item in report.checks:
        table.add_row(
            item.name,
            _figure(item, item.baseline),
            _figure(item, item.artifact),
            f"{item.value:.4g} {item.unit}",
            "-" if item.limit is None else f"{item.limit:g}",
            "reported" if item.limit is None else "ok" if item.passed else "FAILED",
            item.note,
        )
    return table


def _party(path: Path) -> _Party:
    if path.is_file():
        manifest = read_manifest_file(path)
        return _Party(f"{manifest.name} (manifest)", manifest, None)
    return _Party(path.resolve().name, read_manifest(path), path)


def _check_request(request: CheckRequest, artifact: _Party, baseline: _Party) -> None:
    """Refuse limits that cannot be checked on these two artifacts, before any work starts."""
    for party in (artifact, baseline):
        if request.max_block_error is not None and not party.is_graphs:
            raise BadInputError(
                f"--max-block-error needs an artifact that can be cut into blocks, and {party.label} for {party.manifest.target} cannot: "
                "use --max-kl"
            )
    if baseline.graphs is not None:
        return
    limits = {
        "--max-kl": request.max_kl,
        "--max-block-error": request.max_block_error,
        "--max-latency-ratio": request.max_latency_ratio,
    }
    for name, limit in limits.items():
        if limit is not None:
            raise BadInputError(
                f"{name} needs the baseline's graphs, and {request.baseline} has none: give the folder of the baseline"
            )


def _quality(request: CheckRequest, artifact: _Party, baseline: _Party, reporter: Reporter) -> tuple[str, list[Check]]:
    """Check every score; returns where the samples are from, and the checks."""
    evaluated = _evaluated_scores(request, artifact, baseline, reporter)
    if evaluated is not None:
        source, before, after = evaluated
        return source, [_paired_check(name, before[name], after[name], request.max_drop) for name in before]
    source = request.data or "scenes"
    if baseline.graphs is not None:
        assert request.samples != "auto"
        was, now = (_exact_matches(request, party, source, request.samples, reporter) for party in (baseline, artifact))
        found = _paired_check("exact_match", was, now, request.max_drop)
        if source == "scenes" and np.mean(was) < LEAST_ACCURACY:
            found = found.model_copy(
                update={
                    "limit": None,
                    "passed": True,
                    "note": f"not judged by scenes, of which the baseline answers {np.mean(was):.0%}",
                }
            )
        return f"{len(now)} samples of {source}, answered now", [found]
    return _unpaired(request, artifact, baseline, reporter)


def _evaluated_scores(
    request: CheckRequest, artifact: _Party, baseline: _Party, reporter: Reporter
) -> tuple[str, dict[str, list[float]], dict[str, list[float]]] | None:
    """The scores of both by metric, and where they are from; None unless both were evaluated on the requested data."""
    first, second = _evaluation(baseline, reporter), _evaluation(artifact, reporter)
    if first is None or second is None or first.data.digest != second.data.digest:
        return None
    if request.data is not None:
        asked, _questions = load_questions(request.data, first.data.samples, first.data.seed)
        if asked.digest != first.data.digest:
            return None
    predictions = [_predictions(party) for party in (baseline, artifact)]
    if [item.id for item in predictions[0]] != [item.id for item in predictions[1]]:
        raise BadInputError(
            f"the evaluations of {baseline.label} and {artifact.label} are on the same data set, but on different samples: "
            "evaluate both again"
        )
    names = set.intersection(*({*item.scores} for side in predictions for item in side)) - _NO_QUALITY
    if not names:
        return None
    before, after = ({name: [item.scores[name] for item in side] for name in sorted(names)} for side in predictions)
    return f"{len(predictions[0])} samples of {first.data.source}, from both evaluations", before, after


def _evaluation(party: _Party, reporter: Reporter) -> Evaluation | None:
    """The evaluation in an artifact's folder; None if there is none, or if it is of another build of the artifact."""
    if party.folder is None or not (party.folder / EVALUATION_FOLDER).is_dir():
        return None
    evaluation = read_evaluation(party.folder / EVALUATION_FOLDER)
    if evaluation.manifest_sha256 != manifest_digest(party.manifest):
        reporter.log(f"{party.label}: its evaluation is of another build and is not used")
        return None
    return evaluation


def _predictions(party: _Party) -> list[Prediction]:
    assert party.folder is not None
    return list(read_predictions(party.folder / EVALUATION_FOLDER))


def _exact_matches(request: CheckRequest, party: _Party, data: str, samples: int, reporter: Reporter) -> list[float]:
    """Let an artifact answer now; returns 1 for each answer that matches its reference exactly, else 0."""
    assert party.folder is not None
    with scratch_folder() as temporary:
        # A temporary store: the user's store could have answers of the artifact from before a file was damaged.
        asked = EvaluationRequest(
            party.folder,
            checkpoint="",
            data=data,
            samples=samples,
            metrics=("exact_match",),
            output=Path(temporary) / EVALUATION_FOLDER,
            block_samples=0,
            store=Path(temporary) / "store",
            device=request.device,
            ov_config=request.ov_config,
            cache_dir=request.cache_dir,
        )
        reporter.log(f"{party.label} ...")
        evaluate(asked, reporter)
        return [item.scores["exact_match"] for item in read_predictions(asked.results)]


def _paired_check(name: str, before: list[float], after: list[float], limit: float) -> Check:
    test = compare_paired(before, after)
    drop = round(100 * test.drop, 6)
    verdict = "no drop"
    if drop > 0:
        verdict = f"the drop is {'' if test.larger_than_chance else 'not '}larger than chance"
    return Check(
        name=name,
        baseline=float(np.mean(before)),
        artifact=float(np.mean(after)),
        value=drop,
        unit="points",
        limit=limit,
        passed=drop <= limit,
        test=TestRecord(
            method=test.method,
            samples=test.samples,
            lost=test.lost,
            gained=test.gained,
            p_value=test.p_value,
            larger_than_chance=test.larger_than_chance,
        ),
        note=f"{verdict}: {test.method}, n = {test.samples}, {test.lost} lost, {test.gained} gained, p = {test.p_value:.2g}; "
        f"the smallest drop that so many samples can show is {test.smallest_drop * 100:.2g} points",
    )


def _unpaired(request: CheckRequest, artifact: _Party, baseline: _Party, reporter: Reporter) -> tuple[str, list[Check]]:
    """Compare the accuracy figure of a manifest with the accuracy of the artifact on as many scenes."""
    figure = next((item for item in baseline.manifest.validation if item.metric == "exact_match"), None)
    if figure is None:
        raise BadInputError(
            f"{request.baseline} has neither graphs nor an exact_match figure: "
            "give the folder of the baseline, or convert the baseline with validation"
        )
    if request.data not in (None, "scenes"):
        raise BadInputError(
            f"the figure in {request.baseline} was measured on scenes, not on {request.data}: "
            "give the folder of the baseline, or leave out --data"
        )
    value = round(float(np.mean(_exact_matches(request, artifact, "scenes", figure.samples, reporter))), 6)
    drop = round(100 * (figure.value - value), 6)
    found = Check(
        name="exact_match",
        baseline=figure.value,
        artifact=value,
        value=drop,
        unit="points",
        limit=request.max_drop,
        passed=drop <= request.max_drop,
        test=None,
        note=f"unpaired: the manifest has one figure over {figure.samples} samples, so chance is not tested",
    )
    return f"{figure.samples} samples of scenes, answered now, compared with the figure in the manifest", [found]


def _divergence(
    request: CheckRequest, limit: float, artifact: Path, baseline: Path, reporter: Reporter, texts: bool
) -> Check:
    """Check the KL divergence of the artifact's next tokens from the baseline's, along the baseline's answers.

    Args:
        request: what is compared.
        limit: maximum that passes.
        artifact: folder of the artifact.
        baseline: folder of the baseline.
        reporter: shows progress.
        texts: whether held-out questions about photos and without images are asked instead of those about scenes.
    """
    assert request.samples != "auto"
    source = "mixed" if texts and request.data is None else request.data or "scenes"
    _samples, questions = load_questions(source, request.samples, seed=0)
    batches = list(in_batches(questions, _BATCH))
    first, second = (
        open_runner(folder, request.device, request.ov_config, request.cache_dir) for folder in (baseline, artifact)
    )
    family = first.family
    processor = family.load_processor(baseline)
    values = []
    with reporter.stage("KL from the baseline", len(batches)) as step:
        for asked in batches:
            processed = family.prompt_inputs(
                processor, [question.sample.images for question in asked], [question.prompt for question in asked]
            )
            expected = greedy(first, processed, first.ends, _STEPS)
            logits = forced_logits(second, processed, expected.tokens)
            values.append(kl_divergence(expected.logits, logits)[expected.valid])
            step(f"{sum(map(len, values))} tokens")
    tokens = np.concatenate(values)
    kl = float(f"{tokens.mean():.6g}")
    return Check(
        name="kl",
        baseline=None,
        artifact=None,
        value=kl,
        unit="nats",
        limit=limit,
        passed=kl <= limit,
        test=None,
        note=f"mean over {len(tokens)} tokens of the baseline's answers to {len(questions)} samples of {source}",
    )


def _size(request: CheckRequest, artifact: Manifest, baseline: Manifest) -> Check:
    before, after = (
        sum(file.size for component in manifest.components for file in component.files)
        for manifest in (baseline, artifact)
    )
    ratio = round(after / before, 6)
    limit = request.max_size_ratio
    return Check(
        name="size",
        baseline=before,
        artifact=after,
        value=ratio,
        unit="x",
        limit=limit,
        passed=limit is None or ratio <= limit,
        test=None,
        note="bytes of the component files in the manifests",
    )


def _latency(request: CheckRequest, limit: float, artifact: Path, baseline: Path, reporter: Reporter) -> Check:
    asked = BenchRequest(
        artifact,
        new_tokens=_LATENCY_TOKENS,
        baseline=baseline,
        device=request.device,
        ov_config=request.ov_config,
        cache_dir=request.cache_dir,
    )
    measured = bench(asked, reporter)
    assert measured.baseline_rows is not None
    before, after = measured.baseline_rows[0].per_token_ms.median, measured.rows[0].per_token_ms.median
    ratio = round(after / before, 6)
    return Check(
        name="latency",
        baseline=before,
        artifact=after,
        value=ratio,
        unit="x",
        limit=limit,
        passed=ratio <= limit,
        test=None,
        note=f"ms per token over {_LATENCY_TOKENS} tokens, median of {asked.repeats} repeats that alternate with the baseline's",
    )


def _block_errors(request: CheckRequest, artifact: _Party, baseline: _Party, reporter: Reporter) -> list[BlockError]:
    """Compare each block of the artifact with the baseline's block, on the baseline's activations."""
    assert artifact.folder is not None
    assert baseline.folder is not None
    samples = load_samples(request.data or "scenes", _BLOCK_SAMPLES, split=Split.TEST)
    total = sum(len(component.blocks) for component in artifact.manifest.components)
    with reporter.stage("comparing blocks with the baseline", total) as step:
        return block_errors(artifact.folder, baseline.folder, samples, step)


def _block_check(errors: list[BlockError], limit: float) -> Check:
    worst = max(errors, key=lambda item: item.relative_error)
    return Check(
        name="block_error",
        baseline=None,
        artifact=None,
        value=worst.relative_error,
        unit="relative",
        limit=limit,
        passed=worst.relative_error <= limit,
        test=None,
        note=f"largest of {len(errors)} blocks, on {_BLOCK_SAMPLES} samples: {worst.component}, {worst.block}",
    )


def _worst_block(errors: list[BlockError], artifact: _Party, baseline: _Party) -> str | None:
    """The block that differs most from the baseline's block; None if nothing is known about blocks.

    Without `errors`, it is the block whose error has grown most between the two evaluations.
    """
    if errors:
        most = max(errors, key=lambda item: item.relative_error)
        return f"{most.component}, {most.block} (relative error {most.relative_error:.2g} compared with the baseline)"
    known: list[dict[tuple[str, str], float]] = []
    for party in (artifact, baseline):
        folder = party.folder / EVALUATION_FOLDER if party.folder else None
        blocks = read_evaluation(folder).blocks if folder and folder.is_dir() else []
        known.append({(item.component, item.block): item.relative_error for item in blocks})
    mine, other = known
    if not mine:
        return None
    component, block = worst = max(mine, key=lambda key: mine[key] - other.get(key, 0.0))
    before = f", {other[worst]:.2g} in the baseline" if worst in other else ""
    return f"{component}, {block} (relative error {mine[worst]:.2g}{before})"


def _figure(item: Check, value: float | None) -> str:
    if value is None:
        return "-"
    if item.name == "size":
        return format_size(value)
    return f"{value:.2%}" if item.unit == "points" else f"{value:.4g}"
