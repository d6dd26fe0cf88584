"""What becomes of the pixels of video frames."""

import numpy as np
import pytest
import torch
from PIL import Image

from calibration.scenes import Split, draw_scene
from manifests.errors import BadInputError
from passes.compat.transformers import video_processor_class
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


# What transformers 5.23 makes of frames with torchvision 0.29.1 and torch 2.13: class, size of the frames -> grid, and the sums of the
# values and of their squares.
WITH_TORCHVISION = {
    ("qwen3_vl", "Qwen3VLVideoProcessor", (60, 44)): ([3, 2, 4], 25538.212254682556, 20561.156360953355),
    ("qwen3_vl", "Qwen3VLVideoProcessor", (131, 70)): ([3, 4, 8], 102157.76666173898, 82761.19478916567),
    ("qwen3_vl", "Qwen3VLVideoProcessor", (224, 160)): ([3, 4, 6], 76617.13087632926, 62106.06730178067),
    ("qwen2_vl", "Qwen2VLVideoProcessor", (60, 44)): ([3, 4, 4], 83429.57593591814, 139173.57107092804),
    ("qwen2_vl", "Qwen2VLVideoProcessor", (131, 70)): ([3, 4, 10], 208577.82415584172, 348970.74369039433),
    ("qwen2_vl", "Qwen2VLVideoProcessor", (224, 160)): ([3, 12, 16], 1001161.4771859397, 1679304.404000338),
}


@pytest.mark.parametrize("case", WITH_TORCHVISION, ids=str)
def test_transformers_video_processors_need_no_torchvision(case):
    model_type, name, size = case
    process = video_processor_class(model_type, name)(
        do_sample_frames=False, cap_pixels_per_frame=False, size={"shortest_edge": 784, "longest_edge": 64 * 784}
    )
    frames = [draw_scene(Split.TEST, number).image.convert("RGB").resize(size) for number in range(5)]
    made = process([frames], return_tensors="pt")
    grid, total, squares = WITH_TORCHVISION[case]
    assert made["video_grid_thw"].tolist() == [grid]
    values = made["pixel_values_videos"].double()
    assert (float(values.sum()), float((values**2).sum())) == pytest.approx((total, squares), rel=1e-9)
