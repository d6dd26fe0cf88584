"""Prompts that end with the right answers, for models that are too large to decode token by token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from pathlib import Path

    from calibration.sources.samples import Sample, SampleSet
    from passes.validate.model import Answered
    from vlmconvert.families.base import Family

__all__ = ["answer_places", "answered_batch"]


def answered_batch(family: Family, processor: Any, samples: Sequence[Sample], ends: Sequence[int]) -> Answered:
    """Process the first question about each sample with its answer.

    Args:
        family: family of the model.
        processor: its processor.
        samples: the samples.
        ends: tokens that end an answer.
    """
    from passes.validate.model import Answered

    images = [sample.images for sample in samples]
    turns = [sample.turns[0] for sample in samples]
    asked, said = (
        family.process(
            processor,
            [family.prompt(processor, (turn,), len(own)) for turn, own in zip(both, images, strict=True)],
            images,
        )
        for both in ([(question, None) for question, _ in turns], turns)
    )
    answers = []
    for row in range(len(samples)):
        question, whole = (batch["input_ids"][row][batch["attention_mask"][row] == 1] for batch in (asked, said))
        begin = _begin(question, whole)
        found = np.flatnonzero(np.isin(whole[begin:], ends))
        answers.append((len(whole) - begin, int(found[0]) + 1 if found.size else len(whole) - begin))
    count = max(length for length, _ in answers)
    mask = np.zeros((len(samples), count), bool)
    for row, (length, used) in enumerate(answers):
        mask[row, count - length : count - length + used] = True
    return Answered(said, mask)


def answer_places(folder: Path, samples: SampleSet, family: Family, config: dict[str, Any]) -> list[tuple[int, int]]:
    """First and last (exclusive) position of each sample's last answer; meant for a process of its own, since it imports torch.

    Args:
        folder: the checkpoint, which holds the processor.
        samples: the samples.
        family: family of the model.
        config: the config with every default filled in.
    """
    processor = family.load_processor(folder)
    places = []
    for given in samples.samples:
        sample = given.without_video() if family.video_token(config) is None else given
        images, videos = sample.images, [sample.video] if sample.video else []
        *earlier, (question, _) = sample.turns
        asked, said = (
            family.process(processor, [family.prompt(processor, turns, len(images), len(videos))], [images], [videos])[
                "input_ids"
            ][0]
            for turns in ((*earlier, (question, None)), sample.turns)
        )
        places.append((_begin(asked, said), len(said)))
    return places


def _begin(question: np.ndarray, whole: np.ndarray) -> int:
    """Number of tokens that a question and the same question with its answer have in common.

    A template may end a prompt in another way if no answer follows.
    """
    same = question == whole[: len(question)]
    return len(question) if same.all() else int(same.argmin())
