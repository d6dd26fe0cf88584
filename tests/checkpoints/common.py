"""What the random checkpoints of all families have in common."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PreTrainedTokenizerFast

SIZE, PATCH, WIDTH = 28, 7, 64


def text_values(tokens: PreTrainedTokenizerFast, **more: Any) -> dict[str, Any]:
    """Entries of a small text config; `more` takes the place of others."""
    return {
        "vocab_size": 512,
        "hidden_size": WIDTH,
        "intermediate_size": 128,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 2048,
        "bos_token_id": tokens.bos_token_id,
        "eos_token_id": tokens.eos_token_id,
        "pad_token_id": tokens.pad_token_id,
        **more,
    }


def vision_values(**more: Any) -> dict[str, Any]:
    """Entries of a small vision config; `more` takes the place of others."""
    return {
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "image_size": SIZE,
        "patch_size": PATCH,
        **more,
    }


def random_model(prefix: str, config: Any, text_model: str, text: float | None, vectors: Mapping[str, float]) -> Any:
    """A model with random weights: matrices of the vision side have a standard deviation of 0.2.

    Args:
        prefix: of the name of transformers' class.
        config: its config.
        text_model: what the names of tensors of the language model contain.
        text: standard deviation of the language model's matrices; None leaves them as transformers initializes them.
        vectors: endings of the names of vectors -> standard deviation; other vectors stay as they are.
    """
    torch.manual_seed(0)
    model = getattr(transformers, f"{prefix}ForConditionalGeneration")(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            deviation = next((value for ending, value in vectors.items() if name.endswith(ending)), None)
            if parameter.ndim > 1 and (text_model not in name or text is not None):
                deviation = text if text_model in name else 0.2
            if deviation is not None:
                parameter.normal_(std=deviation)
    return model


def save(model: Any, tokens: PreTrainedTokenizerFast, dtype: torch.dtype, folder: Path) -> None:
    """Write a model with the tokens that begin and end an answer."""
    model.generation_config = transformers.GenerationConfig(
        do_sample=False,
        bos_token_id=tokens.bos_token_id,
        eos_token_id=tokens.eos_token_id,
        pad_token_id=tokens.pad_token_id,
    )
    torch.nn.Module.to(model, dtype)
    model.save_pretrained(folder)
