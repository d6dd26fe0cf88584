"""Idefics3 and SmolVLM."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedTokenizerFast

from tests.checkpoints.common import SIZE, random_model, save, text_values, vision_values
from vlmconvert.demo.training import build_bpe

IDEFICS = {"idefics3": "Idefics3", "smolvlm": "SmolVLM"}
IDEFICS_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize + ':' }}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '<image>' }}"
    "{% elif part['type'] == 'video' %}{{ '<video>' }}"
    "{% else %}{{ ' ' + part['text'] }}{% endif %}{% endfor %}{{ '<end_of_utterance>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


def write_idefics(
    folder: Path,
    family: str,
    text: str,
    *,
    dtype: torch.dtype,
    tied: bool,
    text_options: dict[str, Any],
    vision_options: dict[str, Any] | None = None,
    **options: Any,
) -> Path:
    """Write a random Idefics3 or SmolVLM checkpoint whose tiles have 4 features; for the arguments see `write_checkpoint`."""
    from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

    places = [f"<row_{row + 1}_col_{column + 1}>" for row in range(6) for column in range(6)]
    names = (
        "<|im_start|>",
        "<|im_end|>",
        "<image>",
        "<fake_token_around_image>",
        "<global-img>",
        "<end_of_utterance>",
        "<video>",
    )
    tokens = PreTrainedTokenizerFast(
        tokenizer_object=build_bpe(480, (*names, *places), "User Assistant: Frame from 00:00:"),
        bos_token="<|im_start|>",
        eos_token="<end_of_utterance>",
        pad_token="<|im_end|>",
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
    )
    prefix = IDEFICS[family]
    config = getattr(transformers, f"{prefix}Config")(
        text_config=text_values(tokens, model_type=text, tie_word_embeddings=tied, **text_options),
        vision_config=vision_values(**(vision_options or {})),
        image_token_id=tokens.convert_tokens_to_ids("<image>"),
        tie_word_embeddings=tied,
        **options,
    )
    model = random_model(prefix, config, "text_model", 0.15, {"bias": 0.3})
    save(model, tokens, dtype, folder)
    sizes = {"size": {"longest_edge": 4 * SIZE}, "max_image_size": {"longest_edge": SIZE}}
    settings = SmolVLMImageProcessorPil(**sizes).to_dict()
    settings |= {"image_processor_type": f"{prefix}ImageProcessor", "processor_class": f"{prefix}Processor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    if family == "smolvlm":
        (folder / "video_preprocessor_config.json").write_text(json.dumps(sizes))
    path = folder / "processor_config.json"
    path.write_text(json.dumps({"image_seq_len": 4, "processor_class": f"{prefix}Processor"}))
    tokens.chat_template = IDEFICS_TEMPLATE
    tokens.save_pretrained(folder)
    return folder
