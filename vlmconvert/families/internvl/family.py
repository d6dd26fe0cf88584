"""InternVL: images are cut into tiles, whose features are those of squares of patches; a video is a series of tiles."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from manifests.errors import BadInputError
from passes.vocabulary import Block, Component, HostStep, Kind, kinds_by_name
from vlmconvert.families.llava.family import Llava
from vlmconvert.families.parts.decoder import TEXT_MODELS, check_text_model, language_model, text_embeddings
from vlmconvert.families.parts.ports import float_port

if TYPE_CHECKING:
    from passes.validate.model import Model

__all__ = ["FAMILY", "InternVL"]

_MODULES = "vlmconvert.families.internvl.modules"
_TOWER = "model.vision_tower"
# Numbers of columns and rows of tiles of the images for calibration; a whole image is one tile more.
_GRIDS = ((1, 1), (2, 1), (1, 2), (2, 2))


class InternVL(Llava):
    """transformers' InternVL; features enter as in LLaVA."""

    def components(self, config: dict[str, Any]) -> tuple[Component, ...]:
        """Vision tower with the projector, text embeddings and language model."""
        check_text_model(config, self.text_models)
        _check_config(config)
        step = HostStep(
            "vlmconvert.families.internvl.features:merge_features",
            ("input_ids", "inputs_embeds", "image_features"),
            ("inputs_embeds",),
        )
        return (_tower(config), text_embeddings(config, "image_token_id"), language_model(config, step))

    @property
    def takes_videos(self) -> bool:
        return True

    def image_token(self, config: dict[str, Any]) -> int:
        return int(config["image_token_id"])

    def video_token(self, config: dict[str, Any]) -> int:
        """The token of images: a frame of a video is a tile."""
        return self.image_token(config)

    def image_sizes(self, config: dict[str, Any]) -> list[tuple[int, int]]:
        """Sizes with 1 to 4 tiles."""
        (size, *_) = _pair(config["vision_config"]["image_size"])
        return [(wide * size, high * size) for wide, high in _GRIDS]

    def image_tokens(self, config: dict[str, Any]) -> int:
        """Those of 12 tiles and of the whole image, the limit in the processors of the published models."""
        return 13 * _tokens(config)

    def open_processor(self, folder: Path) -> Any:
        from vlmconvert.families.parts.video import load_frames_processor

        return load_frames_processor(folder, self.model_type, "internvl", "InternVLVideoProcessor")

    def reference(self, folder: Path) -> Model:
        from vlmconvert.families.llava.reference import Reference

        return Reference(folder, self.architecture, "image_features")


def _pair(size: int | Sequence[int]) -> tuple[int, int]:
    """Height and width; older configs have one number for both."""
    high, wide = (size, size) if isinstance(size, int) else size
    return high, wide


def _side(config: dict[str, Any]) -> int:
    """Rows and columns of patches of a tile."""
    vision = config["vision_config"]
    return _pair(vision["image_size"])[0] // _pair(vision["patch_size"])[0]


def _tokens(config: dict[str, Any]) -> int:
    """Number of features of a tile."""
    return int(_side(config) * config["downsample_ratio"]) ** 2


def _check_config(config: dict[str, Any]) -> None:
    vision, ratio = config["vision_config"], config["downsample_ratio"]
    (high, wide), (tall, broad) = _pair(vision["image_size"]), _pair(vision["patch_size"])
    if high != wide or tall != broad or not 0 < tall <= high:
        raise BadInputError(
            f"config.json cuts tiles of {high} x {wide} into patches of {tall} x {broad} (image_size and patch_size of vision_config), "
            "and both are squares: copy config.json from the model's page"
        )
    if not 0 < ratio <= 1 or 1 / ratio != int(1 / ratio) or _side(config) % int(1 / ratio):
        raise BadInputError(
            f"config.json joins {ratio} of {_side(config)} rows of patches (downsample_ratio), which makes no whole features: copy "
            "config.json from the model's page"
        )
    for name, known in (("vision_feature_layer", -1), ("vision_feature_select_strategy", "default")):
        if config[name] != known:
            raise BadInputError(
                f"config.json has {name} {config[name]}, and InternVL's runtimes know {known} alone: copy config.json from the model's "
                "page"
            )


def _tower(config: dict[str, Any]) -> Component:
    """`pixel_values` [tiles, channels, size, size] -> `image_features` [tiles, tokens, width of the language model]."""
    vision = config["vision_config"]
    size, positions = _pair(vision["image_size"])[0], _side(config) ** 2 + 1
    pixel_values = float_port("pixel_values", "images", vision["num_channels"], size, size)
    hidden_states = float_port("hidden_states", "images", positions, vision["hidden_size"])
    features = float_port("image_features", "images", _tokens(config), config["text_config"]["hidden_size"])
    dims = {"images": 2}
    kinds = kinds_by_name(
        Kind("vision_embeddings", f"{_MODULES}:vision_embeddings", (pixel_values,), (hidden_states,), dims),
        Kind("vision_layer", f"{_MODULES}:vision_layer", (hidden_states,), (hidden_states,), dims),
        Kind("shuffle_and_project", f"{_MODULES}:shuffle_and_project", (hidden_states,), (features,), dims),
    )
    states = {"hidden_states": "hidden_states"}
    last = {"projector": "model.multi_modal_projector"}
    if not vision["use_mean_pooling"]:
        last["layernorm"] = f"{_TOWER}.layernorm"
    layers = [
        Block(f"layers.{index}", "vision_layer", {"": f"{_TOWER}.encoder.layer.{index}"}, states, states)
        for index in range(vision["num_hidden_layers"])
    ]
    pixels, made = {"pixel_values": "pixel_values"}, {features.name: features.name}
    return Component(
        name="vision_embeddings",
        side="vision",
        role="vision tower with the projector",
        kinds=kinds,
        blocks=(
            Block("embeddings", "vision_embeddings", {"": f"{_TOWER}.embeddings"}, pixels, states, role="embeddings"),
            *layers,
            Block("multi_modal_projector", "shuffle_and_project", last, states, made),
        ),
        inputs=(pixel_values,),
        outputs=(features,),
        aliases={"image_features": "last_hidden_state"},
    )


FAMILY = InternVL(
    name="internvl",
    architecture="InternVLForConditionalGeneration",
    processor_outputs=("input_ids", "attention_mask", "pixel_values"),
    text_models=TEXT_MODELS,
    vision_models=("internvl_vision",),
    tokenizer_graphs=True,
    # OpenVINO GenAI knows the model by its first name.
    genai_config={"model_type": "internvl_chat"},
)
