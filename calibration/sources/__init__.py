"""Where samples come from: embedded scenes, a folder of images, or a `datasets` id."""

from __future__ import annotations

import hashlib
import itertools
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps, UnidentifiedImageError

from calibration.scenes import CAPTION_QUESTION, Split, draw_scene
from manifests.errors import BadInputError

__all__ = ["CAPTION_PROMPT", "Sample", "SampleSet", "load_samples", "open_image"]

CAPTION_PROMPT = CAPTION_QUESTION
_IMAGE_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}
_IMAGE_COLUMNS = ("image", "img")
_TEXT_COLUMNS = ("caption", "captions", "answer", "answers", "text", "sentences")
_QUESTION_COLUMNS = ("question", "prompt")


@dataclass(frozen=True)
class Sample:
    """One image with a conversation about it: (question, answer) turns, at least one."""

    id: str
    image: Image.Image
    turns: tuple[tuple[str, str], ...]


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
            replace(sample, image=ImageOps.fit(sample.image, size))
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
            state.update(json.dumps([sample.image.size, sample.turns]).encode())
            state.update(sample.image.tobytes())
        return state.hexdigest()


def load_samples(source: str, count: int, seed: int = 0, split: Split = Split.CALIBRATION) -> SampleSet:
    """Load `count` samples.

    Args:
        source: `scenes`; a folder with `metadata.jsonl` (lines with file_name, and caption or question and answer), or of
            images with a caption in a `.txt` of the same name; or a `datasets` id, as `id` or `id:split`.
        count: how many; a folder or data set with fewer gives all it has.
        seed: which samples, and in which order.
        split: which scenes, if the source is `scenes`.

    Raises:
        BadInputError: if the source is unknown, empty or unreadable.
    """
    if count < 1:
        raise BadInputError(f"{count} samples are too few: use at least 1")
    if source == "scenes":
        return SampleSet(source, None, seed, tuple(_scene_sample(split, index, seed) for index in range(count)))
    folder = Path(source).expanduser()
    if folder.is_dir():
        entries = list(_folder_entries(folder))
        random.Random(seed).shuffle(entries)
        samples = tuple(
            Sample(path.relative_to(folder).as_posix(), open_image(path), (turn,)) for path, turn in entries[:count]
        )
        return SampleSet(folder.resolve().name, None, seed, samples)
    if source.startswith((".", "/", "~")) or folder.exists():
        raise BadInputError(f"calibration source {source} is not a folder: give scenes, a folder or a datasets id")
    return _dataset_samples(source, count, seed)


def open_image(path: Path) -> Image.Image:
    """Read an image upright and as RGB.

    Raises:
        BadInputError: if the file is missing, no image, broken or a decompression bomb.
    """
    try:
        with Image.open(path) as image:
            return ImageOps.exif_transpose(image).convert("RGB")
    except FileNotFoundError:
        raise BadInputError(f"image {path} does not exist") from None
    except (UnidentifiedImageError, Image.DecompressionBombError, OSError, ValueError, SyntaxError) as error:
        raise BadInputError(f"image {path} cannot be read ({error}): use another file") from error


def _scene_sample(split: Split, index: int, seed: int) -> Sample:
    scene = draw_scene(split, index, seed)
    turns = [(question.text, question.answer) for question in scene.questions]
    if split is Split.CALIBRATION:
        turns.append((CAPTION_PROMPT, scene.caption))
        # Each position in the conversation sees each kind of question.
        first = index % len(turns)
        turns = turns[first:] + turns[:first]
    return Sample(scene.id, scene.image, tuple(turns))


def _folder_entries(folder: Path) -> Iterator[tuple[Path, tuple[str, str]]]:
    metadata = folder / "metadata.jsonl"
    if metadata.exists():
        for number, line in enumerate(metadata.read_text(encoding="utf-8").splitlines(), start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
                path = folder / row["file_name"]
            except (ValueError, KeyError, TypeError) as error:
                raise BadInputError(
                    f"{metadata}, line {number}: not a JSON object with file_name ({error}): mend the line"
                ) from error
            if not path.resolve().is_relative_to(folder.resolve()):
                raise BadInputError(
                    f"{metadata}, line {number}: {row['file_name']} lies outside the folder: move it inside"
                )
            yield path, _turn(row, f"{metadata}, line {number}")
        return
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in _IMAGE_SUFFIXES)
    if not paths:
        raise BadInputError(f"{folder} holds no images and no metadata.jsonl: give a folder with either")
    for path in paths:
        text = path.with_suffix(".txt")
        yield path, (CAPTION_PROMPT, text.read_text(encoding="utf-8").strip() if text.exists() else "")


def _dataset_samples(source: str, count: int, seed: int) -> SampleSet:
    import datasets

    name, _, split = source.partition(":")
    try:
        stream = datasets.load_dataset(name, split=split or "train", streaming=True)
        rows = list(itertools.islice(stream.shuffle(seed=seed, buffer_size=1000), count))
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise BadInputError(
            f"calibration source {name} cannot be loaded ({reason}): give scenes, a folder or a datasets id"
        ) from error
    samples = []
    for index, row in enumerate(rows):
        image = next((row[column] for column in _IMAGE_COLUMNS if column in row), None)
        if not isinstance(image, Image.Image):
            raise BadInputError(
                f"calibration source {name} has no image column ({', '.join(row)}): choose another data set"
            )
        samples.append(Sample(f"{name}-{index}", image.convert("RGB"), (_turn(row, name),)))
    if not samples:
        raise BadInputError(f"calibration source {name} is empty: choose another data set or split")
    return SampleSet(name, str(stream.info.version) if stream.info.version else None, seed, tuple(samples))


def _turn(row: dict[str, Any], where: str) -> tuple[str, str]:
    answer = next((row[column] for column in _TEXT_COLUMNS if row.get(column)), None)
    if isinstance(answer, list):
        answer = answer[0]
    question = next((row[column] for column in _QUESTION_COLUMNS if row.get(column)), CAPTION_PROMPT)
    if not isinstance(answer, str):
        raise BadInputError(f"{where}: no caption or answer: add one of {', '.join(_TEXT_COLUMNS)}")
    return str(question), answer
