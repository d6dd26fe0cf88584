"""Which layers stay in 8 bit, against NNCF's own choice on the whole graph."""

from __future__ import annotations

import pytest

from passes.compress.sensitivity import LayerScore, layers_in_8_bit
from tests.passes.compress.conftest import LAYERS, SAMPLES

pytestmark = pytest.mark.slow


def test_the_least_sensitive_layers_go_to_4_bit_while_the_share_allows():
    scores = [LayerScore("a", 10, 3.0), LayerScore("b", 20, 1.0), LayerScore("c", 30, 2.0), LayerScore("d", 40, 4.0)]
    assert layers_in_8_bit(scores, 0.6) == {"a", "d"}
    assert layers_in_8_bit(scores, 0.5) == {"a", "c", "d"}  # a share of exactly the ratio is too much, as in NNCF
    assert layers_in_8_bit(scores, 0.01) == {"a", "b", "c", "d"}


@pytest.mark.exhaustive
def test_ratio_ranks_the_layers_of_the_whole_component(whole, streamed):
    """The layers, and the codes in them, are those of one call of NNCF on the whole graph."""
    expected, found = whole(0.6), streamed("--samples", f"{SAMPLES}", "--ratio", "0.6")
    names = expected.int4
    assert found.int4 == names
    in_blocks = [sum(f"layers.{index}." in name for name in names) for index in range(LAYERS)]
    print("layers in 4 bit, block by block:", in_blocks)
    # Not the same share in every block, so the ranking was over all of them.
    assert len({count / total for count, total in zip(in_blocks, [7, 5] * 2, strict=True)}) > 2
    same = [expected.codes(name) == found.codes(name) for name in names]
    assert sum(item.sum() for item in same) / sum(item.size for item in same) >= 0.99
