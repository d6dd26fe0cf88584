"""mllama (Llama 3.2 Vision): the features of image tiles enter the language model through cross-attention."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from manifests.errors import BadInputError
from passes.ascend.family import AscendFamily, CrossAttention, VisionStack
from passes.vocabulary import Component
from vlmconvert.families.base import Family
from vlmconvert.families.mllama.language_model import language_model
from vlmconvert.families.mllama.vision_encoder import vision_encoder

if TYPE_CHECKING:
    import numpy as np

    from passes.validate.model import Model

__all__ = ["FAMILY", "Mllama", "image_positions"]


class Mllama(Family):
    """mllama."""

    def components(self, config: dict[str, Any]) -> tuple[Component, ...]:
        """The vision encoder and the language model."""
        check_layers(config)
        return (vision_encoder(config), language_model(config))

    def inputs(self, processed: dict[str, np.ndarray], config: dict[str, Any]) -> dict[str, np.ndarray]:
        """See `vlmconvert.families.mllama.inputs.inputs`."""
        from vlmconvert.families.mllama.inputs import inputs

        return inputs(processed, config)

    def next_inputs(self, previous: dict[str, np.ndarray], tokens: np.ndarray) -> dict[str, np.ndarray]:
        from vlmconvert.families.mllama.inputs import next_inputs

        return next_inputs(previous, tokens)

    def image_token(self, config: dict[str, Any]) -> int:
        return int(config["image_token_index"])

    def image_sizes(self, config: dict[str, Any]) -> list[tuple[int, int]]:
        """One size for each number of tiles that an image can be cut into."""
        vision = config["vision_config"]
        size: int = vision["image_size"]
        return [(size * count, size) for count in range(1, vision["max_num_tiles"] + 1)]

    def image_tokens(self, config: dict[str, Any]) -> int:
        """1, because the image features enter through cross-attention."""
        return 1

    def reference(self, folder: Path) -> Model:
        from vlmconvert.families.mllama.reference import Reference

        return Reference(folder)


def check_layers(config: dict[str, Any]) -> None:
    """Refuse a config whose numbers of layers do not fit the layers that it names.

    Raises:
        BadInputError: with the entry of the config.
    """
    text, vision = config["text_config"], config["vision_config"]
    for part, name in ((text, "num_hidden_layers"), (vision, "num_hidden_layers"), (vision, "num_global_layers")):
        if part[name] < 1:
            raise BadInputError(
                f"config.json has {name} {part[name]}, and a model has at least one layer: copy config.json from the model's page"
            )
    for part, name in ((text, "cross_attention_layers"), (vision, "intermediate_layers_indices")):
        chosen, count = list(part[name]), part["num_hidden_layers"]
        if not chosen or len(set(chosen)) < len(chosen) or not all(0 <= index < count for index in chosen):
            raise BadInputError(
                f"config.json has {name} {chosen}, and not some of the {count} layers from 0 to {count - 1}: copy config.json from "
                "the model's page"
            )


def image_positions(config: dict[str, Any]) -> int:
    """Maximum number of features per image: all patches of all tiles, and one class token for each tile."""
    vision = config["vision_config"]
    tiles: int = vision["max_num_tiles"]
    return tiles * ((vision["image_size"] // vision["patch_size"]) ** 2 + 1)


FAMILY = Mllama(
    name="mllama",
    architecture="MllamaForConditionalGeneration",
    processor_outputs=(
        "input_ids",
        "attention_mask",
        "cross_attention_mask",
        "pixel_values",
        "aspect_ratio_ids",
        "aspect_ratio_mask",
    ),
    sequence_inputs=("input_ids", "attention_mask", "cross_attention_mask"),
    text_models=("mllama_text_model",),
    vision_models=("mllama_vision_model",),
    ascend=AscendFamily(
        script="mllama",
        frames=0,
        dtypes=("bfloat16",),
        runtimes=("mindie",),
        image_key="image_token_index",
        notes=(
            "mindie: it loads these weights, and its own table of models lists mllama in bfloat16 only",
            "vllm-ascend: vLLM has dropped mllama (vllm-project/vllm#24907)",
        ),
        name_prefixes=("vision_model.", "multi_modal_projector.", "language_model.model.", "language_model.lm_head."),
        vision_stacks=(
            VisionStack("vision_model.transformer.layers"),
            VisionStack("vision_model.global_transformer.layers", "num_global_layers"),
        ),
        projector=("multi_modal_projector",),
        cross_attention=CrossAttention("cross_attention_layers", "cross_attn", image_positions),
    ),
    demo=Path(__file__).parents[2] / "demo" / "mllama",
)
