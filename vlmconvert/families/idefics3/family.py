"""Idefics3: images are cut into tiles, whose features are those of squares of patches."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from manifests.errors import BadInputError
from manifests.model import Port
from passes.vocabulary import Block, Component, HostStep, Kind, kinds_by_name
from vlmconvert.families.llava.family import Llava
from vlmconvert.families.parts.decoder import TEXT_MODELS, check_text_model, language_model, text_embeddings
from vlmconvert.families.parts.ports import float_port, int_port

if TYPE_CHECKING:
    import numpy as np

    from passes.validate.model import Model

    Arrays = dict[str, np.ndarray]

__all__ = ["FAMILY", "Idefics3"]

_MODULES = "vlmconvert.families.idefics3.modules"
_TEXT, _TOWER = "model.text_model", "model.vision_model"
# Numbers of columns and rows of tiles of the images for calibration; the whole image is one tile more.
_GRIDS = ((2, 1), (1, 2), (2, 2))


class Idefics3(Llava):
    """Idefics3; features enter as in LLaVA. SmolVLM inherits from this class."""

    def components(self, config: dict[str, Any]) -> tuple[Component, ...]:
        """Vision tower with the connector, text embeddings and language model."""
        check_text_model(config, self.text_models)
        _check_config(config)
        step = HostStep(
            "vlmconvert.families.internvl.features:merge_features",
            ("input_ids", "inputs_embeds", "image_features"),
            ("inputs_embeds",),
        )
        return (
            _tower(config),
            text_embeddings(config, "image_token_id", model=_TEXT),
            language_model(config, step, model=_TEXT),
        )

    def ties(self, config: dict[str, Any]) -> dict[str, str]:
        return dict.fromkeys(super().ties(config), f"{_TEXT}.embed_tokens.weight")

    def inputs(self, processed: Arrays, config: dict[str, Any]) -> Arrays:
        """See `Family.inputs`.

        Args:
            processed: with images also pixel_values [batch, tiles, channels, size, size], padded with zeros to the largest number
                of tiles, and pixel_attention_mask [batch, tiles, size, size].
            config: the completed config.

        Returns:
            With images also pixel_values [tiles of all images, channels, size, size], patch_attention_mask [tiles, rows, columns]
            and patch_position_ids [tiles, patches].
        """
        from vlmconvert.families.idefics3.features import tile_inputs
        from vlmconvert.families.parts.decoder_inputs import decoder_inputs

        values = decoder_inputs(processed, config)
        return values | (tile_inputs(processed, config) if "pixel_values" in processed else {})

    def image_token(self, config: dict[str, Any]) -> int:
        return int(config["image_token_id"])

    def image_sizes(self, config: dict[str, Any]) -> list[tuple[int, int]]:
        """Sizes with 2 and 4 tiles."""
        size = config["vision_config"]["image_size"]
        return [(wide * size, high * size) for wide, high in _GRIDS]

    def image_tokens(self, config: dict[str, Any]) -> int:
        """Those of 16 tiles and of the whole image, the limit in the processors of the published models."""
        return 17 * _tokens(config)

    def open_processor(self, folder: Path) -> Any:
        """See `Family.open_processor`; LLaVA's settings are not needed."""
        return super(Llava, self).open_processor(folder)

    def reference(self, folder: Path) -> Model:
        from vlmconvert.families.llava.reference import Reference

        return Reference(folder, self.architecture, "image_features", projector="connector")


def _side(config: dict[str, Any]) -> int:
    """Rows and columns of patches of a tile."""
    return int(config["vision_config"]["image_size"] // config["vision_config"]["patch_size"])


def _tokens(config: dict[str, Any]) -> int:
    """Number of features of a tile."""
    return (_side(config) // int(config["scale_factor"])) ** 2


def _check_config(config: dict[str, Any]) -> None:
    vision, scale = config["vision_config"], config["scale_factor"]
    size, patch = vision["image_size"], vision["patch_size"]
    if not isinstance(size, int) or not isinstance(patch, int) or not 0 < patch <= size:
        raise BadInputError(
            f"config.json cuts tiles of {size} into patches of {patch} (image_size and patch_size of vision_config), and both are sides "
            "of squares: copy config.json from the model's page"
        )
    if scale < 1 or _side(config) % scale:
        raise BadInputError(
            f"config.json joins {scale} of {_side(config)} rows of patches (scale_factor), which makes no whole features: copy "
            "config.json from the model's page"
        )


def _tower(config: dict[str, Any]) -> Component:
    """`pixel_values`, `patch_attention_mask`, `patch_position_ids` -> `image_features` [tiles, tokens, width of the language model]."""
    vision, side = config["vision_config"], _side(config)
    size, patches = vision["image_size"], side**2
    pixel_values = float_port("pixel_values", "images", vision["num_channels"], size, size)
    patch_mask = Port(name="patch_attention_mask", dtype="boolean", shape=["images", side, side])
    position_ids = int_port("patch_position_ids", "images", patches)
    hidden_states = float_port("hidden_states", "images", patches, vision["hidden_size"])
    mask = float_port("mask", "images", 1, 1, patches)
    features = float_port("image_features", "images", _tokens(config), config["text_config"]["hidden_size"])
    dims = {"images": 2}
    embeddings = Kind(
        "vision_embeddings", f"{_MODULES}:vision_embeddings", (pixel_values, position_ids), (hidden_states,), dims
    )
    masks = Kind("vision_mask", f"{_MODULES}:vision_mask", (patch_mask,), (mask,), dims)
    layer = Kind("vision_layer", f"{_MODULES}:vision_layer", (hidden_states, mask), (hidden_states,), dims)
    connector = Kind("connector", f"{_MODULES}:connector", (hidden_states,), (features,), dims)

    def block(name: str, kind: Kind, weights: dict[str, str], role: str) -> Block:
        inputs, outputs = ({port.name: port.name for port in ports} for ports in (kind.inputs, kind.outputs))
        return Block(name, kind.name, weights, inputs, outputs, role=role)

    layers = (
        block(f"layers.{index}", layer, {"layer": f"{_TOWER}.encoder.layers.{index}"}, "layer")
        for index in range(vision["num_hidden_layers"])
    )
    last = {"norm": f"{_TOWER}.post_layernorm", "connector": "model.connector"}
    return Component(
        name="vision_embeddings",
        side="vision",
        role="vision tower with the connector",
        kinds=kinds_by_name(embeddings, masks, layer, connector),
        blocks=(
            block("embeddings", embeddings, {"": f"{_TOWER}.embeddings"}, "embeddings"),
            block("mask", masks, {}, "glue"),
            *layers,
            block("connector", connector, last, "layer"),
        ),
        inputs=(pixel_values, patch_mask, position_ids),
        outputs=(features,),
        aliases={"image_features": "last_hidden_state"},
    )


FAMILY = Idefics3(
    name="idefics3",
    architecture="Idefics3ForConditionalGeneration",
    processor_outputs=("input_ids", "attention_mask", "pixel_values", "pixel_attention_mask"),
    text_models=TEXT_MODELS,
    vision_models=("idefics3_vision",),
)
