"""SmolVLM: Idefics3 that also takes videos, whose frames are tiles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from manifests.errors import BadInputError
from vlmconvert.families.idefics3.family import FAMILY as IDEFICS3
from vlmconvert.families.idefics3.family import Idefics3

if TYPE_CHECKING:
    from PIL.Image import Image

__all__ = ["FAMILY", "SmolVLM"]


class SmolVLM(Idefics3):
    """SmolVLM."""

    @property
    def takes_videos(self) -> bool:
        return True

    def video_token(self, config: dict[str, Any]) -> int:
        """The token of images: a frame of a video is a tile."""
        return self.image_token(config)

    def process(
        self,
        processor: Any,
        texts: Sequence[str],
        images: Sequence[Sequence[Image]] = (),
        videos: Sequence[Sequence[Sequence[Image]]] = (),
        tensors: Literal["np", "pt"] = "np",
    ) -> dict[str, Any]:
        """See `Family.process`.

        Raises:
            BadInputError: if there are images and videos, of which transformers' processor drops the images.
        """
        if any(images) and any(videos):
            raise BadInputError("SmolVLM takes images or videos, not both at a time: leave one of them out")
        return super().process(processor, texts, images, videos, tensors)

    def open_processor(self, folder: Path) -> Any:
        from vlmconvert.families.parts.video import load_frames_processor
        from vlmconvert.families.smolvlm.words import numbers_in_words

        numbers_in_words()
        return load_frames_processor(folder, self.model_type, "smolvlm", "SmolVLMVideoProcessor")


FAMILY = replace(
    SmolVLM(**vars(IDEFICS3)),
    name="smolvlm",
    architecture="SmolVLMForConditionalGeneration",
    vision_models=("smolvlm_vision",),
)
