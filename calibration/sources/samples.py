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

from calibration.scenes import CAPTION_QUESTION, Split, draw_scene
from calibration.sources.images import StoredImage
from manifests.errors import BadInputError

__all__ = ["CAPTION_PROMPT", "QUESTION_COLUMNS", "Sample", "SampleSet", "choose", "sample_of", "scene_sample"]

CAPTION_PROMPT = CAPTION_QUESTION
QUESTION_COLUMNS = ("question", "prompt")
_TEXT_COLUMNS = ("caption", "captions", "answer", "answers", "text", "sentences")

_Entry = TypeVar("_Entry")


@dataclass(frozen=True)
class Sample:
    """A conversation about images or a video, or without any.

    Attributes:
        id: unique in the source; for VQA the question_id.
        pictures: the images, or where they are stored.
        turns: (question, answer) pairs, at least one.
        references: all right answers to the last question; by default the answer of that turn, or none if it is empty.
        video: the frames of the video; empty if there is none.

    Raises:
        BadInputError: if a text cannot be written as UTF-8.
    """

    id: str
    pictures: tuple[Image.Image | StoredImage, ...]
    turns: tuple[tuple[str, str], ...]
    references: tuple[str, ...] = ()
    video: tuple[Image.Image, ...] = ()

    def __post_init__(self) -> None:
        if not self.references and self.turns[-1][1]:
            object.__setattr__(self, "references", (self.turns[-1][1],))
        for text in (self.id, *self.references, *(part for turn in self.turns for part in turn)):
            try:
                text.encode()
            except UnicodeEncodeError as error:  # JSON may write half of a surrogate pair
                raise BadInputError(f"sample {self.id!r} has a text that is not Unicode ({error}): fix it") from error

    @property
    def images(self) -> list[Image.Image]:
        """The images; stored images are decoded again at every access.

        Raises:
            BadInputError: if an image cannot be read.
        """
        return [picture.read() if isinstance(picture, StoredImage) else picture for picture in self.pictures]

    def without_video(self) -> Sample:
        """The same sample with the middle frame in the place of its video, for models that take no videos."""
        frames = self.video
        return replace(self, pictures=(*self.pictures, frames[len(frames) // 2]), video=()) if frames else self


@dataclass(frozen=True)
class SampleSet:
    """Samples, with the source, revision and seed that a manifest records."""

    source: str
    revision: str | None
    seed: int
    samples: tuple[Sample, ...]

    def with_sizes(self, sizes: Sequence[tuple[int, int]]) -> SampleSet:
        """The same samples, with the images of the first ones cropped and scaled to `sizes` (width, height).

        Each size is that of the image of one sample; samples without an image, and with several, stay as they are.
        """
        left = iter(sizes)

        def fitted(sample: Sample) -> Sample:
            size = next(left, None) if len(sample.pictures) == 1 else None
            return replace(sample, pictures=(ImageOps.fit(sample.images[0], size),)) if size else sample

        return replace(self, samples=tuple(map(fitted, self.samples)))

    def first(self, count: int) -> SampleSet:
        """The first `count` samples."""
        return replace(self, samples=self.samples[:count])

    @property
    def digest(self) -> str:
        """SHA-256 over image sizes, pixels and texts of all samples, in order."""
        state = hashlib.sha256()
        for sample in self.samples:
            images = [*sample.images, *sample.video]
            texts: list[Any] = [*(image.size for image in images), sample.turns]
            if sample.video:
                texts.append(f"video of {len(sample.video)} frames")
            # A reference that only repeats the turn's answer is left out: it does not change the digest.
            if sample.references not in ((), (sample.turns[-1][1],)):
                texts.append(sample.references)
            state.update(json.dumps(texts).encode())
            for image in images:
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
    return Sample(id, (picture,), ((str(question), Counter(texts).most_common(1)[0][0]),), texts)


def scene_sample(split: Split, index: int, seed: int) -> Sample:
    """A scene with all of its questions; in the split for calibration also with its caption, and not in the same order."""
    scene = draw_scene(split, index, seed)
    turns = [(question.text, question.answer) for question in scene.questions]
    if split is Split.CALIBRATION:
        turns.append((CAPTION_PROMPT, scene.caption))
        # Over the scenes, each kind of question occurs at each position of the conversation.
        first = index % len(turns)
        turns = turns[first:] + turns[:first]
    return Sample(scene.id, (scene.image,), tuple(turns))


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
