"""Small random checkpoints of every family but mllama, written as a user would find them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from passes.ascend.family import AscendFamily
from passes.checkpoint import read_config
from tests.checkpoints.common import PATCH, SIZE, WIDTH
from tests.checkpoints.gemma3 import write_gemma3
from tests.checkpoints.idefics import IDEFICS, write_idefics
from tests.checkpoints.internvl import write_internvl
from tests.checkpoints.llava import (
    CLASSES,
    GRID,
    IMAGE,
    TEMPLATE,
    as_transformers_4,
    tokenizer,
    write_llava,
    write_processor,
)
from tests.checkpoints.qwen import QWEN, write_qwen
from vlmconvert.families import family_of

__all__ = [
    "CLASSES",
    "FAMILIES",
    "GRID",
    "IMAGE",
    "PATCH",
    "QWEN",
    "SIZE",
    "TEMPLATE",
    "WIDTH",
    "as_transformers_4",
    "ascend_family",
    "tokenizer",
    "write_checkpoint",
    "write_processor",
]

FAMILIES = (*CLASSES, *QWEN, "internvl", *IDEFICS, "gemma3")


def ascend_family(folder: Path) -> AscendFamily:
    """What Ascend runtimes make of the family of a checkpoint or an artifact."""
    family = family_of(read_config(folder), str(folder)).ascend
    assert family is not None
    return family


def write_checkpoint(
    folder: Path,
    family: str = "llava",
    text: str = "llama",
    vision: str = "clip",
    *,
    layer: int | list[int] = -2,
    strategy: str = "default",
    dtype: torch.dtype = torch.bfloat16,
    tied: bool = False,
    text_options: dict[str, Any] | None = None,
    **options: Any,
) -> Path:
    """Write a random checkpoint.

    Args:
        folder: to write to.
        family: one of `FAMILIES`.
        text, vision: model types of the two sides.
        layer, strategy: vision_feature_layer and vision_feature_select_strategy, of the LLaVA line.
        dtype: of the weights.
        tied: whether the LM head shares the embeddings' values.
        text_options: further entries of the text config.
        options: further entries of the config.
    """
    common = {"dtype": dtype, "tied": tied, "text_options": text_options or {}, **options}
    if family == "gemma3":
        return write_gemma3(folder, **common)
    if family == "internvl":
        return write_internvl(folder, text, **common)
    if family in IDEFICS:
        return write_idefics(folder, family, text, **common)
    if family in QWEN:
        return write_qwen(folder, family, **common)
    return write_llava(folder, family, text, vision, layer=layer, strategy=strategy, **common)
