"""Measuring an artifact on data, and comparing it with the checkpoint that it was made from."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import groupby, islice, repeat
from pathlib import Path
from typing import Any

import numpy as np

from calibration.scenes import Split
from calibration.sources import Sample, SampleSet, load_samples
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
from manifests.files import file_record, read_json, write_atomically
from manifests.io import manifest_digest, read_manifest
from manifests.model import Manifest
from passes.store import Store, digest, library_versions
from passes.validate.answers import Distances, distances, read_greedy, write_greedy
from passes.validate.greedy import Greedy, greedy
from passes.validate.metrics import METRICS as TEXTS
from passes.validate.metrics import metric
from passes.validate.vqa import evalai
from vlmconvert.console import Reporter
from vlmconvert.conversion.publish import check_results, replace_folder, staging
from vlmconvert.conversion.reference import reference_model
from vlmconvert.families import load_family
from vlmconvert.families.base import Family
from vlmconvert.measuring.blocks import artifact_blocks, block_errors
from vlmconvert.measuring.checkpoint import MeasuredCheckpoint, open_checkpoint_of
from vlmconvert.running.open import open_runner
from vlmconvert.targets import load_target

__all__ = [
    "DEFAULT_METRICS",
    "METRICS",
    "TEXT_METRICS",
    "EvaluationRequest",
    "Question",
    "evaluate",
    "in_batches",
    "load_questions",
]

# Metrics that compare tokens and probabilities of artifact and checkpoint; the others compare texts with references.
_DISTANCES = ("token_agreement", "kl", "perplexity")
TEXT_METRICS = tuple(TEXTS)
METRICS = (*TEXT_METRICS, *_DISTANCES)
DEFAULT_METRICS = ("exact_match", *_DISTANCES)
_VERSION = 1
_ANSWERS = "answers"
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


@dataclass(frozen=True)
class Question:
    """A question about one sample, and its correct answers."""

    sample: Sample
    prompt: str
    references: tuple[str, ...]


def load_questions(data: str, count: int, seed: int) -> tuple[SampleSet, list[Question]]:
    """Load held-out samples, and the first question of each of them.

    Args:
        data: source of the samples, as in `calibration.sources.load_samples`.
        count: maximum number of samples.
        seed: seed that selects the samples.

    Raises:
        BadInputError: if the source is unknown, empty or unreadable.
    """
    samples = load_samples(data, count, seed, Split.TEST)
    questions = []
    samples = replace(samples, samples=tuple(sample.without_video() for sample in samples.samples))
    for sample in samples.samples:
        prompt, answer = sample.turns[0]
        references = sample.references if len(sample.turns) == 1 else (answer,)
        questions.append(Question(sample, prompt, references))
    return samples, questions


def in_batches(questions: Sequence[Question], most: int) -> Iterator[list[Question]]:
    """Yield batches of at most `most` questions, which processors take together since they have as many images."""
    for _, group in groupby(questions, key=lambda question: len(question.sample.pictures)):
        left = iter(group)
        while batch := list(islice(left, most)):
            yield batch


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
    prompts = _Prompts(family, family.load_processor(request.folder), family.end_tokens(request.folder))
    batches = [_Batch(samples, batch) for batch in in_batches(questions, request.batch)]
    reference = _answer_checkpoint(request, checkpoint, batches, prompts, store, reporter) if checkpoint else None
    answered = _answer_artifact(request, manifest, batches, reference, store, prompts, reporter)
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


@dataclass(frozen=True)
class _Batch:
    """Questions that are answered together."""

    source: SampleSet
    questions: Sequence[Question]

    @property
    def digest(self) -> str:
        samples = replace(self.source, samples=tuple(question.sample for question in self.questions))
        return digest(samples.digest, [question.prompt for question in self.questions])


@dataclass(frozen=True)
class _Prompts:
    """Turns questions into the model's inputs, and tokens into texts, with the artifact's own processor.

    Attributes:
        family: family of the model.
        processor: processor of the artifact.
        ends: ids of the tokens that end an answer.
    """

    family: Family
    processor: Any
    ends: list[int]

    def inputs(self, batch: _Batch) -> dict[str, np.ndarray]:
        """The processor's outputs for the questions of a batch and their images."""
        images = [question.sample.images for question in batch.questions]
        return self.family.prompt_inputs(self.processor, images, [question.prompt for question in batch.questions])

    def texts(self, said: Greedy) -> list[str]:
        """The answers as texts."""
        tokens = np.where(said.valid, said.tokens, self.ends[0])
        texts: list[str] = self.processor.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return [text.strip() for text in texts]


@dataclass(frozen=True)
class _Answered:
    """The artifact's answers to a batch and, with a checkpoint, how far they are from the checkpoint's answers."""

    answers: list[str]
    distances: Distances | None


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
        (folder / _ANSWERS).write_text(json.dumps([item.model_dump() for item in errors]), encoding="utf-8")

    kept = store.get_or_make(key, make, f"error of each block of {request.folder.name}") / _ANSWERS
    return [BlockError(**item) for item in read_json(kept, f"delete {kept.parent}")]


def _answer_checkpoint(
    request: EvaluationRequest,
    checkpoint: MeasuredCheckpoint,
    batches: list[_Batch],
    prompts: _Prompts,
    store: Store,
    reporter: Reporter,
) -> list[Path]:
    """Let the checkpoint answer; returns for each batch a file with the answers and their logits."""
    weights = sum(file.size for part in read_manifest(request.folder).components for file in part.files)
    model = cache(lambda: reference_model(checkpoint.model, weights))
    files = []
    with reporter.stage("checkpoint: answering", len(batches)) as step:
        for batch in batches:
            key = digest(
                "reference answers",
                _VERSION,
                checkpoint.identity,
                checkpoint.processor_digest,
                batch.digest,
                request.max_new_tokens,
            )

            def make(folder: Path, batch: _Batch = batch) -> None:
                said = greedy(model(), prompts.inputs(batch), prompts.ends, request.max_new_tokens)
                write_greedy(said, folder / _ANSWERS)

            files.append(store.get_or_make(key, make, "answers of a checkpoint") / _ANSWERS)
            step(f"{len(batch.questions)} questions")
    return files


def _answer_artifact(
    request: EvaluationRequest,
    manifest: Manifest,
    batches: list[_Batch],
    reference: list[Path] | None,
    store: Store,
    prompts: _Prompts,
    reporter: Reporter,
) -> list[_Answered]:
    # The files are hashed again: with the hashes in the manifest, an artifact that was damaged later would get the answers
    # that the store keeps of the intact one.
    files = [
        file_record(request.folder / record.path, request.folder).sha256
        for component in manifest.components
        for record in component.files
    ]
    runner = cache(lambda: open_runner(request.folder, request.device, request.ov_config, request.cache_dir))
    answered = []
    with reporter.stage("artifact: answering", len(batches)) as step:
        for batch, file in zip(batches, reference or repeat(None), strict=False):
            key = digest(
                "artifact answers",
                _VERSION,
                manifest_digest(manifest),
                files,
                request.device,
                sorted(request.ov_config.items()),
                batch.digest,
                request.max_new_tokens,
                file and file.parent.name,
                library_versions(),
            )

            def make(folder: Path, batch: _Batch = batch, file: Path | None = file) -> None:
                processed = prompts.inputs(batch)
                said = greedy(runner(), processed, prompts.ends, request.max_new_tokens)
                found = distances(read_greedy(file), runner(), processed) if file else None
                kept = {"answers": prompts.texts(said), "distances": found and found.lists()}
                (folder / _ANSWERS).write_text(json.dumps(kept), encoding="utf-8")

            entry = store.get_or_make(key, make, f"answers of {request.folder.name}")
            kept = read_json(entry / _ANSWERS, f"delete {entry}")
            found = kept["distances"]
            answered.append(_Answered(kept["answers"], found and Distances.of_lists(found)))
            step(f"{len(batch.questions)} questions")
    return answered


def _predictions(
    request: EvaluationRequest,
    batches: list[_Batch],
    answered: list[_Answered],
    reference: list[Path] | None,
    prompts: _Prompts,
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


def _figures(names: Sequence[str], predictions: list[Prediction], answered: list[_Answered]) -> list[Figure]:
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
