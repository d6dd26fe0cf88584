"""Equalization: the function stays, and the error falls where there are outlier channels."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText

from manifests.errors import BadInputError
from passes.ascend.dequantize import open_w8a16
from passes.ascend.equalize import equalizers
from passes.ascend.rules import check_folder
from passes.ascend.w8a16 import CompressW8A16Pass
from tests.checkpoints import ascend_family, write_checkpoint
from tests.passes.ascend.conversion import convert, opened
from tests.passes.test_architecture import rewrite

BIASED = {"mlp_bias": True, "attention_bias": True}


def add_outliers(folder, zero=False):
    """Large rows of the up projection that small columns of the down projection read, as large models have them."""

    def change(tensors):
        for layer in range(3):
            prefix = f"language_model.model.layers.{layer}.mlp."
            for name in ("up_proj.weight", "up_proj.bias"):
                if prefix + name in tensors:
                    tensors[prefix + name][::16] *= 32
            tensors[prefix + "down_proj.weight"][:, ::16] /= 32
            if zero:
                tensors[prefix + "up_proj.weight"][5] = 0
                tensors[prefix + "down_proj.weight"][:, 7] = 0
        return tensors

    rewrite(folder, change)
    return folder


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_factors_undo_outliers(tmp_path, dtype):
    source = add_outliers(write_checkpoint(tmp_path, dtype=dtype), zero=True)
    checkpoint, architecture = opened(source)
    found = equalizers(checkpoint, architecture)
    assert len(found) == 3 * 2
    factors = found["model.language_model.layers.1.mlp.up_proj.weight"].factors
    assert set(np.log2(factors)) <= set(range(-20, 21))
    assert np.median(factors[::16]) == 32
    rest = np.delete(factors, np.arange(0, len(factors), 16))
    assert np.median(rest) == 1
    assert factors[5] == factors[7] == 1  # nothing to balance


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_model_computes_the_same(tmp_path, dtype):
    """Dequantized weights of both ways differ by the error of 8 bit alone, and the up projection's codes not at all."""
    source = add_outliers(write_checkpoint(tmp_path / "in", dtype=dtype, text_options=BIASED))
    checkpoint, architecture = opened(source)
    found = equalizers(checkpoint, architecture)
    assert len(found) == 3 * 3  # biases too
    tensors = {}
    for way in ("none", "equalize"):
        folder = tmp_path / way
        convert(source, folder, item=CompressW8A16Pass(outlier_suppression=way))
        tensors[way] = open_w8a16(folder)
        checks = [check for check in check_folder(folder, ascend_family(folder)) if check.outcome == "failed"]
        assert {check.check for check in checks} <= {"mindie: processor files"}
    plain, equal = tensors["none"], tensors["equalize"]
    for up, down in architecture.gated:
        factors = found[f"{up}.weight"].factors
        assert (factors > 1).any()
        for name in (f"{up}.weight", f"{up}.bias"):
            hub = architecture.on_hub[name]
            before, after = plain.read(hub), equal.read(hub)
            np.testing.assert_array_equal(before / (factors[:, None] if before.ndim == 2 else factors), after)
        hub = architecture.on_hub[f"{down}.weight"]
        float_weight = checkpoint.read(architecture.source(f"{down}.weight"))
        scales = equal.read(f"{hub}_scale")
        assert (np.abs(equal.read(hub) - float_weight * factors) <= scales * 0.5001).all()
    changed = {architecture.on_hub[name] for name in found}
    for name in equal.tensors:
        if name.removesuffix("_scale").removesuffix("_offset") not in changed:
            np.testing.assert_array_equal(plain.read(name), equal.read(name))


def test_a_bias_that_is_not_finite_is_refused(tmp_path):
    source = write_checkpoint(tmp_path / "in", text_options=BIASED)
    name = "language_model.model.layers.1.mlp.up_proj.bias"

    def change(tensors):
        tensors[name][3] = torch.nan
        return tensors

    rewrite(source, change)
    with pytest.raises(BadInputError, match=f"tensor {name} holds NaN or infinity"):
        convert(source, tmp_path / "out", item=CompressW8A16Pass(outlier_suppression="equalize"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_nothing_becomes_infinite(tmp_path, dtype):
    """A channel whose bias or weights its factor would carry beyond the dtype keeps them."""
    source = write_checkpoint(tmp_path / "in", dtype=dtype, text_options=BIASED)
    prefix = "language_model.model.layers.1.mlp."
    largest = torch.finfo(dtype).max

    def change(tensors):
        tensors[prefix + "up_proj.weight"][3] *= 2**-12
        tensors[prefix + "down_proj.weight"][:, 3] *= 2**4
        tensors[prefix + "up_proj.bias"][3] = largest / 8
        tensors[prefix + "up_proj.weight"][8] *= 16
        tensors[prefix + "down_proj.weight"][:, 8] /= 16
        if dtype != torch.float16:
            tensors[prefix + "up_proj.weight"][4] = largest / 4
            tensors[prefix + "down_proj.weight"][:, 4] = torch.finfo(dtype).tiny
            tensors[prefix + "up_proj.weight"][5] = torch.finfo(dtype).tiny
            tensors[prefix + "down_proj.weight"][:, 5] = largest / 4
        return tensors

    rewrite(source, change)
    checkpoint, architecture = opened(source)
    factors = equalizers(checkpoint, architecture)["model.language_model.layers.1.mlp.up_proj.weight"].factors
    assert factors[3] == 1
    assert factors[8] > 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convert(source, tmp_path / "out", item=CompressW8A16Pass(outlier_suppression="equalize"))
    artifact = open_w8a16(tmp_path / "out")
    for name in artifact.tensors:
        assert np.isfinite(artifact.read(name)).all(), name


def test_the_error_falls(tmp_path):
    source = add_outliers(write_checkpoint(tmp_path / "in", dtype=torch.float32))
    _, architecture = opened(source)
    model = AutoModelForImageTextToText.from_pretrained(source, dtype=torch.float32).eval()
    tokens = torch.arange(10, 90)[None]
    errors = []
    with torch.no_grad():
        expected = model(input_ids=tokens).logits
        for way in ("none", "equalize"):
            convert(source, tmp_path / way, item=CompressW8A16Pass(outlier_suppression=way))
            artifact = open_w8a16(tmp_path / way)
            weights = {name: torch.from_numpy(artifact.read(hub)) for name, hub in architecture.on_hub.items()}
            model.load_state_dict(weights)
            errors.append((model(input_ids=tokens).logits - expected).norm())
    assert errors[1] < 0.5 * errors[0]


def test_it_is_off_unless_asked_for(tmp_path):
    source = add_outliers(write_checkpoint(tmp_path / "in"))
    assert CompressW8A16Pass().outlier_suppression == "none"
    made = convert(source, tmp_path / "out")
    assert str(CompressW8A16Pass()) == "compress-w8a16{group_size=0,allow_nonfinite=false,outlier_suppression=none}"
    assert made.description["model_quant_type"] == "W8A16"
