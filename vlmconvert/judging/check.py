"""Comparing an artifact with a baseline on the same samples, and each figure with its limit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
from rich.table import Table

from calibration.scenes import Split
from calibration.sources import load_samples
from manifests.check_report import Check, CheckReport
from manifests.errors import BadInputError
from manifests.evaluation import EVALUATION_FOLDER, BlockError, read_evaluation
from manifests.model import Manifest
from passes.validate.comparison import kl_divergence
from passes.validate.greedy import forced_logits, greedy
from vlmconvert.console import Reporter, format_size
from vlmconvert.judging.limits import enough_samples, usual_kl
from vlmconvert.judging.request import CheckRequest, Party, check_limits, open_party
from vlmconvert.judging.scores import compare_scores
from vlmconvert.measuring.bench import BenchRequest, bench
from vlmconvert.measuring.blocks import block_errors
from vlmconvert.measuring.questions import in_batches, load_questions
from vlmconvert.running.open import open_runner

__all__ = ["check", "check_table"]

_BATCH = 25
_STEPS = 16  # maximum number of tokens of an answer, as in validation
_LATENCY_TOKENS = 32
_BLOCK_SAMPLES = 4


def check(request: CheckRequest, reporter: Reporter) -> CheckReport:
    """Compare an artifact with a baseline.

    Raises:
        BadInputError: if one of the two is not an artifact, or a limit needs something that the baseline does not have.
    """
    artifact, baseline = open_party(request.folder), open_party(request.baseline)
    if artifact.graphs is None:
        raise BadInputError(f"{request.folder} lacks files that its manifest names: convert the checkpoint again")
    check_limits(request, artifact, baseline)
    if request.samples == "auto":
        request = replace(request, samples=enough_samples(request.max_drop))
    data, quality = compare_scores(request, artifact, baseline, reporter)
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


def _block_errors(request: CheckRequest, artifact: Party, baseline: Party, reporter: Reporter) -> list[BlockError]:
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


def _worst_block(errors: list[BlockError], artifact: Party, baseline: Party) -> str | None:
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
