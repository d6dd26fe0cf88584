"""Gemma 3: pooled features of a SigLIP tower among scaled text embeddings; the tokens of an image attend to each other.

Layers of two types take turns: one in six attends to all earlier positions, the others to a window of them, each type with
rotary positions of its own.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from manifests.errors import BadInputError
from passes.vocabulary import Component, HostStep
from vlmconvert.families.base import Family
from vlmconvert.families.llava.family import Llava
from vlmconvert.families.parts.decoder import check_text_model, language_model, text_embeddings
from vlmconvert.families.parts.ports import float_port, int_port
from vlmconvert.families.parts.vision_tower import check_tower, patch_side, vision_component

if TYPE_CHECKING:
    import numpy as np

__all__ = ["FAMILY", "Gemma3"]

_MODULES = "vlmconvert.families.gemma3.modules"


class Gemma3(Llava):
    """Gemma 3 with a vision tower; features enter as in LLaVA."""

    def components(self, config: dict[str, Any]) -> tuple[Component, ...]:
        """Vision tower with pooling and projection, scaled text embeddings, and language model."""
        text, vision = config["text_config"], config["vision_config"]
        check_text_model(config, self.text_models)
        check_tower(vision, self.vision_models)
        _check_config(config)
        step = HostStep(
            "vlmconvert.families.llava.features:merge_features",
            ("input_ids", "inputs_embeds", "image_features"),
            ("inputs_embeds",),
        )
        features = float_port("image_features", "images", config["mm_tokens_per_image"], text["hidden_size"])
        weights = {"norm": "model.vision_tower.post_layernorm", "projector": "model.multi_modal_projector"}
        layers = [vision["num_hidden_layers"]]
        return (
            vision_component(
                config, layers, f"{_MODULES}:pool_and_project", weights, features, "multi_modal_projector"
            ),
            text_embeddings(config, "image_token_index", module=f"{_MODULES}:text_embeddings"),
            language_model(config, step, f"{_MODULES}:positions", int_port("token_type_ids", "batch", "sequence")),
        )

    def inputs(self, processed: dict[str, np.ndarray], config: dict[str, Any]) -> dict[str, np.ndarray]:
        """See `Family.inputs`; `token_type_ids` [batch, sequence] is 1 at the tokens of images."""
        from vlmconvert.families.parts.decoder_inputs import decoder_inputs

        values = decoder_inputs(processed, config)
        values["token_type_ids"] = (values["input_ids"] == self.image_token(config)).astype("int64")
        if "pixel_values" in processed:
            values["pixel_values"] = processed["pixel_values"].astype("float32")
        return values

    def next_inputs(self, previous: dict[str, np.ndarray], tokens: np.ndarray) -> dict[str, np.ndarray]:
        from vlmconvert.families.parts.decoder_inputs import next_decoder_inputs

        values = next_decoder_inputs(previous, tokens)
        return values | {"token_type_ids": 0 * values["input_ids"]}

    def image_tokens(self, config: dict[str, Any]) -> int:
        return int(config["mm_tokens_per_image"])

    def open_processor(self, folder: Path) -> Any:
        """See `Family.open_processor`; LLaVA's settings are not needed."""
        return Family.open_processor(self, folder)


def _check_config(config: dict[str, Any]) -> None:
    text, tokens, side = config["text_config"], config["mm_tokens_per_image"], patch_side(config["vision_config"])
    for name in ("final_logit_softcapping", "attn_logit_softcapping"):
        if text.get(name) is not None:
            raise BadInputError(
                f"config.json has {name} {text[name]} in its text_config, which Gemma 3 does not have: copy config.json from the "
                "model's page"
            )
    if text.get("use_bidirectional_attention"):
        raise BadInputError(
            "config.json has use_bidirectional_attention in its text_config, which a model that answers does not have: copy "
            "config.json from the model's page"
        )
    pooled = round(tokens**0.5)
    if not 0 < pooled <= side or pooled * pooled != tokens or side // (side // pooled) != pooled:
        raise BadInputError(
            f"config.json pools {side} x {side} patches to {tokens} tokens (mm_tokens_per_image), which is no square that fits: copy "
            "config.json from the model's page"
        )


FAMILY = Gemma3(
    name="gemma3",
    architecture="Gemma3ForConditionalGeneration",
    processor_outputs=("input_ids", "attention_mask", "token_type_ids", "pixel_values"),
    sequence_inputs=("input_ids", "attention_mask", "token_type_ids"),
    text_models=("gemma3_text",),
    vision_models=("siglip_vision_model",),
    tokenizer_graphs=True,
    crops_for_genai=False,
)
