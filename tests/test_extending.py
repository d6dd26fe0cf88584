"""The package that `docs/extending` explains: installed beside vlmconvert, it brings a family, a pass and a precision."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch
import transformers
from transformers import AutoConfig

from manifests.errors import BadInputError, ConversionError
from manifests.io import read_manifest
from tests.checkpoints import IMAGE, PATCH, SIZE, WIDTH, tokenizer, write_processor
from tests.conftest import vlmconvert

pytestmark = pytest.mark.slow

EXAMPLE = Path(__file__).parents[1] / "docs" / "extending" / "example"


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """A folder that holds the package as pip would lay it out, to be put on Python's path."""
    folder = tmp_path_factory.mktemp("installed")
    shutil.copytree(EXAMPLE / "vlmconvert_more", folder / "vlmconvert_more")
    project = tomllib.loads((EXAMPLE / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    info = folder / f"vlmconvert_more-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Name: {project['name']}\nVersion: {project['version']}\n", encoding="utf-8")
    groups = (
        "\n".join((f"[{group}]", *(f"{name} = {value}" for name, value in entries.items())))
        for group, entries in project["entry-points"].items()
    )
    (info / "entry_points.txt").write_text("\n".join(groups), encoding="utf-8")
    return folder


def with_package(installed, *arguments):
    """The command line in a process of its own, which sees what is installed."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(installed), str(EXAMPLE.parents[2])))}
    command = [sys.executable, "-m", "vlmconvert", *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A random ViP-LLaVA with features of two layers."""
    folder = tmp_path_factory.mktemp("vipllava")
    tokens = tokenizer()
    special = {name: getattr(tokens, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    small = {"num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.VipLlavaConfig(
        text_config=AutoConfig.for_model(
            "llama", vocab_size=512, hidden_size=WIDTH, intermediate_size=128, **small, **special
        ),
        vision_config=AutoConfig.for_model(
            "clip_vision_model", hidden_size=48, intermediate_size=96, image_size=SIZE, patch_size=PATCH, **small
        ),
        image_token_index=tokens.convert_tokens_to_ids(IMAGE),
        vision_feature_layer=[-2, 2],
    )
    torch.manual_seed(0)
    model = transformers.VipLlavaForConditionalGeneration(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.2)
    model.generation_config = transformers.GenerationConfig(do_sample=False, **special)
    model.save_pretrained(folder)
    write_processor(folder, "llava", "clip", "default")
    return folder


@pytest.mark.exhaustive
def test_the_family_and_the_precision_convert(installed, checkpoint, tmp_path):
    """The family is found from the config, and the artifact answers as transformers' own model does."""
    precision = ("--llm", "fp16-scaled", "--vision", "fp16-scaled", "--activations-scale", 16)
    where = ("-o", tmp_path / "out", "--store", tmp_path / "store", "--validation-samples", 4)
    result = with_package(installed, "convert", checkpoint, *precision, *where, "--max-kl", 1e-5)
    assert result.returncode == 0, result.stderr
    manifest = read_manifest(tmp_path / "out")
    assert manifest.family == "vipllava"
    for component in manifest.components:
        assert component.precision == "fp16-scaled"
        assert component.passes[-1] == "scale-activations{activations_scale=16.0}"
    assert "kl" in {item.metric for item in manifest.validation if item.threshold == 1e-5}
    verified = with_package(installed, "verify", tmp_path / "out", "--no-run")
    assert verified.returncode == 0, verified.stdout
    without = vlmconvert("verify", tmp_path / "out", "--no-run")
    assert without.exit_code == 2
    assert "vipllava" in without.output


def test_the_family_has_a_command(installed):
    result = with_package(installed, "--help")
    assert result.returncode == 0, result.stderr
    assert "vipllava" in result.stdout


@pytest.fixture
def scale_activations(installed, monkeypatch):
    monkeypatch.syspath_prepend(installed)
    from vlmconvert_more.scale_activations import ScaleActivationsPass

    return ScaleActivationsPass


def test_the_pass_keeps_what_it_promises(scale_activations):
    import openvino as ov
    from openvino import opset13

    parameter = opset13.parameter([1], ov.Type.f32)
    model = scale_activations(16.0).apply(ov.Model([opset13.relu(parameter)], [parameter]), None)
    scale_activations(16.0).ensures(model, None)
    with pytest.raises(ConversionError, match="runtime options"):
        scale_activations(2.0).ensures(model, None)
    assert str(scale_activations()) == "scale-activations{activations_scale=8.0}"
    with pytest.raises(BadInputError, match=r"use 8\.0"):
        scale_activations(0.0)
