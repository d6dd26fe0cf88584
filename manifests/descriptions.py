"""A model's descriptions of a folder of images, and how it was asked: one JSON file per model, for a referee to compare."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from manifests.errors import BadInputError
from manifests.files import checked_record, read_json, write_atomically
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
    """Prompt and decoding settings for all images; only files with equal settings are compared."""

    prompt: str
    method: Literal["greedy"] = "greedy"
    max_new_tokens: int = Field(ge=1)
    ignore_eos: bool = False


class Description(_Record):
    """One image, by its name in the folder, and the model's description of it."""

    image: str
    sha256: Sha256
    text: str


class Descriptions(_Record):
    """A model's descriptions of all images, sorted by the images' names."""

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
    """Two models' descriptions, scored by one CLIP model: cosine similarity of image and text, higher is better."""

    schema_version: Literal["1.0"] = "1.0"
    clip: str
    decoding: Decoding
    images: int
    models: tuple[str, str]
    means: tuple[float, float]
    p_value: float = Field(description="two-sided p-value of equal means, by paired bootstrap")
    winner: str | None = Field(description="the model with the higher mean; null if they are equal")
    scores: dict[str, tuple[float, float]] = Field(description="image -> scores of both models")


class KeptDescriptions:
    """Descriptions kept in a file while they are made, one per line, so that a killed run can be resumed.

    Args:
        path: the file; if it holds descriptions by another model or with other settings, it is started again from empty.
        model: text that identifies the model, even if another model had the same name before.
        decoding: prompt and decoding settings.

    Raises:
        BadInputError: if the file holds something else.
    """

    def __init__(self, path: Path, model: str, decoding: Decoding) -> None:
        self._path = path
        self.by_image: dict[str, Description] = {}
        head = json.dumps({"model": model, "decoding": decoding.model_dump()})
        # What follows the last newline is empty, or a line that a killed run did not finish.
        *lines, _last = path.read_text(encoding="utf-8", errors="replace").split("\n") if path.exists() else [""]
        if path.exists() and not _is_head(lines):
            raise BadInputError(f"{path} is not a list of descriptions: move it elsewhere, or choose another --output")
        if lines[:1] == [head]:
            found = [Description.model_validate_json(line) for line in lines[1:]]
            self.by_image = {item.image: item for item in found}
        text = "".join(f"{line}\n" for line in [head, *(item.model_dump_json() for item in self.by_image.values())])
        write_atomically(path, text)

    def add(self, description: Description) -> None:
        """Append one description to the file."""
        self.by_image[description.image] = description
        with self._path.open("a", encoding="utf-8") as stream:
            stream.write(description.model_dump_json() + "\n")


def _is_head(lines: list[str]) -> bool:
    try:
        return json.loads(lines[0]).keys() == {"model", "decoding"}
    except (IndexError, ValueError, AttributeError):
        return False


def write_descriptions(descriptions: Descriptions, path: Path) -> None:
    """Write one model's descriptions as a JSON file."""
    write_atomically(path, descriptions.model_dump_json(indent=2) + "\n")


def read_descriptions(path: Path) -> Descriptions:
    """Read one model's descriptions.

    Raises:
        BadInputError: if the file is missing or damaged, or if it is the plain list of answers that MindIE writes, which
            does not say how the model was asked.
    """
    data = read_json(path, "make it with vlmconvert describe")
    if isinstance(data, dict) and data and all(isinstance(value, str) for value in data.values()):
        raise BadInputError(
            f"{path} holds only answers, as MindIE writes them, and not the prompt and decoding settings: add these with "
            f"vlmconvert describe --answers {path}"
        )
    return checked_record(data, path, Descriptions, "a file of descriptions", "make it again with vlmconvert describe")
