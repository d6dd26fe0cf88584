"""DeepSeek-VL: a SigLIP tower, whose last hidden states a projector brings among the text embeddings of a Llama."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from passes.vocabulary import Block, Component, HostStep, Kind, kinds_by_name
from vlmconvert.families.base import Family
from vlmconvert.families.parts.decoder import check_text_model, language_model, text_embeddings
from vlmconvert.families.parts.vision_tower import patch_tokens, vision_embeddings

if TYPE_CHECKING:
    import numpy as np

    from passes.validate.model import Model

__all__ = ["FAMILY", "DeepseekVl"]

_HERE = "vlmconvert_acme.deepseek_vl"
# What the parts read of LLaVA's configs, as DeepSeek-VL has it.
_CHOICE = {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"}


class DeepseekVl(Family):
    """See the module."""

    def components(self, config: dict[str, Any]) -> tuple[Component, ...]:
        """Vision tower with projector, text embeddings and language model."""
        check_text_model(config)
        step = HostStep(
            f"{_HERE}.features:merge_features", ("input_ids", "inputs_embeds", "image_features"), ("inputs_embeds",)
        )
        return _vision_encoder(config | _CHOICE), text_embeddings(config), language_model(config, step)

    def inputs(self, processed: dict[str, np.ndarray], config: dict[str, Any]) -> dict[str, np.ndarray]:
        from vlmconvert.families.parts.decoder_inputs import decoder_inputs

        values = decoder_inputs(processed, config)
        if "pixel_values" in processed:
            values["pixel_values"] = processed["pixel_values"].astype("float32")
        return values

    def next_inputs(self, previous: dict[str, np.ndarray], tokens: np.ndarray) -> dict[str, np.ndarray]:
        from vlmconvert.families.parts.decoder_inputs import next_decoder_inputs

        return next_decoder_inputs(previous, tokens)

    def image_token(self, config: dict[str, Any]) -> int:
        return int(config["image_token_id"])

    def image_sizes(self, config: dict[str, Any]) -> list[tuple[int, int]]:
        size = config["vision_config"]["image_size"]
        return [(size, size)]

    def image_tokens(self, config: dict[str, Any]) -> int:
        return patch_tokens(config | _CHOICE)

    def reference(self, folder: Path) -> Model:
        from vlmconvert_acme.deepseek_vl.reference import Reference

        return Reference(folder, self.architecture)


def _vision_encoder(config: dict[str, Any]) -> Component:
    """The tower as LLaVA has it under another name, with a norm before the projector."""
    tower = vision_embeddings(config, project=True)
    *layers, last = tower.blocks
    kind = Kind(
        "norm_and_align",
        f"{_HERE}.modules:norm_and_align",
        tower.kinds["vision_layer"].outputs,
        tower.outputs,
        {"images": 2},
    )
    aligner = Block(
        "aligner",
        kind.name,
        {"norm": "model.vision_model.post_layernorm", "aligner": "model.aligner"},
        {"hidden_states": last.inputs["hidden_states.0"]},
        last.outputs,
    )
    blocks = [
        replace(
            block, weights={path: name.replace("vision_tower", "vision_model") for path, name in block.weights.items()}
        )
        for block in layers
    ]
    kinds = (tower.kinds[name] for name in ("vision_embeddings", "vision_layer"))
    return replace(tower, kinds=kinds_by_name(*kinds, kind), blocks=(*blocks, aligner))


FAMILY = DeepseekVl(
    name="deepseek-vl",
    architecture="DeepseekVLForConditionalGeneration",
    processor_outputs=("input_ids", "attention_mask", "pixel_values"),
)
