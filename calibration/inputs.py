"""Model inputs made from samples as in inference: with the chat template, image tokens and the checkpoint's processor."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL.Image import Image

from calibration.activations import write_activations
from calibration.sources import SampleSet

__all__ = ["Prompts", "write_inputs"]


class Prompts(Protocol):
    """The part of a family of models that turns a conversation about an image into the model's inputs; picklable.

    Arguments called `processed` hold the outputs of a processor: name -> array.
    """

    @property
    def sequence_inputs(self) -> tuple[str, ...]:
        """Names of the processor's outputs whose axis 1 runs over the tokens of the prompt."""
        ...

    def load_processor(self, folder: Path) -> Any:
        """The processor of a checkpoint."""
        ...

    def prompt(self, processor: Any, turns: Sequence[tuple[str, str | None]]) -> str:
        """The text of a conversation about one image, written by the chat template.

        Args:
            processor: see `load_processor`.
            turns: (question, answer) pairs; the last answer is None if the model is to give it.
        """
        ...

    def process(self, processor: Any, texts: Sequence[str], images: Sequence[Sequence[Image]]) -> dict[str, Any]:
        """The processor's outputs for a batch of texts, each with its images."""
        ...

    def inputs(self, processed: dict[str, np.ndarray], config: dict[str, Any]) -> dict[str, np.ndarray]:
        """The inputs of the model's components: name -> array."""
        ...

    def image_token(self, config: dict[str, Any]) -> int:
        """Id of the token that stands for an image, or for each feature of an image."""
        ...


def write_inputs(
    folder: Path, samples: SampleSet, prompts: Prompts, config: dict[str, Any], sequence_length: int, output: Path
) -> None:
    """Write the inputs of every sample to `output/00000.safetensors` and so on.

    Args:
        folder: the checkpoint folder, which holds the processor's files.
        samples: the samples to process.
        prompts: turns the samples into inputs.
        config: the checkpoint's config with every default filled in.
        sequence_length: maximum number of tokens of a sample; a prompt is never cut before its last image token. 0 keeps
            all tokens.
        output: an existing folder.
    """
    processor = prompts.load_processor(folder)
    image_token = prompts.image_token(config)
    for index, sample in enumerate(samples.samples):
        processed = prompts.process(processor, [prompts.prompt(processor, sample.turns)], [[sample.image]])
        if sequence_length:
            images = np.flatnonzero(processed["input_ids"][0] == image_token)
            length = max(sequence_length, 1 + int(images.max(initial=-1)))
            for name in prompts.sequence_inputs:
                if name in processed:
                    processed[name] = processed[name][:, :length]
        write_activations(output / f"{index:05d}.safetensors", prompts.inputs(processed, config))
