"""Processing of videos without torchvision: each frame is processed as an image.

transformers' own video processors need torchvision.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from manifests.errors import BadInputError

__all__ = ["FrameProcessor"]


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
