"""LLaVA-NeXT-Video: LLaVA-NeXT that also takes videos, whose features are pooled before they are projected.

Vision tower, pooling and projector are three graphs, as OpenVINO's runtimes expect them.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from manifests.errors import BadInputError
from passes.vocabulary import Block, Component, HostStep, Kind, kinds_by_name
from vlmconvert.families.llava_next.family import FAMILY as LLAVA_NEXT
from vlmconvert.families.llava_next.family import LlavaNext, check_grid
from vlmconvert.families.parts.decoder import check_text_model, language_model, text_embeddings
from vlmconvert.families.parts.ports import float_port
from vlmconvert.families.parts.vision_tower import (
    PROJECTOR_WEIGHTS,
    feature_width,
    patch_side,
    patch_tokens,
    vision_embeddings,
)

if TYPE_CHECKING:
    import numpy as np

    from passes.validate.model import Model

__all__ = ["FAMILY", "LlavaNextVideo"]

_MODULES = "vlmconvert.families.parts.vision_tower_modules"
_FEATURES = "vlmconvert.families.llava_next_video.features"
_POOLS = ("average", "max", "conv")


class LlavaNextVideo(LlavaNext):
    """LLaVA-NeXT-Video."""

    def components(self, config: dict[str, Any]) -> tuple[Component, ...]:
        """Vision tower, pooling, projector, text embeddings and language model."""
        check_text_model(config, self.text_models)
        vision = vision_embeddings(config, project=False)
        check_grid(config)
        _check_pooling(config)
        step = HostStep(
            f"{_FEATURES}:merge_features",
            ("input_ids", "inputs_embeds", "hidden_states", "image_sizes", "patches"),
            ("inputs_embeds",),
        )
        return (
            vision,
            _vision_resampler(config),
            _multi_modal_projector(config),
            text_embeddings(config, "image_token_index", "video_token_index"),
            language_model(config, step),
        )

    def inputs(self, processed: dict[str, np.ndarray], config: dict[str, Any]) -> dict[str, np.ndarray]:
        """See `Family.inputs`.

        Args:
            processed: as for LLaVA-NeXT; with videos also pixel_values_videos [videos, frames, channels, size, size].
            config: the completed config.

        Returns:
            pixel_values has the patches of all images, followed by the frames of all videos; `patches` [1] is the
            number of image patches among them.
        """
        import numpy as np

        values = super().inputs(processed, config)
        pixels = [values["pixel_values"]] if "pixel_values" in values else []
        values["patches"] = np.array([sum(map(len, pixels))], np.int64)
        if "pixel_values_videos" in processed:
            videos = processed["pixel_values_videos"]
            pixels.append(videos.reshape(-1, *videos.shape[2:]).astype(np.float32))
        if pixels:
            values["pixel_values"] = np.concatenate(pixels)
        return values

    def video_token(self, config: dict[str, Any]) -> int:
        return int(config["video_token_index"])

    def open_processor(self, folder: Path) -> Any:
        from vlmconvert.families.llava.processor import complete_processor
        from vlmconvert.families.llava_next_video.video import FrameProcessor
        from vlmconvert.families.parts.video import load_video_processor

        processor = load_video_processor(folder, self.model_type, FrameProcessor)
        complete_processor(processor, folder)
        return processor

    def reference(self, folder: Path) -> Model:
        from vlmconvert.families.llava.reference import Reference

        return Reference(folder, self.architecture, "hidden_states", joined=True)


def _check_pooling(config: dict[str, Any]) -> None:
    mode, stride, side = config["spatial_pool_mode"], config["spatial_pool_stride"], patch_side(config["vision_config"])
    if mode not in _POOLS:
        raise BadInputError(
            f"config.json pools video frames by {mode} (spatial_pool_mode): set it to {', '.join(_POOLS)}"
        )
    if not 1 <= stride <= side:
        raise BadInputError(
            f"config.json pools video frames of {side} x {side} features with a stride of {stride} (spatial_pool_stride): set it to "
            f"1 to {side}"
        )


def _vision_resampler(config: dict[str, Any]) -> Component:
    width = feature_width(config)
    frames = float_port("video_hidden_states", "frames", patch_tokens(config), width)
    pooled = float_port("pooled_hidden_states", "frames", _pooled_tokens(config), width)
    weights = {"": "model.vision_resampler"} if config["spatial_pool_mode"] == "conv" else {}
    return Component(
        name="vision_resampler",
        side="vision",
        role="pooling of video frames",
        kinds=kinds_by_name(
            Kind("vision_resampler", f"{_MODULES}:vision_resampler", (frames,), (pooled,), {"frames": 2})
        ),
        blocks=(
            Block(
                "vision_resampler",
                "vision_resampler",
                weights,
                {frames.name: frames.name},
                {pooled.name: pooled.name},
                role="layer" if weights else "glue",
            ),
        ),
        inputs=(frames,),
        outputs=(pooled,),
        host_step=HostStep(f"{_FEATURES}:frames_to_pool", ("last_hidden_state", "patches"), (frames.name,)),
        calibrated=False,
    )


def _multi_modal_projector(config: dict[str, Any]) -> Component:
    features = float_port("image_features", "images", "tokens", feature_width(config))
    projected = float_port("hidden_states", "images", "tokens", config["text_config"]["hidden_size"])
    return Component(
        name="multi_modal_projector",
        side="vision",
        role="projector",
        kinds=kinds_by_name(
            Kind(
                "multi_modal_projector",
                f"{_MODULES}:multi_modal_projector",
                (features,),
                (projected,),
                {"images": 2, "tokens": 3},
            )
        ),
        blocks=(
            Block(
                "multi_modal_projector",
                "multi_modal_projector",
                PROJECTOR_WEIGHTS,
                {features.name: features.name},
                {projected.name: projected.name},
            ),
        ),
        inputs=(features,),
        outputs=(projected,),
        host_step=HostStep(
            f"{_FEATURES}:to_project", ("last_hidden_state", "pooled_hidden_states", "patches"), (features.name,)
        ),
    )


def _pooled_tokens(config: dict[str, Any]) -> int:
    return int(patch_side(config["vision_config"]) // config["spatial_pool_stride"]) ** 2


assert LLAVA_NEXT.ascend is not None
_PREFIXES = (*LLAVA_NEXT.ascend.name_prefixes, "vision_resampler.")
FAMILY = LlavaNextVideo(
    name="llava-next-video",
    architecture="LlavaNextVideoForConditionalGeneration",
    processor_outputs=("input_ids", "attention_mask", "pixel_values", "image_sizes", "pixel_values_videos"),
    config_tensors=LLAVA_NEXT.config_tensors,
    text_models=LLAVA_NEXT.text_models,
    vision_models=LLAVA_NEXT.vision_models,
    tokenizer_graphs=True,
    ascend=replace(LLAVA_NEXT.ascend, name_prefixes=_PREFIXES),
)
