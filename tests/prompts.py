"""Prompts for tests that look at a processor, whatever its family."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL.Image import Image

from vlmconvert.families.parts.processor import chat_prompt, process

__all__ = ["chat_prompt", "process", "prompt_inputs"]


def prompt_inputs(processor: Any, images: Sequence[Image], prompts: Sequence[str]) -> dict[str, np.ndarray]:
    """Questions about one image each; see `vlmconvert.families.base.Family.prompt_inputs`."""
    texts = [chat_prompt(processor, ((prompt, None),)) for prompt in prompts]
    return process(processor, texts, [[image] for image in images])
