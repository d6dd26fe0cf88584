"""Opening a checkpoint's own processor, and processing prompts and images with it; shared by the families."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL.Image import Image

from calibration.sources.images import on_white
from manifests.errors import BadInputError

__all__ = ["chat_prompt", "checked_processor", "open_processor", "process"]


def open_processor(folder: Path) -> Any:
    """Open the processor with transformers; it processes images with Pillow."""
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(folder, trust_remote_code=False, local_files_only=True, backend="pil")


def checked_processor(folder: Path, open_files: Callable[[Path], Any], try_template: bool) -> Any:
    """Open a processor, and check that it has a chat template.

    Args:
        folder: the checkpoint or artifact.
        open_files: opens the processor in the folder.
        try_template: whether the template must write a question.

    Raises:
        BadInputError: if the processor cannot be opened, or has no chat template.
    """
    from transformers.utils import logging

    logging.set_verbosity_error()
    try:
        processor = open_files(folder)
        if not hasattr(processor, "image_processor") or not hasattr(processor, "tokenizer"):
            raise TypeError(f"{type(processor).__name__} does not process images and text")
    except Exception as error:
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise BadInputError(
            f"the processor in {folder} cannot be loaded ({reason}): copy its files from the model's page"
        ) from error
    # Older checkpoints keep the chat template with the tokenizer.
    processor.chat_template = processor.chat_template or processor.tokenizer.chat_template
    if not processor.chat_template:
        raise BadInputError(
            f"the processor in {folder} has no chat template: add chat_template.jinja from the model's page"
        )
    try:
        if try_template:
            chat_prompt(processor, (("Hello", None),))
    except Exception as error:  # a template may do anything that Jinja allows
        reason = " ".join(str(error).split())[:300] or type(error).__name__
        raise BadInputError(
            f"the chat template in {folder} cannot write a question ({reason}): copy it from the model's page"
        ) from error
    return processor


def chat_prompt(processor: Any, turns: Sequence[tuple[str, str | None]], images: int = 1, videos: int = 0) -> str:
    """See `vlmconvert.families.base.Family.prompt`."""
    messages: list[dict[str, Any]] = []
    for number, (question, answer) in enumerate(turns):
        parts = [{"type": "image"}] * images + [{"type": "video"}] * videos if number == 0 else []
        messages.append({"role": "user", "content": [*parts, {"type": "text", "text": question}]})
        if answer is not None:
            messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    text: str = processor.apply_chat_template(messages, add_generation_prompt=turns[-1][1] is None, tokenize=False)
    return text


def process(
    processor: Any,
    texts: Sequence[str],
    images: Sequence[Sequence[Image]] = (),
    videos: Sequence[Sequence[Sequence[Image]]] = (),
    tensors: Literal["np", "pt"] = "np",
) -> dict[str, Any]:
    """See `vlmconvert.families.base.Family.process`.

    The tokenizer adds the token that begins a text, unless the chat template has already written it.
    """
    if not getattr(processor.image_processor, "do_convert_rgb", True):  # this processor expects RGB images
        images = [[on_white(image) for image in own] for own in images]
    start = processor.tokenizer.bos_token
    more = {"videos": [list(own) for own in videos]} if any(videos) else {}
    processed = processor(
        images=[list(own) for own in images] if any(images) else None,
        text=list(texts),
        return_tensors="pt",
        padding=True,
        padding_side="left",
        add_special_tokens=not (start and texts[0].startswith(start)),
        **more,
    )
    if tensors == "pt":
        return dict(processed)
    return {name: np.asarray(value) for name, value in processed.items()}
