"""LLaVA: the features of a vision tower with a projector replace the image tokens among the text embeddings."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from passes.ascend.family import AscendFamily, VisionStack
from passes.vocabulary import Component, HostStep
from vlmconvert.families.base import Family
from vlmconvert.families.parts.decoder import TEXT_MODELS, check_text_model, language_model, text_embeddings
from vlmconvert.families.parts.vision_tower import VISION_TOWERS, patch_tokens, vision_embeddings

if TYPE_CHECKING:
    import numpy as np

    from passes.validate.model import Model

__all__ = ["FAMILY", "Llava"]


class Llava(Family):
    """LLaVA; its successors inherit from this class."""

    def components(self, config: dict[str, Any]) -> tuple[Component, ...]:
        """Vision tower with projector, text embeddings and language model."""
        check_text_model(config, self.text_models)
        step = HostStep(
            "vlmconvert.families.llava.features:merge_features",
            ("input_ids", "inputs_embeds", "image_features"),
            ("inputs_embeds",),
        )
        return (
            vision_embeddings(config, project=True),
            text_embeddings(config, "image_token_index"),
            language_model(config, step),
        )

    def inputs(self, processed: dict[str, np.ndarray], config: dict[str, Any]) -> dict[str, np.ndarray]:
        """See `Family.inputs`; pixel_values [images, channels, size, size] as the processor gives them."""
        from vlmconvert.families.parts.decoder_inputs import decoder_inputs

        values = decoder_inputs(processed, config)
        if "pixel_values" in processed:
            values["pixel_values"] = processed["pixel_values"].astype("float32")
        return values

    def next_inputs(self, previous: dict[str, np.ndarray], tokens: np.ndarray) -> dict[str, np.ndarray]:
        from vlmconvert.families.parts.decoder_inputs import next_decoder_inputs

        return next_decoder_inputs(previous, tokens)

    def image_token(self, config: dict[str, Any]) -> int:
        return int(config["image_token_index"])

    def image_sizes(self, config: dict[str, Any]) -> list[tuple[int, int]]:
        """One size, that of the vision tower: the processor resizes every image to it."""
        size = config["vision_config"]["image_size"]
        return [(size, size)]

    def image_tokens(self, config: dict[str, Any]) -> int:
        return patch_tokens(config)

    def open_processor(self, folder: Path) -> Any:
        from vlmconvert.families.llava.processor import complete_processor

        processor = super().open_processor(folder)
        complete_processor(processor, folder)
        return processor

    def reference(self, folder: Path) -> Model:
        from vlmconvert.families.llava.reference import Reference

        return Reference(folder, self.architecture, "image_features")


FAMILY = Llava(
    name="llava",
    architecture="LlavaForConditionalGeneration",
    processor_outputs=("input_ids", "attention_mask", "pixel_values"),
    text_models=TEXT_MODELS,
    vision_models=VISION_TOWERS,
    tokenizer_graphs=True,
    ascend=AscendFamily(
        script="llava",
        frames=8,
        dtypes=("float16", "bfloat16"),
        runtimes=("mindie", "vllm-ascend"),
        image_key="image_token_index",
        name_prefixes=("vision_tower.", "multi_modal_projector.", "language_model.model.", "language_model.lm_head."),
        vision_stacks=(
            VisionStack(
                "vision_tower.vision_model.encoder.layers",
                output="out_proj",
                model_types=("clip_vision_model", "siglip_vision_model"),
            ),
        ),
        projector=("multi_modal_projector.linear_1", "multi_modal_projector.linear_2"),
    ),
    demo=Path(__file__).parents[2] / "demo" / "llava",
)
