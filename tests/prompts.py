"""Prompts for tests that look at a processor, whatever its family."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import av
import numpy as np
from PIL.Image import Image

from calibration.scenes import Split, draw_scene
from vlmconvert.families.parts.processor import chat_prompt, process

__all__ = ["chat_prompt", "process", "prompt_inputs", "write_clip"]


def prompt_inputs(processor: Any, images: Sequence[Image], prompts: Sequence[str]) -> dict[str, np.ndarray]:
    """Questions about one image each; see `vlmconvert.families.base.Family.prompt_inputs`."""
    texts = [chat_prompt(processor, ((prompt, None),)) for prompt in prompts]
    return process(processor, texts, [[image] for image in images])


def write_clip(path: Path) -> None:
    """Write a video of ten scenes, one second long."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for number in range(10):
            frame = av.VideoFrame.from_image(draw_scene(Split.TEST, number).image.resize((64, 48)).convert("RGB"))
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
