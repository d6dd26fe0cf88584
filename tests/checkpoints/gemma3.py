"""Gemma 3."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedTokenizerFast

from tests.checkpoints.common import SIZE, random_model, save, text_values, vision_values
from vlmconvert.demo.training import build_bpe

# As Gemma's: the token that begins a text, and turns in which the image is a token of its own that the processor expands.
GEMMA_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<start_of_turn>' + message['role'] + '\\n' }}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<start_of_image>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{{ '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)


def write_gemma3(folder: Path, *, dtype: torch.dtype, tied: bool, text_options: dict[str, Any], **options: Any) -> Path:
    """Write a random Gemma 3 checkpoint; for the arguments see `write_checkpoint`."""
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

    names = ("<s>", "</s>", "<unk>", "<pad>", "<start_of_image>", "<image_soft_token>", "<end_of_image>")
    bpe = build_bpe(480, (*names, "<start_of_turn>", "<end_of_turn>"), "user model")
    tokens = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        extra_special_tokens={
            "boi_token": "<start_of_image>",
            "image_token": "<image_soft_token>",
            "eoi_token": "<end_of_image>",
        },
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
    )
    boi, image, eoi = (tokens.convert_tokens_to_ids(name) for name in names[4:])
    config = transformers.Gemma3Config(
        text_config=text_values(
            tokens,
            query_pre_attn_scalar=16,
            sliding_window=12,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
            **text_options,
        ),
        vision_config=vision_values(vision_use_head=False),
        mm_tokens_per_image=4,
        boi_token_index=boi,
        image_token_index=image,
        eoi_token_index=eoi,
        **options,
    )
    model = random_model("Gemma3", config, "language_model", 0.1, {"": 0.1})
    save(model, tokens, dtype, folder)
    images = Gemma3ImageProcessorPil(size={"height": SIZE, "width": SIZE})
    transformers.Gemma3Processor(images, tokens, image_seq_length=4, chat_template=GEMMA_TEMPLATE).save_pretrained(
        folder
    )
    return folder
