"""Qwen2.5-VL: Qwen2-VL with attention within windows in most layers of the tower, and moments of videos at their distance in time."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from manifests.errors import BadInputError
from passes.vocabulary import Component, HostStep
from vlmconvert.families.parts.grid_tower import grid_tower, patch_embeddings
from vlmconvert.families.qwen2_vl.family import FAMILY as QWEN2_VL
from vlmconvert.families.qwen2_vl.family import Qwen2VL, ascend_family

if TYPE_CHECKING:
    import numpy as np

__all__ = ["FAMILY", "Qwen25VL"]


class Qwen25VL(Qwen2VL):
    """Qwen2.5-VL."""

    def components(self, config: dict[str, Any]) -> tuple[Component, ...]:
        """Patch embeddings, vision tower with windows and the merger, text embeddings and language model."""
        self.check(config)
        step = HostStep(
            "vlmconvert.families.qwen2_5_vl.features:tower_inputs",
            ("patch_embeds", "image_grid_thw", "video_grid_thw"),
            ("vision_attention_mask", "window_attention_mask", "window_index", "rotary_pos_emb"),
        )
        tower = grid_tower(config, step, full=config["vision_config"]["fullatt_block_indexes"])
        return (patch_embeddings(config), tower, *self.text(config))

    def check(self, config: dict[str, Any]) -> None:
        super().check(config)
        vision = config["vision_config"]
        side = vision["patch_size"] * vision["spatial_merge_size"]
        if vision["window_size"] < side:
            raise BadInputError(
                f"config.json has windows of {vision['window_size']} pixels (window_size of vision_config), in which no feature of "
                f"{side} pixels fits: copy config.json from the model's page"
            )

    def moments(self, processed: dict[str, np.ndarray], config: dict[str, Any]) -> list[tuple[Any, ...]]:
        """See `Qwen2VL.moments`; the distance depends on the seconds between two moments."""
        import numpy as np

        grids, rate = processed["video_grid_thw"].tolist(), config["vision_config"]["tokens_per_second"]
        seconds = processed.get("second_per_grid_ts", np.ones(len(grids))).astype(np.float32)
        return [(*grid, rate * distance) for grid, distance in zip(grids, seconds, strict=True)]


FAMILY = replace(
    Qwen25VL(**vars(QWEN2_VL)),
    name="qwen2.5-vl",
    architecture="Qwen2_5_VLForConditionalGeneration",
    text_models=("qwen2_5_vl_text",),
    vision_models=("qwen2_5_vl_vision",),
    processor_outputs=(*QWEN2_VL.processor_outputs, "second_per_grid_ts"),
    ascend=ascend_family("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
    genai_config={},
)
