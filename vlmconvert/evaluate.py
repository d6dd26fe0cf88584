"""Measuring an artifact on data, beside the checkpoint that it was made from."""

from __future__ import annotations

import json
import math
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np

from calibration.inputs import load_processor, prompt_inputs
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
from manifests.files import file_record, write_atomically
from manifests.io import read_manifest
from manifests.model import Manifest
from passes.checkpoint import fetch_checkpoint, open_checkpoint, read_config
from passes.store import Store, digest, library_versions
from passes.validate.answers import Distances, distances, read_greedy, write_greedy
from passes.validate.greedy import Greedy, greedy
from passes.validate.metrics import METRICS as TEXTS
from passes.validate.metrics import metric
from passes.validate.vqa import evalai
from vlmconvert.artifact import manifest_digest
from vlmconvert.blocks import block_errors
from vlmconvert.console import Reporter
from vlmconvert.families import check_family, demo_checkpoint
from vlmconvert.pipeline import Conversion
from vlmconvert.plan import Options
from vlmconvert.reference import reference_model
from vlmconvert.runtime import end_tokens, open_runner

__all__ = [
    "DEFAULT_METRICS",
    "METRICS",
    "TEXT_METRICS",
    "EvaluationRequest",
    "Question",
    "evaluate",
    "load_questions",
]

# Metrics of the two sides' tokens and probabilities; the others are metrics of texts.
_DISTANCES = ("token_agreement", "kl", "perplexity")
TEXT_METRICS = tuple(TEXTS)
METRICS = (*TEXT_METRICS, *_DISTANCES)
DEFAULT_METRICS = ("exact_match", *_DISTANCES)
_VERSION = 1
_ANSWERS = "answers"
_THUMBNAIL = 320  # pixels


@dataclass(frozen=True)
class EvaluationRequest:
    """One evaluation as the command line asks for it.

    Attributes:
        folder: the artifact.
        checkpoint: folder or hub id; None finds it by the manifest, "" leaves it out.
        data: as in `calibration.sources.load_samples`.
        metrics: names from `METRICS`.
        output: where the results go; the artifact's own `evaluation` folder if None.
        evalai: file for the answers in the form that EvalAI takes.
        block_samples: samples for the error of each block, 0 for none.
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
    """What is asked of one sample, and its right answers."""

    sample: Sample
    prompt: str
    references: tuple[str, ...]


def load_questions(data: str, count: int, seed: int) -> tuple[SampleSet, list[Question]]:
    """Held-out samples with the first question of each.

    Raises:
        BadInputError: if the source is unknown, empty or unreadable, or a sample has no answer.
    """
    samples = load_samples(data, count, seed, Split.TEST)
    questions = []
    for sample in samples.samples:
        prompt, answer = sample.turns[0]
        references = sample.references if len(sample.turns) == 1 else (answer,)
        questions.append(Question(sample, prompt, references))
    return samples, questions


def evaluate(request: EvaluationRequest, reporter: Reporter) -> Evaluation:
    """Answer all questions with both sides, compare, and write `evaluation.json` and `predictions.jsonl`.

    Answers are kept in the store, batch by batch: a run that was killed goes on, and the checkpoint's are never made twice.

    Raises:
        BadInputError: if the artifact, the checkpoint or the data is not what it should be.
    """
    unknown = [name for name in request.metrics if name not in METRICS]
    if unknown:
        raise BadInputError(f"metric {unknown[0]} is unknown: use {', '.join(METRICS)}")
    manifest = read_manifest(request.folder)
    store = Store(request.store)
    samples, questions = load_questions(request.data, request.samples, request.seed)
    texts = [name for name in request.metrics if name in TEXT_METRICS]
    if texts and not all(question.references for question in questions):
        raise BadInputError(f"{request.data} has questions without answers: leave out the metrics {', '.join(texts)}")
    conversion = _open_checkpoint(request, manifest, store, reporter)
    if conversion is None and (needless := [name for name in request.metrics if name in _DISTANCES]):
        raise BadInputError(f"metrics {', '.join(needless)} need the checkpoint: give --checkpoint, or leave them out")

    processor = load_processor(request.folder)
    batches = [
        _Batch(samples, questions[first : first + request.batch]) for first in range(0, len(questions), request.batch)
    ]
    reference = _answer_checkpoint(request, conversion, batches, processor, reporter) if conversion else None
    answered = _answer_artifact(request, manifest, batches, reference, store, processor, reporter)
    predictions = list(_predictions(request, batches, answered, reference, processor))
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
        blocks=_block_errors(request, conversion, samples, reporter) if conversion else [],
        environment=library_versions(),
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

    def process(self, processor: Any) -> dict[str, np.ndarray]:
        """See `prompt_inputs`."""
        images = [question.sample.image for question in self.questions]
        return prompt_inputs(processor, images, [question.prompt for question in self.questions])


@dataclass(frozen=True)
class _Answered:
    """The artifact's answers to a batch and, beside a checkpoint, their distances from it, one of each a question."""

    answers: list[str]
    distances: Distances | None


def _open_checkpoint(
    request: EvaluationRequest, manifest: Manifest, store: Store, reporter: Reporter
) -> Conversion | None:
    """The checkpoint that the artifact was made from, if one was asked for or can be found."""
    model, revision = request.checkpoint, None
    if model == "":
        return None
    if model is None:
        demo = demo_checkpoint(manifest.family)
        if manifest.source.revision is not None:
            model, revision = manifest.source.model, manifest.source.revision
        elif demo is not None and manifest.source.model == demo.name:
            model = str(demo)
        else:
            raise BadInputError(
                f"{request.folder} was made from the folder {manifest.source.model}: say where it is with --checkpoint, "
                "or measure without it with --no-checkpoint"
            )
    folder, revision = fetch_checkpoint(model, revision, request.token)
    check_family(manifest.family, read_config(folder), model)
    checkpoint = open_checkpoint(folder, model if revision else None, revision)
    conversion = Conversion(manifest.family, checkpoint, Options(llm="fp32", vision="fp32"), store, 1, reporter)
    conversion.helper.close()
    expected = {record.path: record for record in manifest.source.files}
    for record in conversion.source_files:
        if expected.get(record.path) not in (record, None):
            raise BadInputError(
                f"{request.folder} was not made from {folder}: {record.path} differs; give the checkpoint that it was made from"
            )
    return conversion


def _block_errors(
    request: EvaluationRequest, conversion: Conversion, samples: SampleSet, reporter: Reporter
) -> list[BlockError]:
    """Each block beside the checkpoint's, on the first samples; kept in the store like the answers."""
    manifest = read_manifest(request.folder)
    if not request.block_samples or manifest.target == "ascend":  # an Ascend artifact has no graphs to cut into blocks
        return []
    few = samples.first(request.block_samples)
    key = digest(
        "block errors", _VERSION, manifest_digest(manifest), conversion.identity, few.digest, library_versions()
    )
    total = sum(len(component.blocks) for component in conversion.components)

    def make(folder: Path) -> None:
        with reporter.stage("error of each block", total) as step:
            errors = block_errors(request.folder, conversion.checkpoint.folder, few, step)
        (folder / _ANSWERS).write_text(json.dumps([item.model_dump() for item in errors]), encoding="utf-8")

    kept = conversion.store.get_or_make(key, make) / _ANSWERS
    return [BlockError(**item) for item in json.loads(kept.read_text(encoding="utf-8"))]


def _answer_checkpoint(
    request: EvaluationRequest, conversion: Conversion, batches: list[_Batch], processor: Any, reporter: Reporter
) -> list[Path]:
    """Files with the checkpoint's answers and logits, one a batch."""
    weights = sum(file.size for part in read_manifest(request.folder).components for file in part.files)
    model = cache(lambda: reference_model(conversion, weights))
    ends = end_tokens(request.folder)
    files = []
    with reporter.stage("checkpoint: answering", len(batches)) as step:
        for batch in batches:
            key = digest(
                "reference answers",
                _VERSION,
                conversion.identity,
                conversion.processor_digest(),
                batch.digest,
                request.max_new_tokens,
            )

            def make(folder: Path, batch: _Batch = batch) -> None:
                said = greedy(model(), batch.process(processor), ends, request.max_new_tokens)
                write_greedy(said, folder / _ANSWERS)

            files.append(conversion.store.get_or_make(key, make) / _ANSWERS)
            step(f"{len(batch.questions)} questions")
    return files


def _answer_artifact(
    request: EvaluationRequest,
    manifest: Manifest,
    batches: list[_Batch],
    reference: list[Path] | None,
    store: Store,
    processor: Any,
    reporter: Reporter,
) -> list[_Answered]:
    # The files as they are: what a manifest says of a damaged one would find the answers of the intact one.
    files = [
        file_record(request.folder / record.path, request.folder).sha256
        for component in manifest.components
        for record in component.files
    ]
    runner = cache(lambda: open_runner(request.folder, request.device, request.ov_config, request.cache_dir))
    ends = end_tokens(request.folder)
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
                processed = batch.process(processor)
                said = greedy(runner(), processed, ends, request.max_new_tokens)
                found = distances(read_greedy(file), runner(), processed) if file else None
                kept = {"answers": _texts(said, ends, processor), "distances": found and found.lists()}
                (folder / _ANSWERS).write_text(json.dumps(kept), encoding="utf-8")

            kept = json.loads((store.get_or_make(key, make) / _ANSWERS).read_text(encoding="utf-8"))
            found = kept["distances"]
            answered.append(_Answered(kept["answers"], found and Distances.of_lists(found)))
            step(f"{len(batch.questions)} questions")
    return answered


def _texts(said: Greedy, ends: list[int], processor: Any) -> list[str]:
    texts = processor.tokenizer.batch_decode(np.where(said.valid, said.tokens, ends[0]), skip_special_tokens=True)
    return [text.strip() for text in texts]


def _predictions(
    request: EvaluationRequest,
    batches: list[_Batch],
    answered: list[_Answered],
    reference: list[Path] | None,
    processor: Any,
) -> Iterator[Prediction]:
    """One for each question, with its scores on every metric of texts."""
    ends = end_tokens(request.folder)
    questions = [question for batch in batches for question in batch.questions]
    answers = [answer for batch in answered for answer in batch.answers]
    checkpoint_answers = (
        [text for file in reference for text in _texts(read_greedy(file), ends, processor)] if reference else None
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
    """Each metric over all questions; those of tokens are means over all tokens."""
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
        # Six digits are more than the figures mean, and keep a record equal where the last bit is not.
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
    """Write the folder whole; one that stood there goes only after the new one is in place."""
    output.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(prefix=f".{output.name}-", dir=output.parent))
    try:
        write_evaluation(evaluation, predictions, staging)
        images = staging / IMAGES_FOLDER
        images.mkdir()
        for number, (item, question) in enumerate(zip(predictions, questions, strict=True)):
            if item.checkpoint_answer not in (None, item.answer):
                image = question.sample.image
                image.thumbnail((_THUMBNAIL, _THUMBNAIL))
                image.save(images / f"{number}.png")
        staging.chmod(0o755)
        if output.exists():
            shutil.rmtree(output)
        staging.rename(output)
    finally:
        shutil.rmtree(staging, ignore_errors=True)
