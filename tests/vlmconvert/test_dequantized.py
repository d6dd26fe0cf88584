"""The CPU runtime of an artifact, beside the checkpoint in transformers' own classes."""

from __future__ import annotations

import numpy as np
import pytest

from calibration.inputs import load_processor, prompt_inputs
from calibration.scenes import Split
from calibration.sources import load_samples
from manifests.errors import BadInputError
from passes.validate.greedy import forced_logits, greedy
from passes.validate.parity import kl_divergence
from tests.checkpoints import CLASSES, write_checkpoint
from tests.passes.test_ascend import convert
from vlmconvert.dequantized import dequantized_model
from vlmconvert.families import family_module

SAMPLES = load_samples("scenes", 40, split=Split.TEST).samples


def questions(folder, samples):
    texts = [sample.turns[0][0] for sample in samples]
    return prompt_inputs(load_processor(folder), [sample.image for sample in samples], texts)


@pytest.mark.parametrize("family", CLASSES)
def test_logits_are_near_the_checkpoints(tmp_path, family):
    source = write_checkpoint(tmp_path / "in", family)
    convert(source, tmp_path / "out")
    before, after = family_module(family).reference(source), dequantized_model(tmp_path / "out", 10**9)
    inputs = questions(source, SAMPLES[:2])
    expected = greedy(before, inputs, [], 4)
    found = forced_logits(after, inputs, expected.tokens)
    error = np.linalg.norm(found - expected.logits) / np.linalg.norm(expected.logits)
    assert 1e-4 < error < 0.05


def test_the_demo_loses_at_most_half_a_point(demo, tmp_path):
    """All 200 questions of `evaluate` are answered as before, at a KL of 1.5e-5; these are the first of them."""
    convert(demo, tmp_path / "out")
    before, after = family_module("mllama").reference(demo), dequantized_model(tmp_path / "out", 10**9)
    tokenizer = load_processor(demo).tokenizer
    inputs, ends = questions(demo, SAMPLES), [tokenizer.eos_token_id]
    expected = greedy(before, inputs, ends, 8)
    found = forced_logits(after, inputs, expected.tokens)
    assert 0 < kl_divergence(expected.logits, found)[expected.valid].mean() < 1e-4
    right = []
    for said in (expected, greedy(after, inputs, ends, 8)):
        texts = tokenizer.batch_decode(np.where(said.valid, said.tokens, ends[0]), skip_special_tokens=True)
        pairs = zip(texts, SAMPLES, strict=True)
        right.append(sum(text.strip() == sample.turns[0][1].strip() for text, sample in pairs))
    assert right[0] > 0.9 * len(SAMPLES)
    assert 100 * (right[0] - right[1]) / len(SAMPLES) <= 0.5


def test_a_checkpoint_is_no_artifact(demo):
    with pytest.raises(BadInputError, match="quant_model_description.json cannot be read"):
        dequantized_model(demo)
