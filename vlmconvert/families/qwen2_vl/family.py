"""Qwen2-VL: images and videos of any size; every token has positions in time, height and width."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from passes.ascend.family import AscendFamily, VisionStack
from passes.vocabulary import Component, HostStep
from vlmconvert.families.base import Family
from vlmconvert.families.parts.decoder import check_text_model, language_model, text_embeddings
from vlmconvert.families.parts.grid_tower import check_grid_tower, grid_tower, patch_embeddings

if TYPE_CHECKING:
    import numpy as np

    from passes.validate.model import Model

    Arrays = dict[str, np.ndarray]

__all__ = ["FAMILY", "Qwen2VL", "ascend_family"]

_FEATURES = "vlmconvert.families.qwen2_vl.features"
_TOKENS = ("image_token_id", "video_token_id")
# Sizes of images in features: the processor resizes every image to whole features, and to no fewer or more than its limits.
_SIZES = ((8, 12), (12, 8), (16, 16))


class Qwen2VL(Family):
    """Qwen2-VL; Qwen2.5-VL and Qwen3-VL inherit from this class."""

    # Class of transformers that processes videos, and the model to which it belongs.
    videos: ClassVar[tuple[str, str]] = ("qwen2_vl", "Qwen2VLVideoProcessor")

    def components(self, config: dict[str, Any]) -> tuple[Component, ...]:
        """Patch embeddings, vision tower with the merger, text embeddings and language model."""
        self.check(config)
        step = HostStep(
            f"{_FEATURES}:tower_inputs",
            ("patch_embeds", "image_grid_thw", "video_grid_thw"),
            ("vision_attention_mask", "rotary_pos_emb"),
        )
        return (patch_embeddings(config), grid_tower(config, step), *self.text(config))

    def check(self, config: dict[str, Any]) -> None:
        """Refuse a config that describes a model which cannot be converted."""
        check_text_model(config, self.text_models)
        check_grid_tower(config)

    def text(self, config: dict[str, Any]) -> tuple[Component, Component]:
        """Text embeddings and language model."""
        step = HostStep(
            f"{_FEATURES}:merge_features",
            ("input_ids", "inputs_embeds", "image_features", "image_grid_thw"),
            ("inputs_embeds",),
        )
        positions = "vlmconvert.families.parts.grid_tower_modules:axis_positions"
        return text_embeddings(config, *_TOKENS), language_model(config, step, positions, position_axes=3)

    def inputs(self, processed: Arrays, config: dict[str, Any]) -> Arrays:
        """See `Family.inputs`.

        Args:
            processed: with images also pixel_values [patches, values] and image_grid_thw [images, 3], with videos
                pixel_values_videos and video_grid_thw.
            config: the completed config.

        Returns:
            pixel_values has the patches of all images, followed by those of all videos; image_grid_thw and video_grid_thw are
            there if one of them is. position_ids [3, batch, sequence].
        """
        import numpy as np

        from vlmconvert.families.parts.decoder_inputs import decoder_inputs
        from vlmconvert.families.parts.grids import multimodal_positions

        values = decoder_inputs(processed, config)
        pixels = [processed[name] for name in ("pixel_values", "pixel_values_videos") if name in processed]
        if pixels:
            values["pixel_values"] = np.concatenate(pixels).astype(np.float32)
            for name in ("image_grid_thw", "video_grid_thw"):
                values[name] = processed.get(name, np.empty((0, 3))).astype(np.int64)
        image, video = (config[name] for name in _TOKENS)
        grids: dict[int, Iterator[Sequence[Any]]] = {
            image: iter([(*grid, 1) for grid in processed.get("image_grid_thw", np.empty((0, 3), np.int64)).tolist()]),
            video: iter(self.moments(processed, config)) if "video_grid_thw" in processed else iter(()),
        }
        merge = config["vision_config"]["spatial_merge_size"]
        values["position_ids"] = multimodal_positions(values, grids, merge)
        return values

    def moments(self, processed: Arrays, config: dict[str, Any]) -> list[tuple[Any, ...]]:
        """For each run of video tokens its grid, and the number of positions between two of its points in time."""
        return [(*grid, 1) for grid in processed["video_grid_thw"].tolist()]

    def next_inputs(self, previous: Arrays, tokens: np.ndarray) -> Arrays:
        from vlmconvert.families.parts.decoder_inputs import next_decoder_inputs

        last = previous["position_ids"].max(axis=(0, 2))[None, :, None]
        return next_decoder_inputs(previous, tokens) | {"position_ids": (last + 1).repeat(3, axis=0)}

    def repeat_rows(self, inputs: Arrays, times: int) -> Arrays:
        repeated = super().repeat_rows(inputs, times)
        if "position_ids" in inputs:
            repeated["position_ids"] = inputs["position_ids"].repeat(times, axis=1)
        return repeated

    def image_token(self, config: dict[str, Any]) -> int:
        return int(config["image_token_id"])

    def video_token(self, config: dict[str, Any]) -> int:
        return int(config["video_token_id"])

    def image_sizes(self, config: dict[str, Any]) -> list[tuple[int, int]]:
        """A wide, a high and a square size, with 96 and 256 features."""
        vision = config["vision_config"]
        side = vision["patch_size"] * vision["spatial_merge_size"]
        return [(side * wide, side * high) for high, wide in _SIZES]

    def image_tokens(self, config: dict[str, Any]) -> int:
        """16384, the limit in the processors of the published models."""
        return 16384

    def open_processor(self, folder: Path) -> Any:
        from vlmconvert.families.parts.video import load_frames_processor

        # Without a word about the cap, transformers warns.
        return load_frames_processor(folder, self.model_type, *self.videos, cap_pixels_per_frame=False)

    def reference(self, folder: Path) -> Model:
        from vlmconvert.families.qwen2_vl.reference import Reference

        return Reference(folder, self.architecture)


def ascend_family(*feed_forward: str, mergers: tuple[str, ...] = ("merger.mlp.0", "merger.mlp.2")) -> AscendFamily:
    """What vllm-ascend needs to know; the rules of MindIE's models of the family are not known here.

    Args:
        feed_forward: linear layers of the tower's MLP.
        mergers: linear layers of the mergers.
    """
    return AscendFamily(
        dtypes=("bfloat16", "float16"),
        runtimes=("vllm-ascend",),
        image_key="image_token_id",
        notes=("mindie: the artifact is not held against the rules of its Qwen-VL models, and may not load there",),
        name_prefixes=("model.language_model.", "visual.", "lm_head."),
        vision_stacks=(VisionStack("visual.blocks", "depth", linears=("attn.qkv", "attn.proj", *feed_forward)),),
        projector=tuple(f"visual.{name}" for name in mergers),
        text_prefix="model.language_model.",
        head="lm_head",
    )


FAMILY = Qwen2VL(
    name="qwen2-vl",
    architecture="Qwen2VLForConditionalGeneration",
    processor_outputs=(
        "input_ids",
        "attention_mask",
        "mm_token_type_ids",
        "pixel_values",
        "image_grid_thw",
        "pixel_values_videos",
        "video_grid_thw",
    ),
    sequence_inputs=("input_ids", "attention_mask", "mm_token_type_ids"),
    text_models=("qwen2_vl_text",),
    vision_models=("qwen2_vl_vision",),
    tokenizer_graphs=True,
    crops_for_genai=False,
    ascend=ascend_family("mlp.fc1", "mlp.fc2"),
    # Without it, GenAI places two moments of a video as far from each other as Qwen2.5-VL does.
    genai_config={"vision_config": {"tokens_per_second": 1}},
)
