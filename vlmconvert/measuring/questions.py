"""The questions on which artifacts are measured, and their batches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby, islice

from calibration.scenes import Split
from calibration.sources import Sample, SampleSet, load_samples

__all__ = ["Question", "in_batches", "load_questions"]


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
