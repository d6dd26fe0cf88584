"""ViP-LLaVA: LLaVA with features of several layers of the vision tower, and a norm before the projector."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from passes.vocabulary import Component
from vlmconvert.families.llava.family import Llava
from vlmconvert.families.parts.processor import open_processor

__all__ = ["FAMILY", "VipLlava"]


class VipLlava(Llava):
    """ViP-LLaVA; its configs do not say that the class token is dropped, since it always is."""

    def components(self, config: dict[str, Any]) -> tuple[Component, ...]:
        """LLaVA's, with another projector in the last block of the vision tower."""
        vision, embeddings, language = super().components(_like_llava(config))
        kind = replace(vision.kinds["select_and_project"], module="vlmconvert_more.vipllava_modules:select_and_project")
        return replace(vision, kinds={**vision.kinds, kind.name: kind}), embeddings, language

    def image_tokens(self, config: dict[str, Any]) -> int:
        return super().image_tokens(_like_llava(config))

    def open_processor(self, folder: Path) -> Any:
        return open_processor(folder)


def _like_llava(config: dict[str, Any]) -> dict[str, Any]:
    return config | {"vision_feature_select_strategy": "default"}


FAMILY = VipLlava(
    name="vipllava",
    architecture="VipLlavaForConditionalGeneration",
    processor_outputs=("input_ids", "attention_mask", "pixel_values"),
)
