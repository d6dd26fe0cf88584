"""InternVL."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedTokenizerFast

from tests.checkpoints.common import PATCH, SIZE, random_model, save, text_values, vision_values
from vlmconvert.demo.training import build_bpe

INTERNVL_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '<IMG_CONTEXT>\\n' }}"
    "{% elif part['type'] == 'video' %}{{ '<video>\\n' }}"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def write_internvl(
    folder: Path,
    text: str,
    *,
    dtype: torch.dtype,
    tied: bool,
    text_options: dict[str, Any],
    vision_options: dict[str, Any] | None = None,
    **options: Any,
) -> Path:
    """Write a random InternVL checkpoint whose tiles have 4 features; for the arguments see `write_checkpoint`."""
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

    names = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>", "<video>")
    tokens = PreTrainedTokenizerFast(
        tokenizer_object=build_bpe(480, names, "user assistant Frame1: "),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens={
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
    )
    config = transformers.InternVLConfig(
        text_config=text_values(tokens, model_type=text, tie_word_embeddings=tied, **text_options),
        vision_config=vision_values(image_size=[SIZE, SIZE], patch_size=[PATCH, PATCH], **(vision_options or {})),
        image_token_id=tokens.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=4,
        tie_word_embeddings=tied,
        **options,
    )
    model = random_model(
        "InternVL", config, "language_model", 0.15, dict.fromkeys(("bias", "lambda_1", "lambda_2"), 0.3)
    )
    save(model, tokens, dtype, folder)
    size = {"height": SIZE, "width": SIZE}
    images = GotOcr2ImageProcessorPil(size=size, crop_to_patches=True, min_patches=1, max_patches=12)
    settings = images.to_dict() | {
        "image_processor_type": "GotOcr2ImageProcessor",
        "processor_class": "InternVLProcessor",
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    names = ("image_mean", "image_std", "size")
    (folder / "video_preprocessor_config.json").write_text(json.dumps({name: settings[name] for name in names}))
    path = folder / "processor_config.json"
    path.write_text(json.dumps({"image_seq_length": 4, "processor_class": "InternVLProcessor"}))
    tokens.chat_template = INTERNVL_TEMPLATE
    tokens.save_pretrained(folder)
    return folder
