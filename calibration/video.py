"""Videos: frames read with PyAV, and processed without torchvision, which transformers' own video processors need."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL.Image import Image

from manifests.errors import BadInputError

__all__ = ["FrameProcessor", "load_video_processor", "read_frames"]

_PROCESSOR, _IMAGES, _VIDEOS = "processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json"


def read_frames(path: Path, count: int) -> list[Image]:
    """Frames at equal distances from the first on, as LLaVA-NeXT-Video samples them; RGB.

    Args:
        path: a video file.
        count: how many frames; a shorter video gives all that it has.

    Raises:
        BadInputError: if PyAV is not there, or the file is no video.
    """
    try:
        import av
    except ImportError:
        raise BadInputError('reading a video needs PyAV: pip install "vlmconvert[video]"') from None
    try:
        with av.open(str(path)) as container:
            frames = sum(1 for _ in container.decode(video=0))
        # As transformers does it: in integers, since a step of floats can give one frame more.
        count = min(count, frames)
        wanted = {number * frames // count for number in range(count)}
        with av.open(str(path)) as container:
            images = [frame.to_image() for number, frame in enumerate(container.decode(video=0)) if number in wanted]
    except (OSError, IndexError, av.FFmpegError) as error:
        raise BadInputError(f"{path} cannot be read as a video ({error}): give a file that FFmpeg plays") from error
    if not images:
        raise BadInputError(f"{path} has no frames: give a file that FFmpeg plays")
    return images


class FrameProcessor:
    """Takes the place of a video processor: each frame goes through CLIP's image processor with the video's settings.

    Args:
        settings: as in the checkpoint's video settings; what is missing has transformers' value.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

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
        """Process videos of equally many frames.

        Args:
            videos: the frames of each video, or of each prompt's videos.

        Returns:
            `pixel_values_videos` [videos, frames, channels, height, width], float32.
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
                f"the videos have {' and '.join(map(str, lengths))} frames: give videos of equally many frames"
            )
        pixels = [self._frames(list(frames), return_tensors="np")["pixel_values"] for frames in flat]
        return {"pixel_values_videos": np.stack(pixels)}


def load_video_processor(folder: Path) -> Any:
    """A processor for images, videos and text, whose videos go through `FrameProcessor`.

    Checkpoints of transformers 4 have its parts in more than one place; each part is looked for where transformers does.

    Args:
        folder: the checkpoint.

    Raises:
        OSError, ValueError, KeyError: if a file is missing or damaged.
    """
    import transformers
    from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES  # type: ignore[attr-defined]
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES  # type: ignore[attr-defined]

    model_type = _read(folder / "config.json")["model_type"]
    config = _read(folder / _PROCESSOR)
    settings = config.pop("video_processor", None) or _read(folder / _VIDEOS) or _read(folder / _IMAGES)
    config.pop("image_processor", None)
    base: Any = getattr(transformers, config.pop("processor_class", PROCESSOR_MAPPING_NAMES[model_type]))

    class Processor(base):  # type: ignore[misc]
        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            # transformers cannot even name the class of a video processor without torchvision.
            return (
                None
                if argument_name == "video_processor"
                else super().check_argument_for_proper_class(argument_name, argument)
            )

    # By the model's type: the name in older files is of a class that is gone.
    image_class = getattr(transformers, IMAGE_PROCESSOR_MAPPING_NAMES[model_type]["pil"])
    images = image_class.from_pretrained(folder, local_files_only=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    template = folder / "chat_template.jinja"
    config["chat_template"] = (
        template.read_text(encoding="utf-8")
        if template.exists()
        else _read(folder / "chat_template.json").get("chat_template") or tokenizer.chat_template
    )
    return Processor(FrameProcessor(settings), images, tokenizer, **config)


def _read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return content
