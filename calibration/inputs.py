"""Model inputs of samples, made as in use: chat template, image token, the checkpoint's own processor."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL.Image import Image

from calibration.activations import write_activations
from calibration.sources import SampleSet
from manifests.errors import BadInputError

__all__ = ["chat_text", "load_processor", "prompt_inputs", "write_inputs"]


def load_processor(folder: Path) -> Any:
    """The checkpoint's processor, from local files and without code of the checkpoint.

    Raises:
        BadInputError: if it cannot be loaded, or has no chat template.
    """
    from transformers import AutoProcessor
    from transformers.utils import logging

    logging.set_verbosity_error()
    try:
        processor = AutoProcessor.from_pretrained(folder, trust_remote_code=False, local_files_only=True, backend="pil")
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise BadInputError(
            f"the processor in {folder} cannot be loaded ({reason}): copy its files from the model's page"
        ) from error
    if not processor.chat_template:
        raise BadInputError(
            f"the processor in {folder} has no chat template: add chat_template.jinja from the model's page"
        )
    return processor


def chat_text(processor: Any, turns: tuple[tuple[str, str | None], ...], images: int = 1) -> str:
    """A conversation as the chat template writes it; the images come first.

    An answer of None is left open for the model to give.
    """
    messages: list[dict[str, Any]] = []
    for number, (question, answer) in enumerate(turns):
        parts = [{"type": "image"}] * images if number == 0 else []
        messages.append({"role": "user", "content": [*parts, {"type": "text", "text": question}]})
        if answer is not None:
            messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    text: str = processor.apply_chat_template(messages, add_generation_prompt=turns[-1][1] is None, tokenize=False)
    return text


def prompt_inputs(processor: Any, images: Sequence[Image], prompts: Sequence[str]) -> dict[str, np.ndarray]:
    """A batch of questions about one image each through the processor, padded on the left, as numpy arrays."""
    processed = processor(
        images=[[image] for image in images],
        text=[chat_text(processor, ((prompt, None),)) for prompt in prompts],
        return_tensors="np",
        padding=True,
        padding_side="left",
        add_special_tokens=False,
    )
    return {name: np.asarray(value) for name, value in processed.items()}


def write_inputs(
    folder: Path, samples: SampleSet, adapt: str, config: dict[str, Any], sequence_length: int, output: Path
) -> None:
    """Write the inputs of every sample to `output/00000.safetensors` and so on.

    Args:
        folder: the checkpoint folder, for its processor.
        samples: what to process.
        adapt: `package.module:function` of the family: (processed arrays, config) -> inputs of all components.
        config: the completed config.
        sequence_length: tokens beyond this are cut off; 0 keeps all.
        output: an existing folder.
    """
    processor = load_processor(folder)
    module, _, attribute = adapt.partition(":")
    family_inputs: Callable[..., dict[str, np.ndarray]] = getattr(importlib.import_module(module), attribute)
    for index, sample in enumerate(samples.samples):
        processed = processor(
            images=[[sample.image]],
            text=[chat_text(processor, sample.turns)],
            return_tensors="np",
            add_special_tokens=False,
        )
        arrays = {name: np.asarray(value) for name, value in processed.items()}
        if sequence_length:
            for name in ("input_ids", "attention_mask", "cross_attention_mask"):
                if name in arrays:
                    arrays[name] = arrays[name][:, :sequence_length]
        write_activations(output / f"{index:05d}.safetensors", family_inputs(arrays, config))
