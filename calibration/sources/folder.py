"""A folder of images, with `metadata.jsonl` or with a caption beside each image."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from calibration.sources.images import image_in
from calibration.sources.samples import CAPTION_PROMPT, Sample, SampleSet, choose, sample_of
from manifests.errors import BadInputError
from manifests.files import open_file
from manifests.lines import lines

__all__ = ["folder_samples"]

# In bytes.
_LONGEST_CAPTION = 1_000_000
_IMAGE_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}


def folder_samples(folder: Path, count: int, seed: int) -> SampleSet:
    """Samples of a folder; an image without a caption has an empty answer.

    Raises:
        BadInputError: if the folder holds no image, or a line of `metadata.jsonl` is broken.
    """
    metadata = folder / "metadata.jsonl"
    entries = list(_described(metadata) if metadata.exists() else _captioned(folder))
    if not entries:
        raise BadInputError(f"{metadata} has no lines: write one for each image, or remove the file")
    return SampleSet(folder.resolve().name, None, seed, tuple(choose(entries, count, seed)))


def _described(metadata: Path) -> Iterator[Sample]:
    for number, _, line in lines(metadata):
        if not line.strip():
            continue
        where = f"{metadata}, line {number}"
        try:
            row: dict[str, Any] = json.loads(line)
            name = Path(row["file_name"])
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise BadInputError(f"{where} is not a JSON object with file_name ({error}): fix the line") from error
        yield sample_of(name.as_posix(), image_in(metadata.parent, row["file_name"], where), row, where)


def _captioned(folder: Path) -> Iterator[Sample]:
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in _IMAGE_SUFFIXES)
    if not paths:
        raise BadInputError(f"{folder} holds neither images nor metadata.jsonl: give a folder with one of them")
    for path in paths:
        name = path.relative_to(folder).as_posix()
        picture = image_in(folder, name, str(folder))
        yield Sample(name, (picture,), ((CAPTION_PROMPT, _caption(path.with_suffix(".txt"))),))


def _caption(path: Path) -> str:
    try:
        with open_file(path) as stream:
            data = stream.read(_LONGEST_CAPTION + 1)
        if len(data) > _LONGEST_CAPTION:
            raise ValueError(f"it has more than {_LONGEST_CAPTION} bytes")
        return data.decode().strip()
    except FileNotFoundError:
        return ""
    except (OSError, ValueError) as error:
        raise BadInputError(f"caption {path} cannot be read ({error}): save it as UTF-8") from error
