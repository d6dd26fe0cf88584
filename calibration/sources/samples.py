"""Samples, sets of samples, and how a row of a data set becomes a sample."""

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
        id: unique in the source; for VQA the question_id.
        picture: the image, or where it is stored.
        turns: (question, answer) pairs, at least one.
        references: all right answers to the last question; by default the answer of that turn, or none if it is empty.

    Raises:
        BadInputError: if a text cannot be written as UTF-8.
    """

    id: str
    picture: Image.Image | StoredImage
    turns: tuple[tuple[str, str], ...]
    references: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.references and self.turns[-1][1]:
            object.__setattr__(self, "references", (self.turns[-1][1],))
        for text in (self.id, *self.references, *(part for turn in self.turns for part in turn)):
            try:
                text.encode()
            except UnicodeEncodeError as error:  # JSON may write half of a surrogate pair
                raise BadInputError(f"sample {self.id!r} has a text that is not Unicode ({error}): fix it") from error

    @property
    def image(self) -> Image.Image:
        """The image; a stored image is decoded again at every access.

        Raises:
            BadInputError: if the image cannot be read.
        """
        return self.picture.read() if isinstance(self.picture, StoredImage) else self.picture


@dataclass(frozen=True)
class SampleSet:
    """Samples, with the source, revision and seed that a manifest records."""

    source: str
    revision: str | None
    seed: int
    samples: tuple[Sample, ...]

    def with_sizes(self, sizes: Sequence[tuple[int, int]]) -> SampleSet:
        """The same samples, with the first images cropped and scaled to `sizes` (width, height), one image for each size."""
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
        """SHA-256 over image sizes, pixels and texts of all samples, in order."""
        state = hashlib.sha256()
        for sample in self.samples:
            image = sample.image
            texts: list[Any] = [image.size, sample.turns]
            # A reference that only repeats the turn's answer is left out: it does not change the digest.
            if sample.references not in ((), (sample.turns[-1][1],)):
                texts.append(sample.references)
            state.update(json.dumps(texts).encode())
            state.update(image.tobytes())
        return state.hexdigest()


def choose(entries: list[_Entry], count: int, seed: int) -> list[_Entry]:
    """At most `count` of the entries, in an order that depends on the seed; `entries` is shuffled in place."""
    random.Random(seed).shuffle(entries)
    return entries[:count]


def sample_of(id: str, picture: Image.Image | StoredImage, row: Mapping[str, Any], where: str) -> Sample:
    """Make a sample of a row that has one or several captions, or a question with one or several answers.

    All these texts are references. The answer of the turn is the most frequent text, the first one among equals.

    Raises:
        BadInputError: if the row has no caption and no answer.
    """
    try:
        texts = next((found for column in _TEXT_COLUMNS if (found := _texts(row.get(column)))), ())
    except RecursionError as error:
        raise BadInputError(f"{where} has captions or answers that are nested too deeply: fix the entry") from error
    if not texts:
        raise BadInputError(f"{where} has no caption or answer: add one of {', '.join(_TEXT_COLUMNS)}")
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
