"""msmodelslim beside our own pass: as an engine, and as an independent reader of what we write."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from loky import ProcessPoolExecutor
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText

from calibration.scenes import Split
from calibration.sources import load_samples
from manifests.errors import BadInputError
from passes.ascend.dequantize import open_w8a16
from passes.ascend.format import WEIGHTS_STEM, description
from passes.ascend.msmodelslim import calibrate, calibrated_tensors, check_options
from passes.ascend.w8a16 import CompressW8A16Pass
from passes.export.shards import Shards
from tests.checkpoints import CLASSES, write_checkpoint
from tests.msmodelslim_reader import logits_by_reader
from tests.passes.ascend.conversion import convert, in_shards, opened
from tests.passes.test_architecture import rewrite
from tests.prompts import prompt_inputs
from vlmconvert import load_processor

pytestmark = pytest.mark.slow  # importing msmodelslim takes seconds

FAMILIES = [*CLASSES, "mllama", "qwen2-vl", "qwen2.5-vl", "qwen3-vl"]


@pytest.fixture(scope="module")
def run():
    """A process for msmodelslim, which no other work may share; to import it takes seconds."""
    pool = ProcessPoolExecutor(1)
    yield lambda function, *arguments: pool.submit(function, *arguments).result()
    pool.shutdown(kill_workers=True)


def both_engines(source, work, run, group_size=0):
    """What each engine writes: (theirs, ours), by on-hub name."""
    checkpoint, architecture = opened(source)
    item = CompressW8A16Pass(group_size)
    for name in ("raw", "theirs", "ours"):
        (work / name).mkdir()
    run(calibrate, checkpoint, architecture, item, work / "raw")
    tensors = calibrated_tensors(checkpoint, architecture, work / "raw")
    theirs = Shards.packed(WEIGHTS_STEM, tensors, 10**9)
    ours = in_shards(checkpoint, architecture, item)
    theirs.write(work / "theirs")
    ours.write(work / "ours")
    assert description(theirs.tensors, group_size) == description(ours.tensors, group_size)
    return checkpoint, architecture, *(load_file(work / name / ours.files[0]) for name in ("theirs", "ours"))


@pytest.mark.parametrize(
    ("family", "tied", "group_size"),
    [
        ("llava", False, 0),
        ("llava", True, 32),
        ("llava-next", True, 0),
        ("llava-next-video", False, 32),
        ("mllama", False, 0),
        ("qwen2.5-vl", True, 0),
        ("qwen3-vl", False, 0),
    ],
)
def test_float32_every_code_and_scale_is_equal(tmp_path, demo, run, family, tied, group_size):
    if family == "mllama":
        source = shutil.copytree(demo, tmp_path / "in")
        rewrite(source, lambda tensors: {name: value.float() for name, value in tensors.items()})
        config = (source / "config.json").read_text()
        (source / "config.json").write_text(config.replace('"bfloat16"', '"float32"'))
    else:
        source = write_checkpoint(tmp_path / "in", family, dtype=torch.float32, tied=tied)
    *_, theirs, ours = both_engines(source, tmp_path, run, group_size)
    assert theirs.keys() == ours.keys()
    for name in theirs:
        assert theirs[name].dtype == ours[name].dtype, name
        assert torch.equal(theirs[name], ours[name]), name


def test_a_row_of_zeros_is_equal_too(tmp_path, run):
    source = write_checkpoint(tmp_path / "in", dtype=torch.float32)
    name = "language_model.model.layers.0.mlp.up_proj.weight"

    def change(tensors):
        tensors[name][3] = 0
        tensors[name][5] *= 1e-7
        return tensors

    rewrite(source, change)
    *_, theirs, ours = both_engines(source, tmp_path, run)
    assert torch.equal(theirs[name], ours[name])
    assert torch.equal(theirs[f"{name}_scale"], ours[f"{name}_scale"])


@pytest.mark.parametrize(
    ("family", "dtype"),
    [("llava", torch.float16), *((family, torch.bfloat16) for family in FAMILIES)],
)
def test_half_precision_our_error_is_not_larger(tmp_path, demo, run, family, dtype):
    source = demo if family == "mllama" else write_checkpoint(tmp_path / "in", family, dtype=dtype)
    checkpoint, architecture, theirs, ours = both_engines(source, tmp_path, run)
    assert theirs.keys() == ours.keys()
    for name in architecture.linears:
        on_hub = architecture.on_hub[f"{name}.weight"]
        weight = torch.from_numpy(checkpoint.read(architecture.source(f"{name}.weight")))

        def error(tensors, on_hub=on_hub, weight=weight):
            return (tensors[on_hub].float() * tensors[f"{on_hub}_scale"].float() - weight).square().mean()

        # msmodelslim computes scales in the checkpoint's dtype; float16 is so exact that either may be better by chance.
        assert error(ours) <= error(theirs) * (1.0 if dtype == torch.bfloat16 else 1.001), name


def model_inputs(folder):
    """A question about an image, which cross-attention layers need to do anything."""
    scenes = [sample.images[0] for sample in load_samples("scenes", 2, split=Split.TEST).samples]
    return prompt_inputs(load_processor(folder), scenes, ["What colour is it?", "How many shapes are there?"])


@pytest.mark.parametrize("group_size", [0, 32])
@pytest.mark.parametrize("family", FAMILIES)
def test_msmodelslims_reader_opens_what_we_write(tmp_path, demo, run, family, group_size):
    source = demo if family == "mllama" else write_checkpoint(tmp_path / "in", family)
    folder = tmp_path / "out"
    architecture = convert(source, folder, CompressW8A16Pass(group_size), 200_000).architecture
    inputs = model_inputs(source)
    logits, replaced = run(logits_by_reader, source, folder, inputs)
    assert sorted(replaced) == sorted(architecture.linears)
    # The error that W8A16 implies: that of the same model whose weights moved by at most half a scale each.
    artifact = open_w8a16(folder)
    tensors = {name: torch.from_numpy(value) for name, value in inputs.items()}
    model = AutoModelForImageTextToText.from_pretrained(source, dtype=torch.float32).eval()
    with torch.no_grad():
        expected = model(**tensors).logits.numpy()
        model.load_state_dict({name: torch.from_numpy(artifact.read(hub)) for name, hub in architecture.on_hub.items()})
        implied = model(**tensors).logits.numpy()
    np.testing.assert_allclose(logits, implied, rtol=1e-4, atol=1e-4)
    error = np.linalg.norm(logits - expected) / np.linalg.norm(expected)
    assert 1e-4 < error < 0.05


def test_an_unknown_group_size_is_refused():
    with pytest.raises(BadInputError, match="msmodelslim does not support --group-size 16"):
        check_options(CompressW8A16Pass(16))


def test_nonfinite_weights_are_refused(tmp_path, run):
    source = write_checkpoint(tmp_path / "in")
    name = "language_model.model.layers.0.mlp.up_proj.weight"

    def change(tensors):
        tensors[name][0, 0] = float("nan")
        return tensors

    rewrite(source, change)
    with pytest.raises(BadInputError, match=f"tensor {name} holds NaN"):
        run(calibrate, *opened(source), CompressW8A16Pass(), tmp_path)
