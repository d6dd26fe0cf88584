"""Samples of data sets on the Hugging Face hub, and of others that the `datasets` library loads by name."""

from __future__ import annotations

import itertools
from functools import partial
from io import BytesIO
from typing import Any

from PIL import Image

from calibration.sources.images import StoredImage, for_processor
from calibration.sources.samples import SampleSet, sample_of
from manifests.errors import BadInputError
from manifests.network import is_offline

__all__ = ["hub_samples"]

_IMAGE_COLUMNS = ("image", "img")


def hub_samples(source: str, count: int, seed: int) -> SampleSet:
    """Stream samples of a data set, given as `id` or `id:split`; their images stay encoded in memory.

    A sample is named by its `question_id`, otherwise by its position.

    Raises:
        BadInputError: if the data set cannot be loaded, is empty, or has no image or text column.
    """
    name, _, split = source.partition(":")
    if is_offline():
        raise BadInputError(
            f"data source {name} is on the hub, and --offline forbids connections: give scenes, a folder, or JSON or TSV files"
        )
    import datasets

    try:
        stream = datasets.load_dataset(name, split=split or "train", streaming=True)
        for column in _IMAGE_COLUMNS:
            if isinstance((stream.features or {}).get(column), datasets.Image):
                stream = stream.cast_column(column, datasets.Image(decode=False))
        rows = list(itertools.islice(stream.shuffle(seed=seed, buffer_size=1000), count))
        pictures = [
            _picture(next((row[column] for column in _IMAGE_COLUMNS if column in row), None), f"{name}, sample {index}")
            for index, row in enumerate(rows)
        ]
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise BadInputError(
            f"data source {name} cannot be loaded ({reason}): give scenes, a folder, JSON or TSV files or a datasets id"
        ) from error
    if not rows:
        raise BadInputError(f"data source {name} is empty: choose another data set or split")
    samples = []
    for index, (row, picture) in enumerate(zip(rows, pictures, strict=True)):
        if picture is None:
            raise BadInputError(
                f"data source {name} has no image column (only {', '.join(row)}): choose another data set"
            )
        samples.append(sample_of(str(row.get("question_id", f"{name}-{index}")), picture, row, name))
    return SampleSet(name, str(stream.info.version) if stream.info.version else None, seed, tuple(samples))


def _picture(value: Any, where: str) -> Image.Image | StoredImage | None:
    if isinstance(value, Image.Image):
        return for_processor(value)
    if not isinstance(value, dict):
        return None
    encoded = value.get("bytes")
    if encoded is None:
        import fsspec

        with fsspec.open(value["path"], "rb") as file:
            encoded = file.read()
    return StoredImage(where, partial(BytesIO, encoded))
