"""Samples become inputs by whoever knows the prompts; a maximum length cuts no image token."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from calibration.inputs import write_inputs
from calibration.sources import Sample, SampleSet

IMAGE = 9


class Letters:
    """A token for each letter; an `@` stands for the image."""

    sequence_inputs = ("input_ids", "other_mask")

    def load_processor(self, folder):
        return folder.name

    def prompt(self, processor, turns, images=1, videos=0):
        assert (images, videos) == (1, 0)
        return f"{processor}:{''.join(question + (answer or '') for question, answer in turns)}"

    def process(self, processor, texts, images, videos):
        assert [image.size for image in images[0]] == [(2, 2)]
        tokens = np.array([[IMAGE if letter == "@" else 1 for letter in texts[0]]])
        return {"input_ids": tokens, "other_mask": tokens == IMAGE, "pixels": np.zeros((1, 20))}

    def inputs(self, processed, config):
        return {**processed, "scaled": processed["input_ids"] * config["scale"]}

    def image_token(self, config):
        return config["image"]

    def video_token(self, config):
        return None


@pytest.mark.parametrize(
    ("question", "limit", "length"), [("abcdef", 0, 9), ("abcdef", 4, 4), ("abc@ef", 4, 7), ("@bcdef", 20, 9)]
)
def test_a_maximum_length_cuts_the_sequence(tmp_path, question, limit, length):
    folder, output = tmp_path / "ab", tmp_path / "out"
    output.mkdir()
    samples = SampleSet("here", None, 0, (Sample("1", (Image.new("RGB", (2, 2)),), ((question, ""),)),))
    write_inputs(folder, samples, Letters(), {"scale": 2, "image": IMAGE}, limit, output)
    values = load_file(output / "00000.safetensors")
    assert values["input_ids"].shape == values["other_mask"].shape == (1, length)
    np.testing.assert_array_equal(values["scaled"], 2 * values["input_ids"])
    assert values["pixels"].shape == (1, 20)
