"""Descriptions of a folder of images by a model, asked in such a way that other models can be asked the same."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from calibration.sources.images import open_image
from manifests.descriptions import Decoding, Description, Descriptions, KeptDescriptions
from manifests.errors import BadInputError
from manifests.files import read_json, sha256_file
from manifests.io import MANIFEST_NAME
from passes.checkpoint import read_config
from passes.store import digest
from passes.validate.greedy import greedy
from passes.validate.model import Model
from vlmconvert.families.base import Family
from vlmconvert.running.endpoint import Endpoint

__all__ = [
    "Describer",
    "EndpointDescriber",
    "LocalDescriber",
    "described",
    "import_answers",
    "list_images",
]

_KEPT_WEIGHTS = 4_000_000_000  # bytes of weights that stay in memory between calls
_WEIGHTS = {".bin", ".data", ".onnx", ".safetensors", ".xml"}
_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}


class Describer(Protocol):
    """A model that can describe images."""

    name: str
    identity: str
    """A digest or name that is different for every other model, even for an earlier one of the same name."""

    def describe(self, images: list[Path], decoding: Decoding) -> list[str]:
        """Describe each image."""
        ...


class LocalDescriber:
    """A checkpoint or an artifact on this machine.

    Args:
        name: name of the model in the file of descriptions.
        identity: see `Describer`.
        model: the model.
        family: family of the model.
        processor: processor of the model.
        ends: ids of the tokens that end an answer.
    """

    def __init__(self, name: str, identity: str, model: Model, family: Family, processor: Any, ends: list[int]) -> None:
        self.name, self.identity, self._model = name, identity, model
        self._family, self._processor, self._ends = family, processor, ends

    def describe(self, images: list[Path], decoding: Decoding) -> list[str]:
        """See `Describer`."""
        pictures = [[open_image(path)] for path in images]
        inputs = self._family.prompt_inputs(self._processor, pictures, [decoding.prompt] * len(images))
        ends = [] if decoding.ignore_eos else self._ends
        said = greedy(self._model, inputs, ends, decoding.max_new_tokens)
        tokens = np.where(said.valid, said.tokens, self._ends[0])
        texts: list[str] = self._processor.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return [text.strip() for text in texts]


def open_describer(folder: Path) -> LocalDescriber:
    """Open a checkpoint, an artifact, or a folder in the format of a target that another tool has written.

    Raises:
        BadInputError: if the folder is none of these.
    """
    from vlmconvert.families import family_of
    from vlmconvert.running.open import open_runner
    from vlmconvert.targets import recognize

    model: Model
    family = family_of(read_config(folder), str(folder))
    if (folder / MANIFEST_NAME).is_file():
        model = open_runner(folder)
    elif (target := recognize(folder)) is not None:  # written by another tool
        model = target.open_foreign(folder, family, _KEPT_WEIGHTS)
    else:
        model = family.reference(folder)
    processor, ends = family.load_processor(folder), family.end_tokens(folder)
    return LocalDescriber(folder.resolve().name, _identity(folder), model, family, processor, ends)


def _identity(folder: Path) -> str:
    """Digest of the names, sizes and modification times of the weight files.

    It does not read the weights, and every conversion changes it, because it writes new files.
    """
    stats = {path.name: path.stat() for path in sorted(folder.iterdir()) if path.suffix in _WEIGHTS}
    return digest({name: (stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()})


class EndpointDescriber:
    """A model behind a server, such as one on an NPU."""

    def __init__(self, endpoint: Endpoint) -> None:
        # A server tells nothing about a model but its name.
        self.name = self.identity = endpoint.served_model()
        self._endpoint = Endpoint(endpoint.url, self.name)

    def describe(self, images: list[Path], decoding: Decoding) -> list[str]:
        """See `Describer`."""
        options = (decoding.max_new_tokens, decoding.ignore_eos)
        return [self._endpoint.ask(decoding.prompt, path, *options).text.strip() for path in images]


def list_images(folder: Path, count: int = 0) -> list[Path]:
    """List the images of a folder, sorted by name.

    Args:
        folder: the folder.
        count: maximum number of images, 0 for all.

    Raises:
        BadInputError: if the folder holds no images.
    """
    paths = sorted(path for path in folder.glob("*") if path.suffix.lower() in _SUFFIXES)
    if not paths:
        raise BadInputError(f"{folder} holds no images: give the folder that both models describe")
    return paths[: count or None]


def described(
    describer: Describer,
    images: list[Path],
    decoding: Decoding,
    partial: Path,
    batch: int = 1,
    step: Callable[[str], None] = lambda label: None,
) -> Descriptions:
    """Let a model describe all images.

    Args:
        describer: the model.
        images: files of the images.
        decoding: the prompt, and how answers are generated.
        partial: file to which each description is written at once. Descriptions that an interrupted run left there are
            used. The caller removes the file when the result has been saved.
        batch: number of images that are described together.
        step: called with the name of an image after it has been described.
    """
    kept = KeptDescriptions(partial, describer.identity, decoding)
    hashes = {path.name: sha256_file(path) for path in images}
    left = []
    for path in images:
        if path.name in kept.by_image and kept.by_image[path.name].sha256 == hashes[path.name]:
            step(path.name)
        else:
            left.append(path)
    for first in range(0, len(left), batch):
        chosen = left[first : first + batch]
        texts = describer.describe(chosen, decoding)
        for path, text in zip(chosen, texts, strict=True):
            kept.add(Description(image=path.name, sha256=hashes[path.name], text=text))
            step(path.name)
    found = [kept.by_image[path.name] for path in images]
    return Descriptions(model=describer.name, decoding=decoding, descriptions=found)


def import_answers(answers: Path, images: list[Path], model: str, decoding: Decoding, end: str = "") -> Descriptions:
    """Read descriptions from MindIE's `predict_result.json`.

    Args:
        answers: JSON file with the path or name of each image -> its description.
        images: images that must be described in the file.
        model: name of the model.
        decoding: the prompt and the settings that MindIE was run with; the file does not have them.
        end: text of the token that ends an answer, which MindIE does not remove.

    Raises:
        BadInputError: if the file does not have that form, or lacks one of the images.
    """
    mend = "give the predict_result.json that run_pa.sh --precision writes"
    data = read_json(answers, mend)
    if not isinstance(data, dict):
        raise BadInputError(f"{answers} is not a file with answers: {mend}")
    texts = {Path(name).name: str(text).strip().removesuffix(end).strip() for name, text in data.items()}
    return Descriptions(model=model, decoding=decoding, descriptions=list(_imported(answers, texts, images)))


def _imported(answers: Path, texts: dict[str, str], images: list[Path]) -> Iterator[Description]:
    for path in images:
        if path.name not in texts:
            raise BadInputError(f"{answers} does not describe {path.name}: describe the whole folder {path.parent}")
        yield Description(image=path.name, sha256=sha256_file(path), text=texts[path.name])
