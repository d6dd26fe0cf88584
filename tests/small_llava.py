"""Small random checkpoints of the LLaVA line, written by transformers' own classes."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextVideoConfig,
    LlavaNextVideoForConditionalGeneration,
)

CLASSES = {
    "llava": (LlavaConfig, LlavaForConditionalGeneration),
    "llava-next": (LlavaNextConfig, LlavaNextForConditionalGeneration),
    "llava-next-video": (LlavaNextVideoConfig, LlavaNextVideoForConditionalGeneration),
}
IMAGE_TOKEN, IMAGE_TOKENS, VOCABULARY = 120, 4, 128


def small_llava(
    folder: Path, family: str = "llava", dtype: torch.dtype = torch.bfloat16, tied: bool = False, layers: int = 2
) -> Path:
    """Write config and weights; weights are larger than they are at first, so that layers change what passes through."""
    configs, models = CLASSES[family]
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=28,
        patch_size=14,
        projection_dim=32,
    )
    text = LlamaConfig(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        tie_word_embeddings=tied,
        rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
    )
    config = configs(vision_config=vision, text_config=text, image_token_index=IMAGE_TOKEN, tie_word_embeddings=tied)
    torch.manual_seed(0)
    model = models(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.1)
            elif name.endswith("weight"):
                parameter.normal_(1, 0.1)
    model.to(dtype).save_pretrained(folder)
    return folder
