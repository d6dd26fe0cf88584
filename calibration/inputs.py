"""Model inputs of samples, made as in use: chat template, image token, the checkpoint's own processor."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL.Image import Image

from calibration.activations import write_activations
from calibration.sources import SampleSet
from calibration.video import load_video_processor
from manifests.errors import BadInputError

__all__ = ["chat_text", "load_processor", "process", "prompt_inputs", "write_inputs"]


def load_processor(folder: Path) -> Any:
    """The checkpoint's processor, from local files and without code of the checkpoint.

    Raises:
        BadInputError: if it cannot be loaded, or has no chat template.
    """
    from transformers import AutoProcessor
    from transformers.utils import logging

    logging.set_verbosity_error()
    try:
        if _takes_videos(folder):
            processor = load_video_processor(folder)
        else:
            processor = AutoProcessor.from_pretrained(
                folder, trust_remote_code=False, local_files_only=True, backend="pil"
            )
        _complete(processor, folder)
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise BadInputError(
            f"the processor in {folder} cannot be loaded ({reason}): copy its files from the model's page"
        ) from error
    # Older checkpoints have the template with the tokenizer.
    processor.chat_template = processor.chat_template or processor.tokenizer.chat_template
    if not processor.chat_template:
        raise BadInputError(
            f"the processor in {folder} has no chat template: add chat_template.jinja from the model's page"
        )
    return processor


def _takes_videos(folder: Path) -> bool:
    return not {"video_token_index", "video_token_id"}.isdisjoint(_read(folder / "config.json"))


def _complete(processor: Any, folder: Path) -> None:
    """Fill in by the config what a processor needs to count image tokens, and older checkpoints do not say."""
    if not hasattr(processor, "num_additional_image_tokens"):
        return
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    stored = _read(folder / "processor_config.json")
    for name, value in (
        ("patch_size", config.vision_config.patch_size),
        ("vision_feature_select_strategy", config.vision_feature_select_strategy),
        # CLIP has a token for the whole image before those of the patches.
        ("num_additional_image_tokens", int(config.vision_config.model_type.startswith("clip"))),
    ):
        if stored.get(name) is None:
            setattr(processor, name, value)


def _read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return content


def chat_text(processor: Any, turns: tuple[tuple[str, str | None], ...], images: int = 1, videos: int = 0) -> str:
    """A conversation as the chat template writes it; the images and videos come first.

    An answer of None is left open for the model to give.
    """
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
    """Texts as a chat template writes them through the processor, padded on the left.

    The token that begins a text is added by the tokenizer, unless the chat template has written it.

    Args:
        processor: the checkpoint's.
        texts: one a prompt.
        images: those of each prompt.
        videos: those of each prompt, as frames.
        tensors: numpy or torch.

    Raises:
        ValueError: if a text names more images than there are, or fewer.
    """
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


def prompt_inputs(processor: Any, images: Sequence[Image], prompts: Sequence[str]) -> dict[str, np.ndarray]:
    """A batch of questions about one image each through the processor, as numpy arrays."""
    texts = [chat_text(processor, ((prompt, None),)) for prompt in prompts]
    return process(processor, texts, [[image] for image in images])


def write_inputs(
    folder: Path, samples: SampleSet, adapt: str, config: dict[str, Any], sequence_length: int, output: Path
) -> None:
    """Write the inputs of every sample to `output/00000.safetensors` and so on.

    Args:
        folder: the checkpoint folder, for its processor.
        samples: what to process.
        adapt: `package.module:function` of the family: (processed arrays, config) -> inputs of all components.
        config: the completed config.
        sequence_length: tokens beyond this are cut off, but no image token; 0 keeps all.
        output: an existing folder.
    """
    processor = load_processor(folder)
    module, _, attribute = adapt.partition(":")
    family_inputs: Callable[..., dict[str, np.ndarray]] = getattr(importlib.import_module(module), attribute)
    for index, sample in enumerate(samples.samples):
        arrays = process(processor, [chat_text(processor, sample.turns)], [[sample.image]])
        if sequence_length:
            images = np.flatnonzero(arrays["input_ids"][0] == processor.image_token_id)
            length = max(sequence_length, 1 + int(images.max(initial=-1)))
            for name in ("input_ids", "attention_mask", "cross_attention_mask"):
                if name in arrays:
                    arrays[name] = arrays[name][:, :length]
        write_activations(output / f"{index:05d}.safetensors", family_inputs(arrays, config))
