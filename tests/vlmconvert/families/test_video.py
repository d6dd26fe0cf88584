"""What becomes of the pixels of video frames."""

import numpy as np
import pytest
import torch
from PIL import Image

from calibration.scenes import Split, draw_scene
from manifests.errors import BadInputError
from vlmconvert.families.llava_next_video.video import FrameProcessor


def original(frame, size, mean, std):
    """Transformers' video processor: shorter edge with bicubic antialiasing on bytes, centre crop, scale, normalise."""
    pixels = torch.from_numpy(np.array(frame)).permute(2, 0, 1)[None].float()
    scale = size / min(pixels.shape[-2:])
    shape = [int(length * scale) for length in pixels.shape[-2:]]
    pixels = torch.nn.functional.interpolate(pixels, shape, mode="bicubic", antialias=True).round().clamp(0, 255)
    top, left = ((length - size) // 2 for length in shape)
    pixels = pixels[0, :, top : top + size, left : left + size] / 255
    return ((pixels - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]).numpy()


@pytest.mark.parametrize("shape", [(96, 64), (50, 120), (56, 56)])
def test_pixels_are_those_of_the_original_formula(shape):
    mean, std = [0.48, 0.46, 0.41], [0.27, 0.26, 0.28]
    settings = {"size": {"shortest_edge": 56}, "crop_size": {"height": 56, "width": 56}}
    process = FrameProcessor({**settings, "image_mean": mean, "image_std": std, "do_sample_frames": False})
    frames = [draw_scene(Split.TEST, number).image.resize(shape) for number in range(3)]
    pixels = process([frames, frames[::-1]])["pixel_values_videos"]
    assert pixels.shape == (2, 3, 3, 56, 56)
    np.testing.assert_array_equal(pixels[1], pixels[0][::-1])
    # Pillow rounds to bytes after each axis, the formula once.
    expected = np.stack([original(frame, 56, mean, std) for frame in frames])
    assert np.abs(pixels[0] - expected).max() <= 2.01 / 255 / min(std)
    assert np.abs(pixels[0] - expected).mean() < 0.1 / 255 / min(std)


def test_a_prompt_without_a_video_has_none():
    frames = [Image.new("RGB", (30, 30))] * 3
    assert FrameProcessor({})([[], [frames], []])["pixel_values_videos"].shape[:2] == (1, 3)


def test_videos_of_unequal_length_are_refused():
    frames = [Image.new("RGB", (30, 30))] * 3
    with pytest.raises(BadInputError, match="the videos have 2 and 3 frames"):
        FrameProcessor({})([[frames, frames[:2]]])


def test_settings_that_lack_have_the_video_processors_values():
    frame = Image.new("RGB", (300, 300), (255, 255, 255))
    pixels = FrameProcessor({})([[frame]])["pixel_values_videos"]
    assert pixels.shape == (1, 1, 3, 224, 224)
    np.testing.assert_allclose(pixels[0, 0, :, 0, 0], (1 - np.array([0.48145466, 0.4578275, 0.40821073]))
                               / np.array([0.26862954, 0.26130258, 0.27577711]), rtol=1e-5)  # fmt: skip
