"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedTokenizerFast

from tests.checkpoints.common import PATCH, WIDTH, random_model, save, text_values
from vlmconvert.demo.training import build_bpe

# Family -> prefix of transformers' classes, and what its vision config has beside the others'.
QWEN: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2-vl": ("Qwen2VL", {"embed_dim": 48, "mlp_ratio": 2, "hidden_size": WIDTH}),
    "qwen2.5-vl": (
        "Qwen2_5_VL",
        {
            "hidden_size": 48,
            "intermediate_size": 96,
            "window_size": 4 * PATCH,
            "fullatt_block_indexes": [1],
            "tokens_per_second": 2,
        },
    ),
    "qwen3-vl": (
        "Qwen3VL",
        {"hidden_size": 48, "intermediate_size": 96, "num_position_embeddings": 49, "deepstack_visual_indexes": [2, 0]},
    ),
}
QWEN_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def write_qwen(
    folder: Path,
    family: str,
    *,
    dtype: torch.dtype,
    tied: bool,
    text_options: dict[str, Any],
    vision_options: dict[str, Any] | None = None,
    **options: Any,
) -> Path:
    """Write a random Qwen-VL checkpoint whose images have 4 to 16 features; for the arguments see `write_checkpoint`."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    names = (
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
        "<|vision_start|>",
        "<|vision_end|>",
        "<|image_pad|>",
        "<|video_pad|>",
    )
    tokens = PreTrainedTokenizerFast(
        tokenizer_object=build_bpe(480, names, "user assistant <0.0 seconds>"),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
    )
    start, end, image, video = (tokens.convert_tokens_to_ids(name) for name in names[3:])
    prefix, vision = QWEN[family]
    features = {} if family == "qwen2-vl" else {"out_hidden_size": WIDTH}
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]}
    text = text_values(tokens, bos_token_id=None, rope_parameters=rope, **text_options)
    if family != "qwen3-vl":
        del text["head_dim"]
    config = getattr(transformers, f"{prefix}Config")(
        text_config=text,
        vision_config={
            "depth": 3,
            "num_heads": 4,
            "patch_size": PATCH,
            "spatial_merge_size": 2,
            **vision,
            **features,
            **(vision_options or {}),
        },
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
        tie_word_embeddings=tied,
        **options,
    )
    model = random_model(prefix, config, "language_model", 0.15, {"bias": 0.1})
    save(model, tokens, dtype, folder)
    side = 2 * PATCH
    size = {"shortest_edge": 4 * side**2, "longest_edge": 16 * side**2}
    images = Qwen2VLImageProcessorPil(size=size, patch_size=PATCH)
    settings = images.to_dict() | {
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": f"{prefix}Processor",
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    frames = {
        name: settings[name] for name in ("image_mean", "image_std", "patch_size", "temporal_patch_size", "merge_size")
    }
    frames["size"] = {**size, "longest_edge": 64 * side**2}
    (folder / "video_preprocessor_config.json").write_text(json.dumps(frames))
    tokens.chat_template = QWEN_TEMPLATE
    tokens.save_pretrained(folder)
    return folder
