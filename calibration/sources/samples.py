"""A sample, a set of them, and how a row of texts becomes one."""

from __future__ import annotations

import hashlib
import json
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from PIL import Image, ImageOps

from calibration.scenes import CAPTION_QUESTION
from calibration.sources.images import StoredImage
from manifests.errors import BadInputError

__all__ = ["CAPTION_PROMPT", "QUESTION_COLUMNS", "Sample", "SampleSet", "choose", "sample_of"]

CAPTION_PROMPT = CAPTION_QUESTION
QUESTION_COLUMNS = ("question", "prompt")
_TEXT_COLUMNS = ("caption", "captions", "answer", "answers", "text", "sentences")

_Entry = TypeVar("_Entry")


@dataclass(frozen=True)
class Sample:
    """One image with a conversation about it.

    Attributes:
        id: unique in its source; for VQA the question's id.
        picture: the image, or where it is.
        turns: (question, answer), at least one.
        references: all right answers to the last question. By default that turn's own answer; empty if it has none.
    """

    id: str
    picture: Image.Image | StoredImage
    turns: tuple[tuple[str, str], ...]
    references: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.references and self.turns[-1][1]:
            object.__setattr__(self, "references", (self.turns[-1][1],))

    @property
    def image(self) -> Image.Image:
        """The image, decoded anew each time if it is stored.

        Raises:
            BadInputError: if it cannot be read.
        """
        return self.picture.read() if isinstance(self.picture, StoredImage) else self.picture


@dataclass(frozen=True)
class SampleSet:
    """Samples, and what a manifest says of them."""

    source: str
    revision: str | None
    seed: int
    samples: tuple[Sample, ...]

    def with_sizes(self, sizes: Sequence[tuple[int, int]]) -> SampleSet:
        """The same samples, the first images cut and scaled to `sizes` (width, height), so that each size occurs."""
        fitted = (
            replace(sample, picture=ImageOps.fit(sample.image, size))
            for sample, size in zip(self.samples, sizes, strict=False)
        )
        return replace(self, samples=(*fitted, *self.samples[len(sizes) :]))

    def first(self, count: int) -> SampleSet:
        """The first `count` samples."""
        return replace(self, samples=self.samples[:count])

    @property
    def digest(self) -> str:
        """SHA-256 over sizes, pixels and texts, in order."""
        state = hashlib.sha256()
        for sample in self.samples:
            image = sample.image
            texts: list[Any] = [image.size, sample.turns]
            # What the turn already says is left out, so that a set without further references keeps its digest.
            if sample.references not in ((), (sample.turns[-1][1],)):
                texts.append(sample.references)
            state.update(json.dumps(texts).encode())
            state.update(image.tobytes())
        return state.hexdigest()


def choose(entries: list[_Entry], count: int, seed: int) -> list[_Entry]:
    """At most `count` of the entries, in an order that the seed decides."""
    random.Random(seed).shuffle(entries)
    return entries[:count]


def sample_of(id: str, picture: Image.Image | StoredImage, row: Mapping[str, Any], where: str) -> Sample:
    """One sample from a row with a caption or captions, or with a question and its answer or answers.

    Several texts are all references. The turn's answer is the one given most often, the first of equals.

    Raises:
        BadInputError: if there is no text.
    """
    texts = next((found for column in _TEXT_COLUMNS if (found := _texts(row.get(column)))), ())
    if not texts:
        raise BadInputError(f"{where}: no caption or answer: add one of {', '.join(_TEXT_COLUMNS)}")
    question = next((row[column] for column in QUESTION_COLUMNS if row.get(column)), CAPTION_PROMPT)
    return Sample(id, picture, ((str(question), Counter(texts).most_common(1)[0][0]),), texts)


def _texts(value: Any) -> tuple[str, ...]:
    """The texts in a string, in a list, or under a text column of a dict."""
    match value:
        case str() if value:
            return (value,)
        case list() | tuple():
            return tuple(text for item in value for text in _texts(item))
        case dict():
            return next((found for column in _TEXT_COLUMNS if (found := _texts(value.get(column)))), ())
    return ()
