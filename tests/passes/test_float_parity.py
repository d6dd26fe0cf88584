"""The float IR against the checkpoint in torch: prefill, decode, padding, text alone, two images."""

import numpy as np
import pytest

from calibration.scenes import Split
from calibration.sources import load_samples
from tests.prompts import chat_prompt
from vlmconvert import load_processor
from vlmconvert.families.mllama.reference import Reference
from vlmconvert.running.open import open_runner

# Share of the logits' range by which any logit may differ.
TOLERANCE = 1e-3


@pytest.fixture(scope="module")
def reference(demo):
    return Reference(demo)


@pytest.fixture(scope="module")
def processor(demo):
    return load_processor(demo)


@pytest.fixture(scope="module", params=["last", "all"])
def runner(request, build):
    return open_runner(build("--llm", "fp32", "--vision", "fp32", "--logits", request.param))


def process(processor, prompts, images):
    texts = [chat_prompt(processor, ((prompt, None),), len(own)) for prompt, own in zip(prompts, images, strict=True)]
    processed = processor(
        images=images if any(images) else None,
        text=texts,
        return_tensors="np",
        padding=True,
        padding_side="left",
        add_special_tokens=False,
    )
    return {name: np.asarray(value) for name, value in processed.items()}


def assert_close(expected, actual, valid=None):
    actual, expected = actual[:, -1], expected[:, -1]
    assert np.abs(actual - expected).max() <= TOLERANCE * np.ptp(expected)


SCENES = [sample.images[0] for sample in load_samples("scenes", 6, split=Split.TEST).samples]
CASES = {
    "prefill and decode": (["What colour is the circle?"], [[SCENES[0]]]),
    "batch of two with padding": (["How many shapes are there?", "Is there a red ring?"], [[SCENES[1]], [SCENES[2]]]),
    "text alone": (["How many shapes are there?"], [[]]),
    "two images in one prompt": (["Describe the image."], [[SCENES[3], SCENES[4]]]),
    "one and two images in one batch": (["Describe the image.", "Where is it?"], [[SCENES[5]], [SCENES[0], SCENES[1]]]),
}


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_the_checkpoint(runner, reference, processor, case):
    processed = process(processor, *CASES[case])
    expected = reference.prefill(processed)
    assert_close(expected, runner.prefill(processed))
    for _ in range(16):
        tokens = expected[:, -1].argmax(axis=-1)
        expected = reference.step(tokens)
        assert_close(expected, runner.step(tokens))


def test_all_logits_are_those_of_every_position(build, reference, processor):
    runner = open_runner(build("--llm", "fp32", "--vision", "fp32", "--logits", "all"))
    processed = process(processor, *CASES["batch of two with padding"])
    expected, actual = reference.prefill(processed), runner.prefill(processed)
    assert actual.shape == expected.shape
    valid = processed["attention_mask"] == 1
    assert np.abs(actual - expected)[valid].max() <= TOLERANCE * np.ptp(expected)


def test_keys_and_values_come_unrepeated(runner, reference, processor):
    processed = process(processor, *CASES["two images in one prompt"])
    reference.prefill(processed)
    outputs = runner.encode_images(processed)
    for name, expected in reference.handed.items():
        heads = reference.model.config.text_config.num_key_value_heads
        assert outputs[name].shape == expected.shape
        assert outputs[name].shape[1] == heads
        np.testing.assert_allclose(outputs[name], expected, atol=1e-4 * np.abs(expected).max())


def test_beam_idx_reorders_the_cache(runner, processor):
    """Two beams of one prompt that part at their first token, and change places before the second."""
    processed = process(processor, *CASES["batch of two with padding"])
    beams = {name: np.repeat(value[:1], 2, axis=0) for name, value in processed.items()}
    first = np.argsort(runner.prefill(beams, beams=2)[0, -1])[-2:]
    runner.step(first)
    straight = runner.step(np.array([7, 7]))
    runner.prefill(beams, beams=2)
    runner.step(first)
    swapped = runner.step(np.array([7, 7]), beam_idx=np.array([1, 0]))
    assert np.abs(straight[0] - straight[1]).max() > 1e-2
    np.testing.assert_allclose(swapped[::-1], straight, atol=1e-4)
