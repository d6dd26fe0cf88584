"""Measuring an artifact on data, and comparing it with the checkpoint that it was made from."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from calibration.sources import SampleSet
from manifests.errors import BadInputError
from manifests.evaluation import (
    EVALUATION_FOLDER,
    IMAGES_FOLDER,
    BlockError,
    DataRecord,
    Evaluation,
    Figure,
    Prediction,
    write_evaluation,
)
from manifests.files import read_json, write_atomically
from manifests.io import manifest_digest, read_manifest
from passes.store import Store, digest, library_versions
from passes.validate.answers import Distances, read_greedy
from passes.validate.metrics import METRICS as TEXTS
from passes.validate.metrics import metric
from passes.validate.vqa import evalai
from vlmconvert.console import Reporter
from vlmconvert.conversion.publish import check_results, replace_folder, staging
from vlmconvert.families import load_family
from vlmconvert.measuring.answering import Answered, Answering, Batch, Prompts
from vlmconvert.measuring.blocks import artifact_blocks, block_errors
from vlmconvert.measuring.checkpoint import MeasuredCheckpoint, open_checkpoint_of
from vlmconvert.measuring.questions import Question, in_batches, load_questions
from vlmconvert.running.open import open_runner
from vlmconvert.targets import load_target

__all__ = [
    "DEFAULT_METRICS",
    "METRICS",
    "TEXT_METRICS",
    "EvaluationRequest",
    "evaluate",
]

# Metrics that compare tokens and probabilities of artifact and checkpoint; the others compare texts with references.
_DISTANCES = ("token_agreement", "kl", "perplexity")
TEXT_METRICS = tuple(TEXTS)
METRICS = (*TEXT_METRICS, *_DISTANCES)
DEFAULT_METRICS = ("exact_match", *_DISTANCES)
_VERSION = 1
_ERRORS = "answers"
_THUMBNAIL = 320  # maximum width and height in pixels


@dataclass(frozen=True)
class EvaluationRequest:
    """One evaluation.

    Attributes:
        folder: the artifact.
        checkpoint: local folder or hub id; None takes the checkpoint that the manifest names, "" leaves the checkpoint
            out.
        data: source of the questions, as in `calibration.sources.load_samples`.
        samples: maximum number of questions.
        seed: seed that selects the questions.
        metrics: names of metrics, from `METRICS`.
        max_new_tokens: maximum number of tokens of an answer.
        batch: number of questions that are answered together.
        output: folder for the results; None is the folder `evaluation` in the artifact.
        evalai: file for the answers in the format of EvalAI.
        block_samples: number of samples on which the error of each block is measured, 0 to leave it out.
        store: folder where answers are kept.
        device: device of the artifact's runtime.
        ov_config: options of that runtime.
        cache_dir: folder where OpenVINO keeps compiled models.
        token: access token for a gated hub id.
    """

    folder: Path
    checkpoint: str | None = None
    data: str = "scenes"
    samples: int = 200
    seed: int = 0
    metrics: tuple[str, ...] = DEFAULT_METRICS
    max_new_tokens: int = 32
    batch: int = 25
    output: Path | None = None
    evalai: Path | None = None
    block_samples: int = 8
    store: Path = Path()
    device: str = "CPU"
    ov_config: Mapping[str, str] = field(default_factory=dict)
    cache_dir: Path | None = None
    token: str | None = None

    @property
    def results(self) -> Path:
        """The folder of the results."""
        return self.output or self.folder / EVALUATION_FOLDER


def evaluate(request: EvaluationRequest, reporter: Reporter) -> Evaluation:
    """Let artifact and checkpoint answer all questions, compare the answers, and write the results.

    The store keeps the answers of each batch, so that a run that was killed continues where it stopped, and the
    checkpoint answers the same questions only once for all of its artifacts.

    Raises:
        BadInputError: if the artifact, the checkpoint, the data or a metric cannot be used.
    """
    unknown = [name for name in request.metrics if name not in METRICS]
    if unknown:
        raise BadInputError(f"metric {unknown[0]} is unknown: use {', '.join(METRICS)}")
    manifest = read_manifest(request.folder)
    check_results(request.results)
    store = Store(request.store)
    samples, questions = load_questions(request.data, request.samples, request.seed)
    texts = [name for name in request.metrics if name in TEXT_METRICS]
    if texts and not all(question.references for question in questions):
        raise BadInputError(
            f"{request.data} has questions without reference answers: leave out the metrics {', '.join(texts)}"
        )
    checkpoint = (
        None
        if request.checkpoint == ""
        else open_checkpoint_of(request.folder, manifest, request.checkpoint, request.token, store, reporter)
    )
    if checkpoint is None and (needless := [name for name in request.metrics if name in _DISTANCES]):
        raise BadInputError(f"metrics {', '.join(needless)} need the checkpoint: give --checkpoint, or leave them out")

    family = load_family(manifest.family)
    prompts = Prompts(family, family.load_processor(request.folder), family.end_tokens(request.folder))
    batches = [Batch(samples, batch) for batch in in_batches(questions, request.batch)]
    answering = Answering(prompts, request.max_new_tokens, store, reporter)
    reference = answering.by_checkpoint(checkpoint, manifest, batches) if checkpoint else None
    answered = answering.by_artifact(
        request.folder,
        manifest,
        lambda: open_runner(request.folder, request.device, request.ov_config, request.cache_dir),
        (request.device, sorted(request.ov_config.items())),
        batches,
        reference,
    )
    predictions = list(_predictions(request, batches, answered, reference, prompts))
    evaluation = Evaluation(
        artifact=manifest.name,
        manifest_sha256=manifest_digest(manifest),
        data=DataRecord(
            source=samples.source,
            revision=samples.revision,
            seed=samples.seed,
            samples=len(questions),
            digest=samples.digest,
        ),
        figures=_figures(request.metrics, predictions, answered),
        blocks=_block_errors(request, checkpoint, samples, store, reporter) if checkpoint else [],
        environment=library_versions(*load_target(manifest.target).distributions),
    )
    _write(evaluation, predictions, questions, request.results)
    if request.evalai is not None:
        write_atomically(request.evalai, json.dumps(evalai(predictions)) + "\n")
    return evaluation


def _block_errors(
    request: EvaluationRequest,
    checkpoint: MeasuredCheckpoint,
    samples: SampleSet,
    store: Store,
    reporter: Reporter,
) -> list[BlockError]:
    """Compare each block with the checkpoint's block on the first samples; the store keeps the result."""
    manifest = read_manifest(request.folder)
    if not request.block_samples or artifact_blocks(request.folder, manifest) is None:
        return []
    few = samples.first(request.block_samples)
    key = digest(
        "block errors", _VERSION, manifest_digest(manifest), checkpoint.identity, few.digest, library_versions()
    )
    total = sum(len(component.blocks) for component in checkpoint.model.components)

    def make(folder: Path) -> None:
        with reporter.stage("error of each block", total) as step:
            errors = block_errors(request.folder, checkpoint.folder, few, step)
        (folder / _ERRORS).write_text(json.dumps([item.model_dump() for item in errors]), encoding="utf-8")

    kept = store.get_or_make(key, make, f"error of each block of {request.folder.name}") / _ERRORS
    return [BlockError(**item) for item in read_json(kept, f"delete {kept.parent}")]


def _predictions(
    request: EvaluationRequest,
    batches: list[Batch],
    answered: list[Answered],
    reference: list[Path] | None,
    prompts: Prompts,
) -> Iterator[Prediction]:
    """Yield for each question its answers, with their scores on every metric that has a score for each question."""
    questions = [question for batch in batches for question in batch.questions]
    answers = [answer for batch in answered for answer in batch.answers]
    checkpoint_answers = (
        [text for file in reference for text in prompts.texts(read_greedy(file))] if reference else None
    )
    references = [list(question.references) for question in questions]
    names = [name for name in request.metrics if name in TEXT_METRICS]
    scores = {name: metric(name).score(answers, references)[1] for name in names}
    checkpoint_scores = {
        name: metric(name).score(checkpoint_answers, references)[1] for name in names if checkpoint_answers
    }
    found = [batch.distances for batch in answered if batch.distances]
    if found:
        scores |= {
            name: np.concatenate([getattr(item, attribute) for item in found]).tolist()
            for name, attribute in (("kl", "kl"), ("token_agreement", "agreement"))
            if name in request.metrics
        }
    for index, question in enumerate(questions):
        yield Prediction(
            id=question.sample.id,
            image=question.sample.id,
            prompt=question.prompt,
            references=references[index],
            answer=answers[index],
            checkpoint_answer=checkpoint_answers[index] if checkpoint_answers else None,
            scores={name: values[index] for name, values in scores.items()},
            checkpoint_scores={name: values[index] for name, values in checkpoint_scores.items()},
        )


def _figures(names: Sequence[str], predictions: list[Prediction], answered: list[Answered]) -> list[Figure]:
    """Each metric over all questions; metrics of tokens and probabilities are means over all tokens."""
    answers = [item.answer for item in predictions]
    checkpoint_answers = [item.checkpoint_answer for item in predictions if item.checkpoint_answer is not None]
    references = [item.references for item in predictions]
    found = [batch.distances for batch in answered if batch.distances]
    figures = []
    for name in names:
        if name in TEXT_METRICS:
            value = metric(name).score(answers, references)[0]
            reference = metric(name).score(checkpoint_answers, references)[0] if checkpoint_answers else None
        else:
            value, reference = _token_figure(name, found)
        # Six digits are more than is significant; rounding keeps records equal whose last bits differ.
        figures.append(
            Figure(
                metric=name,
                value=float(f"{value:.6g}"),
                reference=None if reference is None else float(f"{reference:.6g}"),
                samples=len(predictions),
            )
        )
    return figures


def _token_figure(name: str, found: list[Distances]) -> tuple[float, float | None]:
    weights = np.concatenate([item.tokens for item in found])

    def mean(attribute: str) -> float:
        return float(np.average(np.concatenate([getattr(item, attribute) for item in found]), weights=weights))

    if name == "kl":
        return mean("kl"), None
    if name == "token_agreement":
        return mean("agreement"), None
    return math.exp(mean("loss")), math.exp(mean("reference_loss"))


def _write(evaluation: Evaluation, predictions: list[Prediction], questions: list[Question], output: Path) -> None:
    """Write the results to a temporary folder, which takes the place of an older one when it is complete."""
    with staging(output) as staged:
        write_evaluation(evaluation, predictions, staged)
        images = staged / IMAGES_FOLDER
        images.mkdir()
        for number, (item, question) in enumerate(zip(predictions, questions, strict=True)):
            if item.checkpoint_answer not in (None, item.answer) and question.sample.pictures:
                image = question.sample.images[0]
                image.thumbnail((_THUMBNAIL, _THUMBNAIL))
                image.save(images / f"{number}.png")
        check_results(output)
        replace_folder(staged, output)
