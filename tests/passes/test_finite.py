import math

import pytest
import torch
from safetensors.torch import save_file

from manifests.errors import BadInputError
from manifests.files import sha256_file
from passes.finite import HALF, Bound, hash_weights
from passes.header import read_header

FILE = "model.safetensors"


def bounds(folder, below=math.inf):
    return {name: Bound(info, "mend", below) for name, info in read_header(folder, FILE).items() if name != "unchecked"}


@pytest.fixture
def tensors(tmp_path):
    torch.manual_seed(0)
    return {
        "unchecked": torch.full((3,), torch.nan),
        "a": torch.randn(700, 900),  # more than one piece
        "b": torch.randn(5, 3, 2).to(torch.bfloat16),
        "c": torch.randn(7).to(torch.float16),
        "empty": torch.zeros(0, 4),
    }


def test_the_hash_is_that_of_the_file(tmp_path, tensors):
    save_file(tensors, tmp_path / FILE)
    record = hash_weights(tmp_path, FILE, bounds(tmp_path))
    assert (record.path, record.size) == (FILE, (tmp_path / FILE).stat().st_size)
    assert record.sha256 == sha256_file(tmp_path / FILE)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(("name", "index"), [("a", (699, 899)), ("a", (400, 1)), ("b", (4, 2, 1)), ("c", (3,))])
def test_the_first_value_that_is_not_finite_is_named(tmp_path, tensors, name, index, value):
    tensors[name][index] = value
    save_file(tensors, tmp_path / FILE)
    with pytest.raises(BadInputError) as caught:
        hash_weights(tmp_path, FILE, bounds(tmp_path))
    assert f"tensor {name} holds NaN or infinity, first at {list(index)}: mend" in str(caught.value)


@pytest.mark.parametrize(("value", "refused"), [(65504.0, False), (65519.0, False), (65520.0, True), (-1e6, True)])
def test_float16_rounds_what_is_just_beyond_its_largest_number(tmp_path, tensors, value, refused):
    tensors["a"][2, 3] = value
    assert torch.isinf(tensors["a"][2, 3].half()) == refused
    save_file(tensors, tmp_path / FILE)
    if refused:
        with pytest.raises(BadInputError, match=r"beyond the range of float16, first at \[2, 3\]"):
            hash_weights(tmp_path, FILE, bounds(tmp_path, HALF))
    else:
        hash_weights(tmp_path, FILE, bounds(tmp_path, HALF))
