"""What a model says of a folder of images, and how it was asked: one JSON file a model, for a referee to compare."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from manifests.errors import BadInputError
from manifests.files import write_atomically
from manifests.model import Sha256

__all__ = [
    "Decoding",
    "Description",
    "Descriptions",
    "KeptDescriptions",
    "RefereeReport",
    "read_descriptions",
    "write_descriptions",
]


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Decoding(_Record):
    """How every image was asked about; two files are compared only if this is equal."""

    prompt: str
    method: Literal["greedy"] = "greedy"
    max_new_tokens: int = Field(ge=1)
    ignore_eos: bool = False


class Description(_Record):
    """One image, by its name in the folder, and what was said of it."""

    image: str
    sha256: Sha256
    text: str


class Descriptions(_Record):
    """A model's descriptions of all images, in the order of their names."""

    schema_version: Literal["1.0"] = "1.0"
    model: str
    decoding: Decoding
    descriptions: list[Description] = Field(min_length=1)

    @field_validator("descriptions")
    @classmethod
    def _each_image_once(cls, descriptions: list[Description]) -> list[Description]:
        for name, count in Counter(item.image for item in descriptions).items():
            if count > 1:
                raise ValueError(f"{name} is described {count} times")
        return descriptions


class RefereeReport(_Record):
    """Two models' descriptions, scored by one CLIP: cosine similarity of image and text, higher is better."""

    schema_version: Literal["1.0"] = "1.0"
    clip: str
    decoding: Decoding
    images: int
    models: tuple[str, str]
    means: tuple[float, float]
    p_value: float = Field(description="two-sided, of equal means; paired bootstrap")
    winner: str | None = Field(description="the model with the higher mean; null if they are equal")
    scores: dict[str, tuple[float, float]] = Field(description="both models' score of each image")


class KeptDescriptions:
    """Descriptions while they are made, a line each in a file, so that a run that was killed goes on.

    Args:
        path: the file; one of another model, or of one that was asked otherwise, is begun again.
        model: what tells the model from every other, also from one that had its name before.
        decoding: how it is asked.
    """

    def __init__(self, path: Path, model: str, decoding: Decoding) -> None:
        self._path = path
        self.by_image: dict[str, Description] = {}
        head = json.dumps({"model": model, "decoding": decoding.model_dump()})
        # The last line is whole or, after a kill, may be a part that no newline ends.
        lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
        if lines[:1] == [head]:
            found = [Description.model_validate_json(line) for line in lines[1:]]
            self.by_image = {item.image: item for item in found}
        text = "".join(f"{line}\n" for line in [head, *(item.model_dump_json() for item in self.by_image.values())])
        write_atomically(path, text)

    def add(self, description: Description) -> None:
        """Keep one more."""
        self.by_image[description.image] = description
        with self._path.open("a", encoding="utf-8") as stream:
            stream.write(description.model_dump_json() + "\n")


def write_descriptions(descriptions: Descriptions, path: Path) -> None:
    """Write one model's file."""
    write_atomically(path, descriptions.model_dump_json(indent=2) + "\n")


def read_descriptions(path: Path) -> Descriptions:
    """Read one model's file.

    Raises:
        BadInputError: if it is missing, damaged, or the plain list of answers that MindIE writes, which does not say how the
            model was asked.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadInputError(f"{path} cannot be read ({error}): make it with vlmconvert describe") from error
    if isinstance(data, dict) and data and all(isinstance(value, str) for value in data.values()):
        raise BadInputError(
            f"{path} holds answers alone, as MindIE writes them, and not how they were asked for: add that with vlmconvert "
            f"describe --answers {path}"
        )
    try:
        return Descriptions.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise BadInputError(f"{path}: {where}: {first['msg']}; make it again with vlmconvert describe") from error
