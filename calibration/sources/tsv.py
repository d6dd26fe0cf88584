"""Samples of two TSV files: one holds images as base64 by key, the other questions and answers or captions as JSON."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import IO, Any

from calibration.sources.images import StoredImage
from calibration.sources.samples import QUESTION_COLUMNS, SampleSet, choose, sample_of
from manifests.errors import BadInputError
from manifests.lines import LONGEST_LINE, lines

__all__ = ["tsv_samples"]


def tsv_samples(images: Path, annotations: Path, count: int, seed: int) -> SampleSet:
    r"""Samples of two TSV files.

    A line of `images` is `key\tbase64`. A line of `annotations` is `key\tJSON`: an object with a question and its answer
    or answers, a list of such objects (one sample each), or captions: a string, an object with `caption` or
    `captions`, or a list of either, all of them references of one sample. Samples are named by the `question_id` of
    their object, otherwise by their key. Only the lines of chosen images are decoded, each when its image is needed.

    Raises:
        BadInputError: if a line is broken, or a chosen key has no image.
    """
    entries = []
    for number, _, key, value in _lines(annotations):
        where = f"{annotations}, line {number}"
        try:
            rows = _rows(json.loads(value))
        except (ValueError, RecursionError) as error:
            raise BadInputError(f"{where} has no questions or captions as JSON ({error}): fix the line") from error
        for index, row in enumerate(rows):
            name = row.get("question_id", key if len(rows) == 1 else f"{key}-{index}")
            entries.append((str(name), key, row, where))
    if not entries:
        raise BadInputError(f"{annotations} is empty: give a file with lines of key, tab, JSON")
    chosen = choose(entries, count, seed)
    offsets = _offsets(images, {key for _, key, _, _ in chosen})
    samples = []
    for name, key, row, where in chosen:
        if key not in offsets:
            raise BadInputError(f"{where}: {images} has no image {key}: remove the line or add the image")
        number, offset = offsets[key]
        picture = StoredImage(f"{images}, line {number}: image {key}", partial(_decode, images, offset))
        samples.append(sample_of(name, picture, row, where))
    return SampleSet(f"{images.name},{annotations.name}", None, seed, tuple(samples))


def _rows(value: Any) -> list[dict[str, Any]]:
    items = value if isinstance(value, list) else [value]
    asked = [item for item in items if isinstance(item, dict) and any(item.get(name) for name in QUESTION_COLUMNS)]
    if asked and len(asked) < len(items):
        raise ValueError("some entries have a question and some have none")
    return asked or [{"captions": items}]


def _offsets(images: Path, keys: set[str]) -> dict[str, tuple[int, int]]:
    """Line number and byte offset of the lines with these keys."""
    found: dict[str, tuple[int, int]] = {}
    for number, offset, key, _ in _lines(images):
        if key in found:
            raise BadInputError(
                f"{images}, line {number}: image {key} is in line {found[key][0]} too: remove one of them"
            )
        if key in keys:
            found[key] = number, offset
    return found


def _decode(images: Path, offset: int) -> IO[bytes]:
    with images.open("rb") as stream:
        stream.seek(offset)
        _, _, encoded = stream.readline(LONGEST_LINE).partition(b"\t")
    return BytesIO(base64.b64decode(encoded.strip(), validate=True))


def _lines(path: Path) -> Iterator[tuple[int, int, str, bytes]]:
    """Number, byte offset, key and value of every line that is not blank."""
    for number, offset, line in lines(path):
        where = f"{path}, line {number}"
        key, tab, value = line.partition(b"\t")
        if line.strip():
            if not tab or not key:
                raise BadInputError(f"{where} does not consist of a key, a tab and a value: fix the line")
            try:
                yield number, offset, key.decode(), value.strip()
            except UnicodeDecodeError as error:
                raise BadInputError(f"{where}: the key is not UTF-8 ({error}): fix the line") from error
