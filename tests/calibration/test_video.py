"""Frames of videos: which are taken."""

import av
import numpy as np
import pytest
from transformers.video_utils import VideoMetadata, default_sample_indices_fn

from calibration.video import read_frames
from manifests.errors import BadInputError
from tests.conftest import vlmconvert

WIDTH, HEIGHT = 96, 64


def write_video(path, codec="mpeg4", rate=10):
    """30 frames; number n has the brightness 8 n."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for number in range(30):
            frame = av.VideoFrame.from_ndarray(np.full((HEIGHT, WIDTH, 3), 8 * number, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    return write_video(tmp_path_factory.mktemp("video") / "clip.mp4")


@pytest.mark.parametrize("count", [1, 4, 7, 8, 11, 13, 29, 30, 50])
def test_frames_are_those_of_the_original_formula(video, count):
    frames = read_frames(video, count)
    # transformers refuses to take more frames than there are; here a short video gives all that it has.
    expected = default_sample_indices_fn(VideoMetadata(total_num_frames=30), num_frames=min(count, 30))
    assert [frame.size for frame in frames] == [(WIDTH, HEIGHT)] * len(expected)
    brightness = [np.array(frame).mean() / 8 for frame in frames]
    np.testing.assert_allclose(brightness, expected, atol=0.6)


def test_what_is_no_video_is_refused(tmp_path):
    path = tmp_path / "clip.mp4"
    path.write_text("nothing")
    with pytest.raises(BadInputError, match="cannot be read as a video"):
        read_frames(path, 4)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("list.m3u8", "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nclip.ts\n#EXT-X-ENDLIST\n"),
        ("list.ffconcat", "ffconcat version 1.0\nfile 'clip.ts'\n"),
    ],
)
def test_a_list_of_other_files_is_no_video(tmp_path, name, text):
    """FFmpeg would open what it names, in networks too."""
    assert len(read_frames(write_video(tmp_path / "clip.ts", "mpeg2video", 25), 4)) == 4
    path = tmp_path / name
    path.write_text(text)
    with av.open(str(path), format=None if name.endswith("m3u8") else "concat") as container:
        assert next(container.decode(video=0))
    with pytest.raises(BadInputError, match="cannot be read as a video"):
        read_frames(path, 4)


@pytest.mark.exhaustive
def test_a_model_that_takes_no_videos_says_so(build, video):
    folder = build("--llm", "fp32", "--vision", "fp32")
    result = vlmconvert("run", folder, "--video", video, "--prompt", "What happens?")
    assert result.exit_code == 2
    assert "takes no videos" in result.output
