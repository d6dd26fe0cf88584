"""Trying a checkpoint's processor before the work: its chat template, its tokens, and the number of image tokens.

A checkpoint may come from a stranger, and a chat template is a program. So the processor is tried in the helper process, with
limits; a trial that went well is kept in the store.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from manifests.errors import BadInputError
from manifests.files import sha256_file
from passes.limits import run_limited
from passes.ports import follow
from passes.processor_files import processor_files, template_file
from passes.store import Store, digest, library_versions
from passes.vocabulary import Component
from vlmconvert.console import Reporter
from vlmconvert.conversion.helper import Helper
from vlmconvert.conversion.open import source_digest
from vlmconvert.families.base import Family
from vlmconvert.families.opened import OpenedModel

__all__ = ["try_processor"]

_VERSION = 1
# Seconds on the processor. Most of the time to open a processor goes into importing its class; a template takes milliseconds,
# and processing a few small images less than a second.
_OPENING_SECONDS, _TEMPLATE_SECONDS, _PROCESSING_SECONDS = 60, 3, 15
_QUESTION = "What is in the picture?"
_LONGEST_PROMPT = 100_000  # characters
# Width and height of images that differ from every size to which a processor cuts or resizes them.
_SIZES = ((37, 53), (200, 90), (64, 64), (31, 301))
_FRAMES = 8
_GENERATION = "generation_config.json"
_TOGETHER = "copy config.json and the processor's files from the same model's page"


def try_processor(model: OpenedModel, helper: Helper, store: Store, reporter: Reporter) -> None:
    """Refuse a checkpoint whose processor cannot be used with its model.

    Args:
        model: the checkpoint.
        helper: process that has transformers.
        store: keeps the trials that went well.
        reporter: shows progress.

    Raises:
        BadInputError: with the file that is at fault, or what does not fit.
    """
    folder, family = model.checkpoint.folder, model.family
    files = {path.name: sha256_file(path) for path in processor_files(folder)}
    key = digest(
        "trial", _VERSION, files, model.checkpoint.config, model.config, source_digest(family), library_versions()
    )
    if key in store:
        return
    shapes = model.templates.architecture.shapes
    config = model.config | {key: _zeros(shapes[tensor]) for key, tensor in family.config_tensors.items()}
    rows = _rows(model)
    template = f"the chat template in {template_file(folder)} takes too much time or memory: do not use this checkpoint"
    processing = (
        f"the processor in {folder} takes too much time or memory for a small image: do not use this checkpoint"
    )
    with reporter.stage("trying the processor"):
        helper.run_limited(template, _try_template, family, folder)
        helper.run_limited(processing, _try_processor, family, folder, config, model.components, rows)
    store.get_or_make(key, lambda output: (output / "tried").touch(), "trial of the processor")


def _zeros(shape: tuple[int, ...]) -> Any:
    import numpy as np

    return np.zeros(shape).tolist()


def _rows(model: OpenedModel) -> int:
    """Number of rows of the embeddings: the largest one, if several blocks of the language side have embeddings."""
    shapes = model.templates.architecture.shapes
    return max(
        shapes[tensor][0]
        for component in model.components
        if component.side == "language"
        for block in component.blocks
        if block.role == "embeddings"
        for tensor in block.tensors.values()
    )


def _try_template(family: Family, folder: Path) -> None:
    """Write a question with the chat template; meant for a process of its own.

    Raises:
        BadInputError: if the template cannot be rendered, or leaves out the question.
    """
    processor = run_limited(_OPENING_SECONDS, family.load_processor, folder, False)
    try:
        text = run_limited(_TEMPLATE_SECONDS, family.prompt, processor, ((_QUESTION, None),))
        if not isinstance(text, str) or _QUESTION not in text:
            raise ValueError("it leaves out the question")
        if len(text) > _LONGEST_PROMPT:
            raise ValueError(f"it makes {len(text)} characters of a short question")
    except Exception as error:
        raise BadInputError(
            f"the chat template in {template_file(folder)} cannot be used ({_reason(error)}): copy it from the model's page"
        ) from error


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def _try_processor(
    family: Family, folder: Path, config: dict[str, Any], components: tuple[Component, ...], rows: int
) -> None:
    """Process a question about each of a few images, and follow it through the model; meant for a process of its own.

    Args:
        family: family of the checkpoint.
        folder: the checkpoint.
        config: the completed config.
        components: the components.
        rows: number of rows of the embeddings.

    Raises:
        BadInputError: see `try_processor`.
    """
    processor = run_limited(_OPENING_SECONDS, family.load_processor, folder, False)
    _check_tokens(processor.tokenizer, rows, folder)
    _check_generation(family, folder, rows)
    run_limited(_PROCESSING_SECONDS, _process, family, processor, folder, config, components)


def _check_tokens(tokenizer: Any, rows: int, folder: Path) -> None:
    token, number = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    if number >= rows:
        raise BadInputError(
            f"the tokenizer in {folder} has token {token!r} with id {number}, and the embeddings of the model have {rows} rows: "
            f"{_TOGETHER}"
        )


def _check_generation(family: Family, folder: Path, rows: int) -> None:
    """Refuse a generation config that transformers refuses, or a checkpoint without tokens that end an answer."""
    from transformers import GenerationConfig

    try:
        if (folder / _GENERATION).exists():
            GenerationConfig.from_pretrained(folder, local_files_only=True)
        ends = family.end_tokens(folder)
        if not ends or not all(type(end) is int and 0 <= end < rows for end in ends):
            raise ValueError(f"eos_token_id {ends} is no token of the model")
    except Exception as error:
        raise BadInputError(
            f"{folder / _GENERATION} cannot be used ({_reason(error)}): copy it from the model's page"
        ) from error


def _process(
    family: Family, processor: Any, folder: Path, config: dict[str, Any], components: tuple[Component, ...]
) -> None:
    from PIL import Image

    for size in _SIZES:
        image = Image.new("RGB", size, (90, 120, 30))
        _follow(family, processor, folder, config, components, [image], [])
    if family.video_token(config) is not None:
        frames = [Image.new("RGB", _SIZES[0])] * _FRAMES
        _follow(family, processor, folder, config, components, [], [frames])


def _follow(
    family: Family,
    processor: Any,
    folder: Path,
    config: dict[str, Any],
    components: tuple[Component, ...],
    images: list[Any],
    videos: list[Any],
) -> None:
    """Process one question about images or videos, and follow it through the model."""
    import numpy as np

    try:
        text = family.prompt(processor, ((_QUESTION, None),), len(images), len(videos))
        processed = family.process(processor, [text], [images], [videos])
        token = family.image_token(config) if images else family.video_token(config)
        if not (processed["input_ids"] == token).any():
            raise BadInputError(f"its prompt of an image or a video lacks token {token}, which config.json asks for")
        inputs = family.inputs(processed, config)
        if strange := sorted(name for name, value in inputs.items() if not np.isfinite(value).all()):
            raise BadInputError(f"it makes {strange[0]} that are NaN or infinite")
        follow(components, config, inputs)
    except Exception as error:
        reason = str(error).partition(": ")[0] if isinstance(error, BadInputError) else _reason(error)
        raise BadInputError(f"the processor in {folder} does not fit config.json ({reason}): {_TOGETHER}") from error
