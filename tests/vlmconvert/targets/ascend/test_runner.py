"""The CPU runtime of an artifact, beside the checkpoint in transformers' own classes."""

from __future__ import annotations

import numpy as np
import pytest

from calibration.scenes import Split
from calibration.sources import load_samples
from manifests.errors import BadInputError
from passes.validate.greedy import forced_logits, greedy
from tests.checkpoints import CLASSES, QWEN
from tests.prompts import prompt_inputs
from vlmconvert import load_processor
from vlmconvert.families import demo_checkpoint, load_family
from vlmconvert.running.open import open_runner
from vlmconvert.targets.ascend.runner import dequantized_model


@pytest.fixture(scope="module")
def questions():
    """Checkpoint -> two questions about images, as its processor makes them."""
    samples = load_samples("scenes", 2, split=Split.TEST).samples
    texts = [sample.turns[0][0] for sample in samples]
    return lambda folder: prompt_inputs(load_processor(folder), [sample.images[0] for sample in samples], texts)


@pytest.mark.parametrize("family", [*CLASSES, *QWEN])
def test_logits_are_near_the_checkpoints(checkpoint, artifact, questions, family):
    source, known = checkpoint(family), load_family(family)
    before, after = known.reference(source), dequantized_model(artifact(source), known, 10**9)
    inputs = questions(source)
    expected = greedy(before, inputs, [], 4)
    found = forced_logits(after, inputs, expected.tokens)
    error = np.linalg.norm(found - expected.logits) / np.linalg.norm(expected.logits)
    assert 1e-4 < error < 0.05


@pytest.mark.parametrize("family", ["llava", "mllama"])
def test_it_runs_as_an_artifact_of_any_target(artifact, questions, family):
    source = demo_checkpoint(family)
    folder = artifact(source)
    processed = questions(folder)
    expected = greedy(load_family(family).reference(source), processed, [], 3)
    runner = open_runner(folder)
    found = forced_logits(runner, processed, expected.tokens)
    assert 0 < np.linalg.norm(found - expected.logits) < 0.05 * np.linalg.norm(expected.logits)
    assert runner.encode_images(processed).keys() >= runner.handed.keys()
    np.testing.assert_array_equal(np.stack(list(runner.generate(processed, 3)), 1)[:, 0], expected.tokens[:, 0])
    assert len(runner.timings.other_tokens) <= 2
    # Beams: two rows a prompt are computed as one, and go on from the rows that are named.
    doubled = {name: value.repeat(2, axis=0) for name, value in processed.items()}
    first = runner.prefill(doubled, beams=2)
    np.testing.assert_array_equal(first[0], first[1])
    tokens = expected.tokens[:, 0].repeat(2)
    np.testing.assert_allclose(
        runner.step(tokens, np.array([1, 0, 3, 2])), found[:, 1:2].repeat(2, axis=0), rtol=1e-3, atol=1e-3
    )


def test_a_checkpoint_is_no_artifact(demo):
    with pytest.raises(BadInputError, match="quant_model_description.json is missing"):
        dequantized_model(demo, load_family("mllama"))
