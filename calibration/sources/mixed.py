"""Samples that look like use: conversations about photos, several of them or a video, conversations without any, and scenes.

Activations that only long texts, or only photos, bring about are missing in scenes. The conversations come with vlmconvert: the
texts are its own, and the sources of the photos are in `conversations/SOURCES.md`.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import replace
from functools import cache
from itertools import chain, count, islice, zip_longest
from pathlib import Path
from typing import Any

from PIL import Image

from calibration.scenes import Split
from calibration.sources.images import StoredImage
from calibration.sources.samples import Sample, scene_sample

__all__ = ["held_out_texts", "mixed_samples"]

_FOLDER = Path(__file__).parent.parent / "conversations"
# Number of subjects of a conversation without images.
_SUBJECTS = 3
# Frames of a video, and the share of the picture's width that each of them shows.
_FRAMES, _VIEW = 8, 0.6


def mixed_samples(number: int, seed: int, split: Split) -> Iterator[Sample]:
    """Yield samples in turn: with images or a video, without any, and a scene; when the conversations are used up, only scenes.

    Args:
        number: how many samples.
        seed: decides the order of the conversations, and the scenes.
        split: training uses no conversations.
    """
    rows = [(index, row) for index, row in enumerate(_conversations()) if row["split"] == split.name.lower()]
    order = random.Random(seed)
    order.shuffle(rows)
    seen = [_sample(*row) for row in rows if row[1]["images"]]
    said = [_sample(*row) for row in rows if not row[1]["images"]]
    if split is Split.CALIBRATION:
        said = _chained(said)
    scenes = (scene_sample(split, index, seed) for index in count())
    turns = zip_longest(seen, said)
    mixed = chain.from_iterable((*(sample for sample in turn if sample), next(scenes)) for turn in turns)
    yield from islice(chain(mixed, scenes), number)


def _chained(samples: list[Sample]) -> list[Sample]:
    """Conversations of several subjects each, since long ones reach activations that short ones do not."""
    parts = (samples[first : first + _SUBJECTS] for first in range(0, len(samples), _SUBJECTS))
    return [replace(part[0], turns=tuple(turn for sample in part for turn in sample.turns)) for part in parts]


def held_out_texts() -> list[Sample]:
    """The conversations that no calibration uses: first those without an image, then those about a photo."""
    rows = (item for item in enumerate(_conversations()) if item[1]["split"] == Split.TEST.name.lower())
    return sorted((_sample(*row) for row in rows), key=lambda sample: len(sample.pictures))


@cache
def _conversations() -> tuple[dict[str, Any], ...]:
    lines = (_FOLDER / "conversations.jsonl").read_text(encoding="utf-8").splitlines()
    return tuple(json.loads(line) for line in lines)


def _sample(index: int, row: dict[str, Any]) -> Sample:
    pictures = tuple(StoredImage.in_file(_FOLDER / name) for name in row["images"])
    turns = tuple((question, answer) for question, answer in row["turns"])
    if row.get("video"):
        return Sample(f"mixed-{index}", (), turns, video=_pan(pictures[0].read()))
    return Sample(f"mixed-{index}", pictures, turns)


def _pan(picture: Image.Image) -> tuple[Image.Image, ...]:
    """A view that moves over a picture from the left to the right."""
    view = int(_VIEW * picture.width)
    places = (index * (picture.width - view) // (_FRAMES - 1) for index in range(_FRAMES))
    return tuple(picture.crop((place, 0, place + view, picture.height)) for place in places)
