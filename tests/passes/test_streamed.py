"""The streamed reference against transformers' own class."""

from __future__ import annotations

import numpy as np
import pytest

from calibration.inputs import load_processor
from passes.checkpoint import open_checkpoint
from passes.store import Store
from passes.validate.greedy import forced_logits, greedy
from passes.validate.streamed import StreamedModel
from tests.passes.test_float_parity import CASES, assert_close, process
from vlmconvert.console import Reporter
from vlmconvert.families import mllama
from vlmconvert.pipeline import Conversion
from vlmconvert.plan import Options


@pytest.fixture(scope="module")
def streamed(demo, store):
    def make(keep):
        checkpoint = open_checkpoint(demo)
        conversion = Conversion("mllama", checkpoint, Options(llm="fp32", vision="fp32"), Store(store), 1, Reporter())
        conversion.helper.close()
        return StreamedModel(
            checkpoint,
            conversion.templates.names,
            conversion.config,
            conversion.components,
            mllama.inputs,
            mllama.next_inputs,
            keep,
        )

    return make


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers(demo, streamed, case):
    reference, model = mllama.reference(demo), streamed(0)
    processed = process(load_processor(demo), *CASES[case])
    expected = greedy(reference, processed, [], 6)
    assert_close(expected.logits, forced_logits(model, processed, expected.tokens))
    if "pixel_values" in processed:
        for name, value in reference.handed.items():
            np.testing.assert_allclose(model.handed[name], value, atol=1e-4 * np.abs(value).max())
        handed = forced_logits(model, processed, expected.tokens, dict(reference.handed))
        assert_close(expected.logits, handed)


def test_weights_stay_within_the_limit(demo, streamed):
    processed = process(load_processor(demo), *CASES["batch of two with padding"])
    everything = streamed(10**9)
    expected = everything.prefill(processed)
    assert len(everything._kept) == 24
    for keep in (0, 10**6):
        model = streamed(keep)
        np.testing.assert_array_equal(model.prefill(processed), expected)
        kept = sum(part.nbytes for module in model._kept.values() for part in module.parameters())
        assert kept <= keep
