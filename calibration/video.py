"""Frames of videos, read with PyAV."""

from __future__ import annotations

from pathlib import Path

from PIL.Image import Image

from manifests.errors import BadInputError
from manifests.files import open_file

__all__ = ["read_frames"]

# Formats whose files hold the frames themselves: playlists name other files, and addresses in networks.
_FORMATS = (
    "apng", "asf", "avi", "flv", "gif", "ivf", "matroska", "webm", "mov", "mp4", "mpeg", "mpegts", "mpegvideo", "ogg", "yuv4mpegpipe",
)  # fmt: skip
_ALONE = {"format_whitelist": ",".join(_FORMATS), "protocol_whitelist": "none"}


def read_frames(path: Path, count: int) -> list[Image]:
    """Read equally spaced RGB frames of a video, beginning with its first frame.

    Args:
        path: a video file.
        count: number of frames; a shorter video gives all its frames.

    Raises:
        BadInputError: if PyAV is not installed, or the file is not a video.
    """
    try:
        import av
    except ImportError:
        raise BadInputError('reading a video needs PyAV: pip install "vlmconvert[video]"') from None
    try:
        with open_file(path) as stream, av.open(stream, "r", options=_ALONE) as container:
            frames = sum(1 for _ in container.decode(video=0))
        # Frame numbers are computed in integers, as in transformers, since a float step can give one frame too many.
        count = min(count, frames)
        wanted = {number * frames // count for number in range(count)}
        with open_file(path) as stream, av.open(stream, "r", options=_ALONE) as container:
            images = [frame.to_image() for number, frame in enumerate(container.decode(video=0)) if number in wanted]
    except (OSError, IndexError, ValueError, av.FFmpegError) as error:
        raise BadInputError(f"{path} cannot be read as a video ({error}): give a file that FFmpeg plays") from error
    if not images:
        raise BadInputError(f"{path} has no frames: give a file that FFmpeg plays")
    return images
