"""LLaVA-NeXT: LLaVA whose images are cut into patches at the best of several resolutions.

A newline embedding follows every row of an image's features.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from manifests.errors import BadInputError
from passes.vocabulary import Component, HostStep
from vlmconvert.families.llava.family import FAMILY as LLAVA
from vlmconvert.families.llava.family import Llava
from vlmconvert.families.parts.decoder import check_text_model, language_model, text_embeddings
from vlmconvert.families.parts.vision_tower import has_class, patch_side, patch_tokens, vision_embeddings

if TYPE_CHECKING:
    import numpy as np

__all__ = ["FAMILY", "LlavaNext", "check_grid"]


class LlavaNext(Llava):
    """LLaVA-NeXT; LLaVA-NeXT-Video inherits from this class."""

    def components(self, config: dict[str, Any]) -> tuple[Component, ...]:
        """Vision tower with projector, text embeddings and language model."""
        check_text_model(config, self.text_models)
        vision = vision_embeddings(config, project=True)
        check_grid(config)
        step = HostStep(
            "vlmconvert.families.llava_next.features:merge_features",
            ("input_ids", "inputs_embeds", "image_features", "image_sizes"),
            ("inputs_embeds",),
        )
        return (vision, text_embeddings(config, "image_token_index"), language_model(config, step))

    def inputs(self, processed: dict[str, np.ndarray], config: dict[str, Any]) -> dict[str, np.ndarray]:
        """See `Family.inputs`.

        Args:
            processed: with images also pixel_values [images, patches, channels, size, size], padded to the largest number of
                patches, and image_sizes [images, 2] (height, width).
            config: the completed config.

        Returns:
            With images also pixel_values [patches of all images, channels, size, size] and image_sizes, unchanged.
        """
        from vlmconvert.families.llava_next.features import flat_patches
        from vlmconvert.families.parts.decoder_inputs import decoder_inputs

        values = decoder_inputs(processed, config)
        if "pixel_values" in processed:
            values["image_sizes"] = processed["image_sizes"].astype("int64")
            values["pixel_values"] = flat_patches(processed["pixel_values"], values["image_sizes"], config)
        return values

    def image_sizes(self, config: dict[str, Any]) -> list[tuple[int, int]]:
        """The resolutions of `image_grid_pinpoints`; each is cut into a grid of its own."""
        return [(wide, high) for high, wide in config["image_grid_pinpoints"]]

    def image_tokens(self, config: dict[str, Any]) -> int:
        """Maximum number of tokens per image: the whole image, its patches, and a newline after every row."""
        vision = config["vision_config"]
        side = patch_side(vision)
        grids = (
            (-(-high // vision["image_size"]), -(-wide // vision["image_size"]))
            for high, wide in config["image_grid_pinpoints"]
        )
        return patch_tokens(config) + max(rows * side * (columns * side + 1) for rows, columns in grids)


def check_grid(config: dict[str, Any]) -> None:
    """Refuse a config with which neither vlmconvert nor transformers can pack image features.

    Raises:
        BadInputError: if the config has no list of resolutions, or the features of a patch do not form a square.
    """
    resolutions = config["image_grid_pinpoints"]
    if not resolutions or not all(
        isinstance(pair, list | tuple) and len(pair) == 2 and min(pair) > 0 for pair in resolutions
    ):
        raise BadInputError(
            "config.json has no list of resolutions, as pairs of height and width (image_grid_pinpoints): copy it from the "
            "model's page"
        )
    side = patch_side(config["vision_config"])
    if patch_tokens(config) != side * side:
        strategy = config["vision_feature_select_strategy"]
        raise BadInputError(
            f"config.json takes {patch_tokens(config)} features of a patch whose grid has {side} x {side} "
            f"(vision_feature_select_strategy {strategy}): set it to "
            f"{'default' if has_class(config['vision_config']) else 'full'}"
        )


assert LLAVA.ascend is not None
_PREFIXES = (*LLAVA.ascend.name_prefixes, "image_newline")
FAMILY = LlavaNext(
    name="llava-next",
    architecture="LlavaNextForConditionalGeneration",
    processor_outputs=("input_ids", "attention_mask", "pixel_values", "image_sizes"),
    # OpenVINO's runtimes read the newline's embedding from the config.
    config_tensors={"image_newline": "model.image_newline"},
    text_models=LLAVA.text_models,
    vision_models=LLAVA.vision_models,
    tokenizer_graphs=True,
    ascend=replace(LLAVA.ascend, name_prefixes=_PREFIXES, names_text_model=True),
)
