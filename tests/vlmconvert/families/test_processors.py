"""Processors as older checkpoints have them: the same inputs as from the files that transformers 5 writes."""

import shutil

import numpy as np
import pytest

from calibration.scenes import Split, draw_scene
from tests.checkpoints import CLASSES, as_transformers_4, write_checkpoint
from tests.prompts import chat_prompt, process
from vlmconvert import load_processor


def processed(folder, video):
    processor = load_processor(folder)
    images = [draw_scene(Split.TEST, number).image.resize((50, 70)) for number in range(2)]
    text = chat_prompt(processor, (("What is this?", None),), 1, int(video))
    return process(processor, [text], [images[:1]], [[images]] if video else ())


@pytest.mark.parametrize("vision", ["clip", "siglip"])
@pytest.mark.parametrize("family", CLASSES)
def test_the_layout_of_transformers_4_gives_the_same_inputs(tmp_path, family, vision):
    folder = write_checkpoint(tmp_path / "new", family, vision=vision)
    older = as_transformers_4(shutil.copytree(folder, tmp_path / "older"))
    video = family == "llava-next-video"
    expected, found = (processed(path, video) for path in (folder, older))
    assert expected.keys() == found.keys()
    for name in expected:
        np.testing.assert_array_equal(expected[name], found[name], err_msg=name)
    # Some have no file for the whole processor, and the chat template beside the tokenizer's settings.
    if video:
        (older / "processor_config.json").unlink()
        np.testing.assert_array_equal(processed(older, video)["input_ids"], expected["input_ids"])
