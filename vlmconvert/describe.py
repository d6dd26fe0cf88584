"""Describing a folder of images with a model, in a way that a second model can be asked in too."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from calibration.inputs import load_processor, prompt_inputs
from calibration.sources.images import open_image
from manifests.descriptions import Decoding, Description, Descriptions, KeptDescriptions
from manifests.errors import BadInputError
from manifests.files import sha256_file
from manifests.io import MANIFEST_NAME
from passes.checkpoint import read_config
from passes.export.ascend import DESCRIPTION_NAME
from passes.store import digest
from passes.validate.greedy import greedy
from passes.validate.protocol import Model
from vlmconvert.endpoint import Endpoint

__all__ = [
    "Describer",
    "EndpointDescriber",
    "LocalDescriber",
    "described",
    "import_answers",
    "list_images",
]

_KEPT_WEIGHTS = 4_000_000_000  # bytes
_WEIGHTS = {".bin", ".data", ".onnx", ".safetensors", ".xml"}
_SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"}


class Describer(Protocol):
    """A model that can be asked about images."""

    name: str
    identity: str
    """What tells it from every other model, also from one that had its name before."""

    def describe(self, images: list[Path], decoding: Decoding) -> list[str]:
        """What the model says of each image."""
        ...


class LocalDescriber:
    """A checkpoint or an artifact on this machine.

    Args:
        name: what the file calls it.
        identity: see `Describer`.
        model: with the interface of the validation passes.
        processor: the checkpoint's own.
        ends: tokens that end an answer.
    """

    def __init__(self, name: str, identity: str, model: Model, processor: Any, ends: list[int]) -> None:
        self.name, self.identity, self._model, self._processor, self._ends = name, identity, model, processor, ends

    def describe(self, images: list[Path], decoding: Decoding) -> list[str]:
        """See `Describer`."""
        pictures = [open_image(path) for path in images]
        inputs = prompt_inputs(self._processor, pictures, [decoding.prompt] * len(images))
        ends = [] if decoding.ignore_eos else self._ends
        said = greedy(self._model, inputs, ends, decoding.max_new_tokens)
        tokens = np.where(said.valid, said.tokens, self._ends[0])
        texts: list[str] = self._processor.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return [text.strip() for text in texts]


def open_describer(folder: Path) -> LocalDescriber:
    """A checkpoint or an artifact in a folder; an Ascend artifact is computed in torch with dequantized weights.

    Raises:
        BadInputError: if it is neither.
    """
    from vlmconvert.dequantized import dequantized_model
    from vlmconvert.families import FAMILIES, family_module
    from vlmconvert.runtime import end_tokens, open_runner

    model: Model
    family = str(read_config(folder)["model_type"]).replace("_", "-")
    if (folder / MANIFEST_NAME).is_file():
        model = open_runner(folder)
    elif (folder / DESCRIPTION_NAME).is_file():  # made by msmodelslim itself
        model = dequantized_model(folder, _KEPT_WEIGHTS)
    elif family in FAMILIES:
        model = family_module(family).reference(folder)
    else:
        raise BadInputError(f"{folder} is a {family} checkpoint: give one of {', '.join(FAMILIES)}, or an artifact")
    return LocalDescriber(folder.resolve().name, _identity(folder), model, load_processor(folder), end_tokens(folder))


def _identity(folder: Path) -> str:
    """A hash of the weights' names, sizes and times: they are not read twice, and every conversion writes them anew."""
    stats = {path.name: path.stat() for path in sorted(folder.iterdir()) if path.suffix in _WEIGHTS}
    return digest({name: (stat.st_size, stat.st_mtime_ns) for name, stat in stats.items()})


class EndpointDescriber:
    """A model behind a server, such as one on an NPU."""

    def __init__(self, endpoint: Endpoint) -> None:
        # A server tells no more than its name.
        self.name = self.identity = endpoint.served_model()
        self._endpoint = Endpoint(endpoint.url, self.name)

    def describe(self, images: list[Path], decoding: Decoding) -> list[str]:
        """See `Describer`."""
        options = (decoding.max_new_tokens, decoding.ignore_eos)
        return [self._endpoint.ask(decoding.prompt, path, *options).text.strip() for path in images]


def list_images(folder: Path, count: int = 0) -> list[Path]:
    """The images of a folder by name, the first `count` of them, or all with 0.

    Raises:
        BadInputError: if there is none.
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
    """Have all images described, `batch` at a time; those that `partial` holds of an earlier run are not asked about again.

    `partial` is left for the caller to remove when the result is safe.
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
    """Make a file of MindIE's `predict_result.json`, which holds the answers alone.

    Args:
        answers: image path, or name -> text.
        images: the images that must be there.
        model: the model's name.
        decoding: how they were asked for, which MindIE's file does not say.
        end: the token that ends an answer, which MindIE leaves at its end.

    Raises:
        BadInputError: if it is no such file, or lacks an image.
    """
    try:
        data = json.loads(answers.read_text(encoding="utf-8"))
        texts = {Path(name).name: str(text).strip().removesuffix(end).strip() for name, text in data.items()}
    except (OSError, ValueError, AttributeError) as error:
        raise BadInputError(
            f"{answers} is not a file of answers ({error}): give the predict_result.json that run_pa.sh --precision writes"
        ) from error
    return Descriptions(model=model, decoding=decoding, descriptions=list(_imported(answers, texts, images)))


def _imported(answers: Path, texts: dict[str, str], images: list[Path]) -> Iterator[Description]:
    for path in images:
        if path.name not in texts:
            raise BadInputError(f"{answers} does not describe {path.name}: describe the whole folder {path.parent}")
        yield Description(image=path.name, sha256=sha256_file(path), text=texts[path.name])
