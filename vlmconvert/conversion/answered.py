"""Prompts that end with the right answers, for models that are too large to decode token by token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from calibration.sources.samples import Sample
    from passes.validate.model import Answered
    from vlmconvert.families.base import Family

__all__ = ["answered_batch"]


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
        same = question == whole[: len(question)]
        # A template may end a prompt in another way if no answer follows.
        begin = len(question) if same.all() else int(same.argmin())
        found = np.flatnonzero(np.isin(whole[begin:], ends))
        answers.append((len(whole) - begin, int(found[0]) + 1 if found.size else len(whole) - begin))
    count = max(length for length, _ in answers)
    mask = np.zeros((len(samples), count), bool)
    for row, (length, used) in enumerate(answers):
        mask[row, count - length : count - length + used] = True
    return Answered(said, mask)
