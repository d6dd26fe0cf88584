"""An artifact of real classes: names, config, and that it reads back as the model that its codes stand for."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForImageTextToText

from manifests.errors import BadInputError
from passes.architecture import read_architecture
from passes.ascend.dequantize import open_w8a16
from passes.ascend.w8a16 import CompressW8A16Pass
from tests.checkpoints import CLASSES, write_checkpoint
from tests.passes.ascend.conversion import convert
from tests.passes.test_architecture import rewrite

ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 500000.0}}


@pytest.mark.parametrize("group_size", [0, 16])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", [*CLASSES, "qwen3-vl"])
def test_reads_back_within_half_a_scale(tmp_path, family, tied, group_size):
    source = write_checkpoint(tmp_path / "in", family, tied=tied)
    made = convert(source, tmp_path / "out", CompressW8A16Pass(group_size))
    checkpoint, architecture = made.checkpoint, made.architecture
    assert len(made.shards.files) > 1
    assert made.description.get("group_size", 0) == group_size
    artifact = open_w8a16(tmp_path / "out")
    assert sorted(artifact.names) == sorted(architecture.on_hub.values())
    linears = {architecture.on_hub[f"{name}.weight"] for name in architecture.linears}
    for name, on_hub in architecture.on_hub.items():
        before, after = checkpoint.read(architecture.source(name)), artifact.read(on_hub)
        if on_hub not in linears:
            np.testing.assert_array_equal(before, after)
            continue
        assert artifact.tensors[on_hub].dtype == "I8"
        scales = artifact.read(f"{on_hub}_scale")
        steps = np.abs(before - after).reshape(len(scales), scales.shape[1], -1) / scales[..., None]
        assert 0.4 < steps.max() <= 0.5 + 1e-4
    # Read again, this time by the name that transformers gives the tensors of an artifact.
    again = read_architecture(tmp_path / "out", artifact.names)
    again.check(artifact)
    assert set(again.names) == set(architecture.on_hub)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("family", CLASSES)
def test_config_has_mindies_keys_and_loses_none(tmp_path, family, dtype):
    source = write_checkpoint(tmp_path / "in", family, dtype=dtype, text_options=ROPE)
    original = json.loads((source / "config.json").read_text())
    original["text_config"]["_name_or_path"] = "lmsys/vicuna-7b-v1.5"
    (source / "config.json").write_text(json.dumps(original))
    config = convert(source, tmp_path / "out").config
    text = config["text_config"]
    assert config["quantize"] == text["quantize"] == "w8a16"
    assert config["torch_dtype"] == config["dtype"] == {torch.bfloat16: "bfloat16"}.get(dtype, "float16")
    assert text["rope_theta"] == 500000.0
    assert text["rope_scaling"] is None
    assert text["_name_or_path"] == "lmsys/vicuna-7b-v1.5"
    assert text["vocab_size"] == 512
    for key, value in original.items():
        if not isinstance(value, dict) and key != "dtype":
            assert config[key] == value
    before, after = (AutoConfig.from_pretrained(folder) for folder in (source, tmp_path / "out"))
    assert before.text_config.rope_parameters == after.text_config.rope_parameters
    for name in ("text_config", "vision_config"):
        mine, other = (getattr(config, name).to_dict() for config in (before, after))
        assert {key: other[key] for key in mine if key != "dtype"} == {k: v for k, v in mine.items() if k != "dtype"}


def test_config_of_mllama(demo, tmp_path):
    config = convert(demo, tmp_path / "out").config
    text = config["text_config"]
    assert config["torch_dtype"] == "bfloat16"
    assert text["rope_theta"] == 500000.0
    assert text["rope_scaling"]["rope_type"] == "llama3"
    assert text["rope_scaling"].keys() == {
        "rope_type",
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    }
    assert AutoConfig.from_pretrained(tmp_path / "out").text_config.rope_parameters == (
        AutoConfig.from_pretrained(demo).text_config.rope_parameters
    )


def test_the_dtype_is_that_of_most_weights(tmp_path):
    source = write_checkpoint(tmp_path / "in")

    def change(tensors):
        tensors["language_model.model.norm.weight"] = tensors["language_model.model.norm.weight"].float()
        return tensors

    rewrite(source, change)
    made = convert(source, tmp_path / "out")
    config = made.config
    assert made.checkpoint.dtype == "BF16+F32"
    assert config["torch_dtype"] == config["text_config"]["dtype"] == "bfloat16"


@pytest.mark.parametrize(("text_model", "name"), [("mistral", "mistral"), ("llama", "")])
def test_the_name_by_which_mindie_chooses_a_chat_template(tmp_path, text_model, name):
    config = convert(write_checkpoint(tmp_path / "in", "llava-next", text_model), tmp_path / "out").config
    assert config["text_config"]["_name_or_path"] == name


def test_a_tied_head_that_is_stored_too_counts_as_untied(tmp_path):
    source = write_checkpoint(tmp_path / "in", tied=True)

    def change(tensors):
        embeddings = tensors["language_model.model.embed_tokens.weight"]
        return {**tensors, "language_model.lm_head.weight": embeddings.clone()}

    rewrite(source, change)
    made = convert(source, tmp_path / "out")
    assert not made.config["tie_word_embeddings"]
    assert not made.config["text_config"]["tie_word_embeddings"]
    assert made.description["language_model.lm_head.weight"] == "FLOAT"


def test_buffers_that_no_config_asks_for_are_left_out(tmp_path):
    source = write_checkpoint(tmp_path / "in")
    frequencies = "language_model.model.layers.0.self_attn.rotary_emb.inv_freq"
    positions = "vision_tower.vision_model.embeddings.position_ids"

    def change(tensors):
        return {**tensors, frequencies: torch.ones(8), positions: torch.arange(65)[None]}

    rewrite(source, change)
    made = convert(source, tmp_path / "out")
    assert not {frequencies, positions} & made.description.keys()


def test_a_tied_head_is_written_out(tmp_path):
    source = write_checkpoint(tmp_path / "in", tied=True)
    made = convert(source, tmp_path / "out")
    tensors = {}
    for file in made.shards.files:
        tensors |= load_file(tmp_path / "out" / file)
    head, embeddings = (tensors[f"language_model.{name}.weight"] for name in ("lm_head", "model.embed_tokens"))
    assert torch.equal(head, embeddings)
    assert made.description["language_model.lm_head.weight"] == "FLOAT"
    assert not made.config["tie_word_embeddings"]
    assert not made.config["text_config"]["tie_word_embeddings"]
    assert not AutoConfig.from_pretrained(tmp_path / "out").text_config.tie_word_embeddings


def test_dequantized_weights_make_the_model_that_the_artifact_is(tmp_path):
    """What is read back goes into transformers' class, and its logits are close to the float model's."""
    source = write_checkpoint(tmp_path / "in", dtype=torch.float32)
    architecture = convert(source, tmp_path / "out").architecture
    artifact = open_w8a16(tmp_path / "out")
    model = AutoModelForImageTextToText.from_pretrained(source, dtype=torch.float32).eval()
    tokens = torch.arange(2, 50)[None]
    with torch.no_grad():
        before = model(input_ids=tokens).logits
        model.load_state_dict(
            {name: torch.from_numpy(artifact.read(on_hub)) for name, on_hub in architecture.on_hub.items()}
        )
        after = model(input_ids=tokens).logits
    error = (before - after).norm() / before.norm()
    assert 1e-4 < error < 0.05


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda folder: (folder / "quant_model_description.json").unlink(), "quant_model_description.json is missing"),
        (lambda folder: (folder / "quant_model_description.json").write_text("{}"), "does not describe W8A16"),
        (lambda folder: (folder / "config.json").unlink(), "config.json is missing"),
        (lambda folder: (folder / "model.safetensors").write_bytes(b"12345678"), "not a whole safetensors file"),
    ],
)
def test_what_is_no_artifact_is_refused(tmp_path, break_it, message):
    convert(write_checkpoint(tmp_path / "in"), tmp_path / "out")
    break_it(tmp_path / "out")
    with pytest.raises(BadInputError, match=message):
        open_w8a16(tmp_path / "out")
