"""What an evaluation leaves beside an artifact: `evaluation.json`, and one line for each sample in `predictions.jsonl`."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from manifests.errors import BadInputError
from manifests.files import write_atomically
from manifests.model import Sha256

__all__ = [
    "EVALUATION_FOLDER",
    "IMAGES_FOLDER",
    "BlockError",
    "DataRecord",
    "Evaluation",
    "Figure",
    "Prediction",
    "read_evaluation",
    "read_predictions",
    "write_evaluation",
]

EVALUATION_FOLDER = "evaluation"
# Small images of the samples on which both sides differ, `<line number from 0>.png`.
IMAGES_FOLDER = "images"
_EVALUATION, _PREDICTIONS = "evaluation.json", "predictions.jsonl"


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class DataRecord(_Record):
    """The samples: where they come from, how many, and the SHA-256 over their pixels and texts."""

    source: str
    revision: str | None
    seed: int
    samples: int
    digest: Sha256


class Figure(_Record):
    """One metric over all samples; `reference` is the checkpoint's own figure, if it has one."""

    metric: str
    value: float
    reference: float | None
    samples: int


class BlockError(_Record):
    """How far one block's output is from the float block's on the same activations."""

    component: str
    block: str
    cosine: float = Field(description="cosine similarity of the outputs, 1 if they are equal")
    relative_error: float = Field(description="norm of the difference over the norm of the float output")


class Prediction(_Record):
    """One sample: the answers of both sides, and their scores by metric.

    `scores` also has `kl` (mean over the checkpoint's answer tokens, in nats) and `token_agreement` where they were asked for.
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
    """`evaluation.json`: an artifact's figures on some data, beside the checkpoint's."""

    schema_version: Literal["1.0"] = "1.0"
    artifact: str
    manifest_sha256: Sha256 = Field(description="SHA-256 of the manifest without its validation figures")
    data: DataRecord
    figures: list[Figure]
    blocks: list[BlockError]
    environment: dict[str, str]


def write_evaluation(evaluation: Evaluation, predictions: Iterable[Prediction], folder: Path) -> None:
    """Write both files into an existing folder."""
    write_atomically(folder / _PREDICTIONS, "".join(item.model_dump_json() + "\n" for item in predictions))
    write_atomically(folder / _EVALUATION, evaluation.model_dump_json(indent=2) + "\n")


def read_evaluation(folder: Path) -> Evaluation:
    """Read `evaluation.json`.

    Raises:
        BadInputError: if it is missing or not an evaluation.
    """
    path = folder / _EVALUATION
    try:
        return Evaluation.model_validate_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadInputError(f"{path} is missing: make it with vlmconvert evaluate") from None
    except (OSError, ValidationError, ValueError) as error:
        raise BadInputError(f"{path} is not an evaluation ({str(error).splitlines()[0]}): evaluate again") from error


def read_predictions(folder: Path) -> Iterator[Prediction]:
    """The samples of an evaluation, in order.

    Raises:
        BadInputError: if the file is missing or a line is not a prediction.
    """
    path = folder / _PREDICTIONS
    try:
        with path.open(encoding="utf-8") as stream:
            for number, line in enumerate(stream, start=1):
                try:
                    yield Prediction.model_validate_json(line)
                except ValidationError as error:
                    reason = str(error).splitlines()[0]
                    raise BadInputError(
                        f"{path}, line {number}: not a prediction ({reason}): evaluate again"
                    ) from error
    except FileNotFoundError:
        raise BadInputError(f"{path} is missing: make it with vlmconvert evaluate") from None
