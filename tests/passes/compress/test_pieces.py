"""A block that is compressed in pieces is the block that is compressed as a whole."""

import numpy as np
import openvino as ov
import pytest

from passes import tables
from passes.block_pass import SplitBlocks
from passes.compress.weights import CompressInt4Pass, CompressInt8Pass
from tests.models import opened_model

PASSES = {
    "int8": (CompressInt8Pass(), {}),
    "int8 symmetric": (CompressInt8Pass(symmetric=True), {}),
    "int4": (CompressInt4Pass(group_size=32, all_layers=True), {}),
    "int4 symmetric": (CompressInt4Pass(group_size=32, symmetric=True, all_layers=True), {}),
    "int4, but not here": (CompressInt4Pass(), {}),
    "int4, but not this layer": (CompressInt4Pass(all_layers=True), {"lm_head.weight": "int8"}),
    "float": (CompressInt8Pass(), {"lm_head.weight": "fp16", "model.language_model.embed_tokens.weight": "fp16"}),
}


@pytest.fixture(scope="module")
def split(demo, store):
    opened = opened_model(demo, store)
    return SplitBlocks(opened.components[-1], opened.checkpoint, opened.templates, "")


def constants(folder):
    """Every constant of a block that is not small: name -> dtype, shape and bytes."""
    model = ov.Core().read_model(folder / "block.xml")
    return {
        node.get_friendly_name(): (node.get_element_type().get_type_name(), list(node.get_shape()), bytes(node.data))
        for node in model.get_ops()
        if node.get_type_name() == "Constant" and node.get_friendly_name().startswith(("lm_head", "model."))
    }


def outputs(folder, name, width):
    model = ov.compile_model(folder / "block.xml", "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    random = np.random.default_rng(0)
    values = random.integers(0, 50, (2, 5)) if name == "embed_tokens" else random.standard_normal((2, 5, width))
    return model(values.astype(np.int64 if name == "embed_tokens" else np.float32))[0]


@pytest.mark.parametrize("name", ["embed_tokens", "lm_head"])
@pytest.mark.parametrize("case", PASSES)
def test_it_is_the_whole_block(split, tmp_path, monkeypatch, case, name):
    item, layers = PASSES[case]
    index = [block.name for block in split.component.blocks].index(name)
    source = split.source(index, layers)
    for folder in ("whole", "pieces"):
        (tmp_path / folder).mkdir()
        item.run(source, tmp_path / folder)
        # Three pieces and a bit, none of which has as many rows as another.
        rows = next(
            shape for tensor in source.block.tensors.values() if len(shape := source.tensor_info(tensor).shape) == 2
        )
        monkeypatch.setattr(tables, "PIECE", 4 * rows[0] * rows[1] * 3 // 10)
    assert constants(tmp_path / "pieces") == constants(tmp_path / "whole")
    assert sorted(path.name for path in (tmp_path / "pieces").iterdir()) == ["block.bin", "block.xml"]
    one, other = (outputs(tmp_path / folder, name, rows[1]) for folder in ("whole", "pieces"))
    np.testing.assert_array_equal(one, other)


def test_other_blocks_stay_whole(split, tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "PIECE", 1000)
    index = [block.name for block in split.component.blocks].index("layers.0")
    CompressInt8Pass().run(split.source(index), tmp_path)
    monkeypatch.undo()
    (tmp_path / "again").mkdir()
    CompressInt8Pass().run(split.source(index), tmp_path / "again")
    assert (tmp_path / "block.bin").read_bytes() == (tmp_path / "again" / "block.bin").read_bytes()
