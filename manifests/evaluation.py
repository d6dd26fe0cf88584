"""Results of an evaluation: figures in `evaluation.json`, and one line per sample in `predictions.jsonl`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path, PurePath
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from manifests.errors import BadInputError
from manifests.files import read_record, write_atomically
from manifests.lines import lines
from manifests.model import Sha256

__all__ = [
    "EVALUATION_FOLDER",
    "IMAGES_FOLDER",
    "BlockError",
    "DataRecord",
    "Evaluation",
    "Figure",
    "Prediction",
    "is_result",
    "read_evaluation",
    "read_predictions",
    "write_evaluation",
]

EVALUATION_FOLDER = "evaluation"
# Thumbnails of the samples on which artifact and checkpoint differ, named after the line of the sample, from 0: `17.png`.
IMAGES_FOLDER = "images"
_EVALUATION, _PREDICTIONS = "evaluation.json", "predictions.jsonl"


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class DataRecord(_Record):
    """The evaluated samples: their source and number, and the SHA-256 over their pixels and texts."""

    source: str
    revision: str | None
    seed: int
    samples: int
    digest: Sha256


class Figure(_Record):
    """The artifact's value of one metric over all samples; `reference` is the checkpoint's, None where it has none."""

    metric: str
    value: float
    reference: float | None
    samples: int


class BlockError(_Record):
    """How far the output of one block is from that of the float block on the same activations."""

    component: str
    block: str
    cosine: float = Field(description="cosine similarity of the outputs, 1 if they are equal")
    relative_error: float = Field(description="norm of the difference over the norm of the float output")


class Prediction(_Record):
    """One sample: the answers of artifact and checkpoint, and their scores by metric.

    `scores` also holds `kl` (mean over the tokens of the checkpoint's answer, in nats) and `token_agreement`, if they were
    asked for.
    """

    id: str
    image: str
    prompt: str
    references: list[str]
    answer: str
    checkpoint_answer: str | None
    scores: dict[str, float]
    checkpoint_scores: dict[str, float]


class Evaluation(_Record):
    """`evaluation.json`: the figures of an artifact and of its checkpoint on the same samples."""

    schema_version: Literal["1.0"] = "1.0"
    artifact: str
    manifest_sha256: Sha256 = Field(description="SHA-256 of the manifest without its validation figures")
    data: DataRecord
    figures: list[Figure]
    blocks: list[BlockError]
    environment: dict[str, str]


def is_result(path: PurePath) -> bool:
    """Whether a path, relative to a folder of results, is a name that an evaluation gives to a file."""
    if path.parent == PurePath(IMAGES_FOLDER):
        return path.suffix == ".png" and path.stem.isdecimal()
    return path in (PurePath(_EVALUATION), PurePath(_PREDICTIONS))


def write_evaluation(evaluation: Evaluation, predictions: Iterable[Prediction], folder: Path) -> None:
    """Write `predictions.jsonl` and `evaluation.json` into an existing folder."""
    write_atomically(folder / _PREDICTIONS, "".join(item.model_dump_json() + "\n" for item in predictions))
    write_atomically(folder / _EVALUATION, evaluation.model_dump_json(indent=2) + "\n")


def read_evaluation(folder: Path) -> Evaluation:
    """Read `evaluation.json`.

    Raises:
        BadInputError: if the file is missing or not an evaluation.
    """
    return read_record(folder / _EVALUATION, Evaluation, "an evaluation", "make it with vlmconvert evaluate")


def read_predictions(folder: Path) -> Iterator[Prediction]:
    """Read `predictions.jsonl`: the samples of an evaluation, in order.

    Raises:
        BadInputError: if the file is missing or a line is not a prediction.
    """
    path = folder / _PREDICTIONS
    if not path.exists():
        raise BadInputError(f"{path} is missing: make it with vlmconvert evaluate")
    for number, _, line in lines(path):
        try:
            yield Prediction.model_validate_json(line)
        except ValidationError as error:
            reason = str(error).splitlines()[0]
            raise BadInputError(
                f"{path}, line {number} is not a prediction ({reason}): run vlmconvert evaluate again"
            ) from error
