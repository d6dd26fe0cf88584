"""Processing of videos without torchvision: each frame is processed as an image.

transformers' own video processors need torchvision.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from manifests.errors import BadInputError
from passes.compat.transformers import image_processor_class, processor_class, with_any_video_processor

__all__ = ["FrameProcessor", "load_video_processor"]

_PROCESSOR, _IMAGES, _VIDEOS = "processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json"


class FrameProcessor:
    """Stands in for a video processor: CLIP's image processor processes each frame with the settings for videos.

    Args:
        settings: the checkpoint's settings for videos; missing settings get transformers' defaults.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        from transformers import CLIPImageProcessorPil

        names = (
            "do_resize",
            "size",
            "resample",
            "do_center_crop",
            "crop_size",
            "do_rescale",
            "rescale_factor",
            "do_normalize",
            "image_mean",
            "image_std",
            "do_convert_rgb",
        )
        self._frames = CLIPImageProcessorPil(**{name: settings[name] for name in names if name in settings})

    def __call__(self, videos: Sequence[Any], **_options: Any) -> dict[str, np.ndarray]:
        """Process videos, all with the same number of frames.

        Args:
            videos: the frames of each video, or for each prompt a list of videos.

        Returns:
            `pixel_values_videos` [videos, frames, channels, height, width], float32.

        Raises:
            BadInputError: if the videos have different numbers of frames.
        """
        flat: list[Any] = [
            video
            for prompt in videos
            if len(prompt)
            for video in (prompt if isinstance(prompt[0], (list, tuple)) else [prompt])
        ]
        lengths = sorted({len(frames) for frames in flat})
        if len(lengths) > 1:
            raise BadInputError(
                f"the videos have {' and '.join(map(str, lengths))} frames: give videos with the same number of frames"
            )
        pixels = [self._frames(list(frames), return_tensors="np")["pixel_values"] for frames in flat]
        return {"pixel_values_videos": np.stack(pixels)}


def load_video_processor(folder: Path) -> Any:
    """Load a processor for images, videos and text that processes videos with `FrameProcessor`.

    Checkpoints of transformers 4 keep the settings in several files; each is read from the files in which transformers
    looks.

    Args:
        folder: the checkpoint.

    Raises:
        OSError, ValueError, KeyError: if a file is missing or damaged.
    """
    import transformers

    model_type = _read(folder / "config.json")["model_type"]
    config = _read(folder / _PROCESSOR)
    settings = config.pop("video_processor", None) or _read(folder / _VIDEOS) or _read(folder / _IMAGES)
    config.pop("image_processor", None)
    base = getattr(transformers, config.pop("processor_class", processor_class(model_type)))
    processor = with_any_video_processor(base)
    # The class is found by the model's type, because older files name a class that transformers has removed.
    images = image_processor_class(model_type).from_pretrained(folder, local_files_only=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    template = folder / "chat_template.jinja"
    config["chat_template"] = (
        template.read_text(encoding="utf-8")
        if template.exists()
        else _read(folder / "chat_template.json").get("chat_template") or tokenizer.chat_template
    )
    return processor(FrameProcessor(settings), images, tokenizer, **config)


def _read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return content
