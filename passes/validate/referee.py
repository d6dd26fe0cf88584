"""Comparing two models' descriptions of the same images by CLIP, as in the protocol of MindIE's LLaVA example.

The score of a description is the cosine similarity of CLIP's embeddings of image and text (CLIPScore without its rescaling,
Hessel et al. 2021); the model with the higher mean wins.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from calibration.sources.images import image_in, on_white
from manifests.descriptions import Descriptions, RefereeReport
from manifests.errors import BadInputError
from manifests.files import sha256_file
from passes.validate.paired import paired_bootstrap

__all__ = ["Clip", "open_clip_model", "referee"]

_OPEN_CLIP_CONFIG = "open_clip_config.json"
_OPEN_CLIP_WEIGHTS = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
# The model of MindIE's protocol, whose weights come without a config.
_MINDIE_CLIP = "ViT-H-14"
_TOKENIZERS = ("tokenizer.json", "vocab.json")
_DIGITS = 6


class Clip(Protocol):
    """A CLIP model."""

    name: str

    def similarity(self, image: Image.Image, texts: Sequence[str]) -> np.ndarray:
        """Cosine similarity [texts] of an image with each text; texts are cut at the maximum length of the model."""
        ...


def referee(
    first: Descriptions,
    second: Descriptions,
    images: Path,
    clip: Clip,
    step: Callable[[str], None] = lambda label: None,
) -> RefereeReport:
    """Score two models' descriptions.

    Args:
        first: descriptions by one model.
        second: descriptions by the other model, of the same images and made with the same settings.
        images: folder of the images, to which their names are relative.
        clip: the CLIP model that scores.
        step: called with the name of each image after it has been scored.

    Raises:
        BadInputError: if the models were asked differently or about other images, an image is missing or has changed, or
            CLIP gives no score.
    """
    if first.decoding != second.decoding:
        mine, other = first.decoding.model_dump(), second.decoding.model_dump()
        key = next(key for key in mine if mine[key] != other[key])
        raise BadInputError(
            f"{first.model} and {second.model} were asked differently ({key} is {mine[key]!r} and {other[key]!r}): describe "
            "the images again with equal settings"
        )
    texts = {item.image: item for item in second.descriptions}
    if {item.image: item.sha256 for item in first.descriptions} != {name: item.sha256 for name, item in texts.items()}:
        raise BadInputError(
            f"{first.model} and {second.model} do not describe the same images: describe the same folder with both"
        )
    scores = {}
    for item in first.descriptions:
        stored = image_in(images, item.image, str(images))
        image = on_white(stored.read())  # as both models saw it; open_clip would ignore transparency
        if sha256_file(images / item.image) != item.sha256:
            raise BadInputError(f"{images / item.image} is not the image that was described: give the same folder")
        pair = clip.similarity(image, [item.text, texts[item.image].text])
        if not np.isfinite(pair).all():
            raise BadInputError(f"{clip.name} gives no finite score for {item.image}: fetch the CLIP model again")
        scores[item.image] = (round(float(pair[0]), _DIGITS), round(float(pair[1]), _DIGITS))
        step(item.image)
    table = np.array(list(scores.values()))
    means = table.mean(axis=0).round(_DIGITS)
    models = (first.model, second.model)
    return RefereeReport(
        clip=clip.name,
        decoding=first.decoding,
        images=len(scores),
        models=models,
        means=(float(means[0]), float(means[1])),
        p_value=round(paired_bootstrap(table[:, 0] - table[:, 1]), _DIGITS),
        winner=None if means[0] == means[1] else models[int(means[1] > means[0])],
        scores=scores,
    )


def open_clip_model(folder: Path) -> Clip:
    """Open a CLIP model in a local folder, in the format of transformers or of open_clip.

    Raises:
        BadInputError: if the folder holds neither, or open_clip is needed and not installed.
    """
    config_file = folder / "config.json"
    if config_file.is_file():
        try:
            model_type = json.loads(config_file.read_text(encoding="utf-8")).get("model_type")
        except (OSError, ValueError, AttributeError) as error:
            raise BadInputError(f"{config_file} cannot be read ({error}): fetch the CLIP model again") from error
        # A folder may hold transformers' config.json and yet only open_clip's weights.
        if model_type == "clip" and any(folder.glob("model*.safetensors")):
            return _TransformersClip(folder)
    weights = next((folder / name for name in _OPEN_CLIP_WEIGHTS if (folder / name).is_file()), None)
    if weights is not None:
        return _OpenClip(folder, weights)
    raise BadInputError(
        f"{folder} holds no CLIP model: give a folder with config.json of model_type clip and model.safetensors, or with "
        f"{' or '.join(_OPEN_CLIP_WEIGHTS)}"
    )


class _TransformersClip:
    def __init__(self, folder: Path) -> None:
        from safetensors import SafetensorError
        from transformers import AutoProcessor, CLIPModel
        from transformers.utils import logging

        if not any((folder / name).is_file() for name in _TOKENIZERS):
            raise BadInputError(f"the CLIP model in {folder} lacks {' or '.join(_TOKENIZERS)}: fetch it again")
        logging.disable_progress_bar()
        self.name = folder.resolve().name
        try:
            loaded: Any = CLIPModel.from_pretrained(
                folder, local_files_only=True, use_safetensors=True, output_loading_info=True
            )
            self._processor = AutoProcessor.from_pretrained(
                folder, trust_remote_code=False, local_files_only=True, backend="pil"
            )
        except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
            raise _unusable(folder, error) from error
        model, report = loaded
        # transformers would initialize missing tensors at random.
        if report["missing_keys"]:
            raise BadInputError(
                f"the CLIP model in {folder} lacks tensor {min(report['missing_keys'])}: fetch it again"
            )
        self._model = model.float().eval()

    def similarity(self, image: Image.Image, texts: Sequence[str]) -> np.ndarray:
        """See `Clip`."""
        import torch

        inputs = self._processor(
            images=[image],
            text=list(texts),
            return_tensors="pt",
            padding=True,
            truncation=True,
            # Older tokenizers do not know the maximum length.
            max_length=self._model.config.text_config.max_position_embeddings,
        )
        with torch.no_grad():
            outputs = self._model(**inputs)
        return _cosine(outputs.image_embeds.numpy(), outputs.text_embeds.numpy())


class _OpenClip:
    def __init__(self, folder: Path, weights: Path) -> None:
        try:
            import open_clip
        except ImportError as error:
            raise BadInputError(
                f"{weights} needs open_clip, which cannot be imported ({error}): pip install 'vlmconvert[referee]', or give "
                "a CLIP model of transformers"
            ) from error
        self.name = folder.resolve().name
        described = (folder / _OPEN_CLIP_CONFIG).is_file()
        architecture = f"local-dir:{folder}" if described else _MINDIE_CLIP
        try:
            self._model, self._prepare = open_clip.create_model_from_pretrained(
                architecture, pretrained=None if described else str(weights)
            )
            self._tokenize = open_clip.get_tokenizer(architecture)
        # Which library fails depends on the content of the files, and each has its own exceptions.
        except Exception as error:
            raise _unusable(folder, error) from error
        self._model.eval()

    def similarity(self, image: Image.Image, texts: Sequence[str]) -> np.ndarray:
        """See `Clip`."""
        import torch

        with torch.no_grad():
            seen = self._model.encode_image(self._prepare(image).unsqueeze(0))
            said = self._model.encode_text(self._tokenize(list(texts)))
        return _cosine(seen.float().numpy(), said.float().numpy())


def _unusable(folder: Path, error: Exception) -> BadInputError:
    reason = " ".join(str(error).split())[:300]
    return BadInputError(f"the CLIP model in {folder} cannot be opened ({reason}): fetch it again")


def _cosine(image: np.ndarray, texts: np.ndarray) -> np.ndarray:
    return (texts @ image[0]) / (np.linalg.norm(texts, axis=1) * np.linalg.norm(image[0]))
