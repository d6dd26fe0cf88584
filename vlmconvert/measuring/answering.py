"""Answers of checkpoint and artifact to the same questions; the store keeps those of each batch."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np

from calibration.sources import SampleSet
from manifests.files import file_record, read_json
from manifests.io import manifest_digest
from manifests.model import Manifest
from passes.store import Store, digest, library_versions
from passes.validate.answers import Distances, distances, read_greedy, write_greedy
from passes.validate.greedy import Greedy, greedy
from vlmconvert.console import Reporter
from vlmconvert.conversion.reference import reference_model
from vlmconvert.families.base import Family
from vlmconvert.measuring.checkpoint import MeasuredCheckpoint
from vlmconvert.measuring.questions import Question
from vlmconvert.targets.runner import ArtifactRunner

__all__ = ["Answered", "Answering", "Batch", "Prompts"]

_VERSION = 1
_FILE = "answers"


@dataclass(frozen=True)
class Batch:
    """Questions that are answered together."""

    source: SampleSet
    questions: Sequence[Question]

    @property
    def digest(self) -> str:
        samples = replace(self.source, samples=tuple(question.sample for question in self.questions))
        return digest(samples.digest, [question.prompt for question in self.questions])


@dataclass(frozen=True)
class Prompts:
    """Turns questions into the model's inputs, and tokens into texts, with the artifact's own processor.

    Attributes:
        family: family of the model.
        processor: processor of the artifact.
        ends: ids of the tokens that end an answer.
    """

    family: Family
    processor: Any
    ends: list[int]

    def inputs(self, batch: Batch) -> dict[str, np.ndarray]:
        """The processor's outputs for the questions of a batch and their images."""
        images = [question.sample.images for question in batch.questions]
        return self.family.prompt_inputs(self.processor, images, [question.prompt for question in batch.questions])

    def texts(self, said: Greedy) -> list[str]:
        """The answers as texts."""
        tokens = np.where(said.valid, said.tokens, self.ends[0])
        texts: list[str] = self.processor.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return [text.strip() for text in texts]


@dataclass(frozen=True)
class Answered:
    """The artifact's answers to a batch and, with a checkpoint, how far they are from the checkpoint's answers."""

    answers: list[str]
    distances: Distances | None


@dataclass(frozen=True)
class Answering:
    """How questions are answered, and where the answers are kept.

    Attributes:
        prompts: turns questions into inputs.
        max_new_tokens: maximum number of tokens of an answer.
        store: keeps the answers.
        reporter: shows progress.
    """

    prompts: Prompts
    max_new_tokens: int
    store: Store
    reporter: Reporter

    def by_checkpoint(self, checkpoint: MeasuredCheckpoint, manifest: Manifest, batches: Sequence[Batch]) -> list[Path]:
        """Let the checkpoint answer; returns for each batch a file with the answers and their logits.

        Args:
            checkpoint: the checkpoint.
            manifest: of the artifact that answers beside it, and takes memory too.
            batches: the questions.
        """
        weights = sum(file.size for part in manifest.components for file in part.files)
        model = cache(lambda: reference_model(checkpoint.model, weights))
        files = []
        with self.reporter.stage("checkpoint: answering", len(batches)) as step:
            for batch in batches:
                key = digest(
                    "reference answers",
                    _VERSION,
                    checkpoint.identity,
                    checkpoint.processor_digest,
                    batch.digest,
                    self.max_new_tokens,
                )

                def make(folder: Path, batch: Batch = batch) -> None:
                    said = greedy(model(), self.prompts.inputs(batch), self.prompts.ends, self.max_new_tokens)
                    write_greedy(said, folder / _FILE)

                files.append(self.store.get_or_make(key, make, "answers of a checkpoint") / _FILE)
                step(f"{len(batch.questions)} questions")
        return files

    def by_artifact(
        self,
        folder: Path,
        manifest: Manifest,
        opened: Callable[[], ArtifactRunner],
        settings: Sequence[Any],
        batches: Sequence[Batch],
        reference: list[Path] | None,
    ) -> list[Answered]:
        """Let the artifact answer, and compare it with the checkpoint along the checkpoint's answers.

        Args:
            folder: the artifact.
            manifest: its manifest.
            opened: opens it; called if the store lacks an answer.
            settings: what the answers depend on in its runtime.
            batches: the questions.
            reference: what `by_checkpoint` returned; None without a checkpoint.
        """
        # The files are hashed again: with the hashes in the manifest, an artifact that was damaged later would get the answers
        # that the store keeps of the intact one.
        files = [
            file_record(folder / record.path, folder).sha256
            for component in manifest.components
            for record in component.files
        ]
        runner = cache(opened)
        answered = []
        with self.reporter.stage("artifact: answering", len(batches)) as step:
            for batch, file in zip(batches, reference or repeat(None), strict=False):
                key = digest(
                    "artifact answers",
                    _VERSION,
                    manifest_digest(manifest),
                    files,
                    *settings,
                    batch.digest,
                    self.max_new_tokens,
                    file and file.parent.name,
                    library_versions(),
                )

                def make(output: Path, batch: Batch = batch, file: Path | None = file) -> None:
                    processed = self.prompts.inputs(batch)
                    said = greedy(runner(), processed, self.prompts.ends, self.max_new_tokens)
                    found = distances(read_greedy(file), runner(), processed) if file else None
                    kept = {"answers": self.prompts.texts(said), "distances": found and found.lists()}
                    (output / _FILE).write_text(json.dumps(kept), encoding="utf-8")

                entry = self.store.get_or_make(key, make, f"answers of {folder.name}")
                kept = read_json(entry / _FILE, f"delete {entry}")
                found = kept["distances"]
                answered.append(Answered(kept["answers"], found and Distances.of_lists(found)))
                step(f"{len(batch.questions)} questions")
        return answered
