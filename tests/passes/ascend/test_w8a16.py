"""The arithmetic of 8-bit weights, against torch on the whole tensor."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from manifests.errors import BadInputError
from manifests.files import file_record
from passes.architecture import Architecture
from passes.ascend.w8a16 import OFFSET, SCALE, CompressW8A16Pass
from passes.checkpoint import open_checkpoint
from tests.passes.ascend.conversion import in_shards

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
EPS = torch.finfo(torch.float32).eps


def checkpoint(folder, **tensors):
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text('{"model_type": "llava"}')
    return open_checkpoint(folder)


PER_CHANNEL = CompressW8A16Pass()


def write(source, folder, item=PER_CHANNEL, linears=("linear",), shard_size=10**9, workers=1):
    names = {name: name for name in source.tensors}
    shapes = {name: info.shape for name, info in source.tensors.items()}
    architecture = Architecture({}, names, names, shapes, tuple(linears), {})
    folder.mkdir()
    shards = in_shards(source, architecture, item, shard_size)
    records = shards.write(folder, workers)
    tensors = {}
    for file in shards.files:
        tensors |= load_file(folder / file)
    return shards, records, tensors


def expected(weight, groups=1):
    rows, columns = weight.shape
    grouped = weight.float().reshape(rows, groups, columns // groups)
    scales = (grouped.abs().amax(2) / 127).clamp(min=EPS)
    return torch.round(grouped / scales[..., None]).reshape(rows, columns).to(torch.int8), scales


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(7, 5), (300, 1001), (3, 200_001)])
def test_codes_and_scales_are_those_of_the_whole_tensor(tmp_path, dtype, shape):
    weight = torch.randn(shape).to(dtype)
    _, _, tensors = write(checkpoint(tmp_path / "in", **{"linear.weight": weight}), tmp_path / "out")
    codes, scales = expected(weight)
    assert torch.equal(tensors["linear.weight"], codes)
    assert torch.equal(tensors["linear.weight_scale"], scales)
    assert tensors["linear.weight_scale"].dtype == torch.float32
    assert not tensors["linear.weight_offset"].any()
    assert tensors["linear.weight_offset"].shape == (shape[0], 1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_groups(tmp_path, dtype):
    weight = torch.randn(9, 96).to(dtype)
    source = checkpoint(tmp_path / "in", **{"linear.weight": weight})
    _, _, tensors = write(source, tmp_path / "out", CompressW8A16Pass(group_size=32))
    codes, scales = expected(weight, 3)
    assert torch.equal(tensors["linear.weight"], codes)
    assert torch.equal(tensors["linear.weight_scale"], scales)
    assert tensors["linear.weight_offset"].shape == (9, 3)


def test_a_group_size_that_does_not_divide_is_refused(tmp_path):
    source = checkpoint(tmp_path / "in", **{"linear.weight": torch.randn(4, 96)})
    with pytest.raises(BadInputError, match=r"--group-size 64 does not divide the 96 input channels of linear.weight"):
        write(source, tmp_path / "out", CompressW8A16Pass(group_size=64))


@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_zeros_and_of_tiny_values(tmp_path, dtype):
    weight = torch.randn(5, 64).to(dtype)
    weight[1] = 0
    weight[3] = torch.finfo(dtype).smallest_normal
    _, _, tensors = write(checkpoint(tmp_path / "in", **{"linear.weight": weight}), tmp_path / "out")
    codes, scales = expected(weight)
    assert torch.equal(tensors["linear.weight"], codes)
    assert torch.equal(tensors["linear.weight_scale"], scales)
    assert tensors["linear.weight_scale"][1, 0] == EPS
    assert not tensors["linear.weight"][1].any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["linear.weight", "norm.weight"])
def test_nonfinite_weights_are_refused_by_name(tmp_path, dtype, value, name):
    tensors = {"linear.weight": torch.randn(300, 1000).to(dtype), "norm.weight": torch.ones(64, dtype=dtype)}
    tensors[name].view(-1)[-1] = value
    with pytest.raises(BadInputError, match=f"tensor {name} holds NaN or infinity.*--allow-nonfinite"):
        write(checkpoint(tmp_path / "in", **tensors), tmp_path / "out")


@pytest.mark.parametrize("dtype", DTYPES)
def test_nonfinite_weights_are_taken_if_allowed(tmp_path, dtype):
    weight = torch.randn(4, 64).to(dtype)
    clean = weight.clone()
    weight[0, :3] = torch.tensor([float("nan"), float("inf"), -float("inf")]).to(dtype)
    clean[0, :3] = 0
    weight[2] = float("nan")
    clean[2] = 0
    source = checkpoint(tmp_path / "in", **{"linear.weight": weight, "norm.weight": weight[0].clone()})
    _, _, tensors = write(source, tmp_path / "out", CompressW8A16Pass(allow_nonfinite=True))
    codes, scales = expected(clean)
    codes[0, 1:3] = torch.tensor([127, -127])
    assert torch.equal(tensors["linear.weight"], codes)
    assert torch.equal(tensors["linear.weight_scale"], scales)
    assert torch.equal(tensors["norm.weight"].isnan(), weight[0].isnan())


def test_odd_sizes_leave_every_tensor_aligned(tmp_path):
    # Readers map a file and view it: float32 scales after an odd number of codes could not be viewed.
    tensors = {
        "a.weight": torch.randn(3, 5),
        "b.weight": torch.randn(7, 3).bfloat16(),
        "gate": torch.ones(1).bfloat16(),
        "c.weight": torch.randn(2, 4),
        "d": torch.ones(3).half(),
        "e": torch.ones(2),
    }
    shards, _, written = write(checkpoint(tmp_path / "in", **tensors), tmp_path / "out", linears=("a", "b", "c"))
    data = (tmp_path / "out" / shards.files[0]).read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    sizes = {"F32": 4, "F16": 2, "BF16": 2, "I8": 1}
    for name, entry in header.items():
        if name != "__metadata__":
            assert (8 + int.from_bytes(data[:8], "little") + entry["data_offsets"][0]) % sizes[entry["dtype"]] == 0, (
                name
            )
    for name in ("a", "b", "c"):
        assert torch.equal(written[f"{name}.weight"], expected(tensors[f"{name}.weight"])[0])
    for name in ("gate", "d", "e"):
        assert torch.equal(written[name], tensors[name])


def test_shards_hold_the_same_and_their_records_are_true(tmp_path):
    tensors = {f"l{i}.weight": torch.randn(40, 50).bfloat16() for i in range(5)} | {"norm.weight": torch.ones(50)}
    source = checkpoint(tmp_path / "in", **tensors)
    linears = [f"l{i}" for i in range(5)]
    _, _, whole = write(source, tmp_path / "whole", linears=linears)
    shards, records, parts = write(source, tmp_path / "parts", linears=linears, shard_size=5000, workers=3)
    assert shards.files == [f"quant_model_weight_w8a16-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)]
    assert whole.keys() == parts.keys()
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    assert records == [file_record(tmp_path / "parts" / record.path, tmp_path / "parts") for record in records]
    index = json.loads((tmp_path / "parts" / "quant_model_weight_w8a16.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == parts.keys()
    for name, file in index["weight_map"].items():
        assert name in load_file(tmp_path / "parts" / file)
    assert shards.count_weights(apart=(SCALE, OFFSET)) == {"f32": 50, "int8": 10_000}
    sizes = {record.path: record.size for record in records if record.path.endswith(".safetensors")}
    assert shards.file_sizes == sizes


def test_equal_input_gives_equal_bytes(tmp_path):
    source = checkpoint(tmp_path / "in", **{"linear.weight": torch.randn(300, 1001)})
    assert write(source, tmp_path / "a")[1] == write(source, tmp_path / "b")[1]
