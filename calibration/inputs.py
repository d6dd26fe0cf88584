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

    def prompt(self, processor: Any, turns: Sequence[tuple[str, str | None]], images: int = 1, videos: int = 0) -> str:
        """The text of a conversation about images or videos, written by the chat template.

        Args:
            processor: see `load_processor`.
            turns: (question, answer) pairs; the last answer is None if the model is to give it.
            images: number of images before the first question.
            videos: number of videos before the first question.
        """
        ...

    def process(
        self,
        processor: Any,
        texts: Sequence[str],
        images: Sequence[Sequence[Image]],
        videos: Sequence[Sequence[Sequence[Image]]],
    ) -> dict[str, Any]:
        """The processor's outputs for a batch of texts, each with its images and videos."""
        ...

    def inputs(self, processed: dict[str, np.ndarray], config: dict[str, Any]) -> dict[str, np.ndarray]:
        """The inputs of the model's components: name -> array."""
        ...

    def image_token(self, config: dict[str, Any]) -> int:
        """Id of the token that stands for an image, or for each feature of an image."""
        ...

    def video_token(self, config: dict[str, Any]) -> int | None:
        """Id of the token that stands for each feature of a video; None if the model takes no videos."""
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
        sequence_length: maximum number of tokens of a sample; a prompt is never cut before the last token of an image or
            video. 0 keeps all tokens.
        output: an existing folder.
    """
    processor = prompts.load_processor(folder)
    video_token = prompts.video_token(config)
    seen = [prompts.image_token(config), *([] if video_token is None else [video_token])]
    for index, given in enumerate(samples.samples):
        sample = given.without_video() if video_token is None else given
        images, videos = sample.images, [sample.video] if sample.video else []
        text = prompts.prompt(processor, sample.turns, len(images), len(videos))
        processed = prompts.process(processor, [text], [images], [videos])
        if sequence_length:
            places = np.flatnonzero(np.isin(processed["input_ids"][0], seen))
            length = max(sequence_length, 1 + int(places.max(initial=-1)))
            for name in prompts.sequence_inputs:
                if name in processed:
                    processed[name] = processed[name][:, :length]
        write_activations(output / f"{index:05d}.safetensors", prompts.inputs(processed, config))
