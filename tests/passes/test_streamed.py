"""The streamed reference against transformers' own class."""

from __future__ import annotations

import numpy as np
import pytest

from passes import tables
from passes.validate.greedy import forced_logits, greedy
from passes.validate.streamed import StreamedModel, TorchBlocks
from tests.models import opened_model
from tests.passes.test_float_parity import CASES, assert_close, process
from vlmconvert import load_processor
from vlmconvert.families import load_family

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def streamed(demo, store):
    def make(keep):
        opened = opened_model(demo, store)
        # A block is bound by its own module: components need no trace.
        components = opened.family.components(opened.config)
        blocks = TorchBlocks(opened.checkpoint, opened.names, opened.config, keep)
        return StreamedModel(blocks, opened.config, components, opened.family.inputs, opened.family.next_inputs)

    return make


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(demo, streamed, case):
    reference, model = load_family("mllama").reference(demo), streamed(0)
    processed = process(load_processor(demo), *CASES[case])
    expected = greedy(reference, processed, [], 6)
    assert_close(expected.logits, forced_logits(model, processed, expected.tokens))
    if "pixel_values" in processed:
        for name, value in reference.handed.items():
            np.testing.assert_allclose(model.handed[name], value, atol=1e-4 * np.abs(value).max())
        handed = forced_logits(model, processed, expected.tokens, dict(reference.handed))
        assert_close(expected.logits, handed)


@pytest.mark.parametrize("keep", [0, 10**9])
def test_tables_in_pieces_are_whole_tables(demo, streamed, monkeypatch, keep):
    processed = process(load_processor(demo), *CASES["batch of two with padding"])
    expected = streamed(keep).prefill(processed)
    monkeypatch.setattr(tables, "PIECE", 100_000)
    model = streamed(keep)
    for _ in range(2):
        np.testing.assert_allclose(model.prefill(processed), expected, atol=1e-5 * np.ptp(expected))


def test_weights_stay_within_the_limit(demo, streamed):
    processed = process(load_processor(demo), *CASES["batch of two with padding"])
    everything = streamed(10**9)
    expected = everything.prefill(processed)
    assert len(everything._blocks._kept) == 24
    for keep in (0, 10**6):
        model = streamed(keep)
        np.testing.assert_array_equal(model.prefill(processed), expected)
        kept = sum(part.nbytes for module in model._blocks._kept.values() for part in module.parameters())
        assert kept <= keep
