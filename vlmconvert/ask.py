"""One question to a finished artifact."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from calibration.inputs import chat_text, load_processor
from calibration.sources import open_image
from vlmconvert.runtime import Runner

__all__ = ["ask"]


def ask(folder: Path, image: Path | None, prompt: str, max_new_tokens: int, device: str = "CPU") -> Iterator[str]:
    """Yield the greedy answer piece by piece, as whole characters.

    Raises:
        BadInputError: if the folder is no artifact, or the image cannot be read.
    """
    picture = open_image(image) if image else None
    runner = Runner(folder, device)
    processor = load_processor(folder)
    text = chat_text(processor, ((prompt, None),), images=1 if picture else 0)
    processed = processor(
        images=[[picture]] if picture else None, text=[text], return_tensors="np", add_special_tokens=False
    )
    arrays = {name: np.asarray(value) for name, value in processed.items()}
    tokens: list[int] = []
    said = ""
    for token in runner.generate(arrays, max_new_tokens):
        tokens.append(int(token[0]))
        whole = processor.tokenizer.decode(tokens, skip_special_tokens=True)
        if not whole.endswith("\ufffd"):  # a character may take several tokens
            yield whole[len(said) :]
            said = whole
