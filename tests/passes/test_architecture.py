"""Names and linear layers of a checkpoint, in every spelling."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from manifests.errors import BadInputError
from passes.architecture import read_architecture
from passes.checkpoint import open_checkpoint
from tests.checkpoints import CLASSES, write_checkpoint


def architecture(folder):
    checkpoint = open_checkpoint(folder)
    return checkpoint, read_architecture(folder, list(checkpoint.tensors))


def rewrite(folder, change):
    """Change the tensors of a checkpoint."""
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, {"format": "pt"})


def respell(name, spelling):
    """transformers 5 writes `vision_tower.embeddings`; checkpoints on the hub have one more level."""
    if spelling == "hub":
        return name.replace("vision_tower.", "vision_tower.vision_model.")
    if name.startswith("language_model.lm_head"):
        return name.removeprefix("language_model.")
    return "model." + name.replace("language_model.model.", "language_model.")


@pytest.mark.parametrize("family", CLASSES)
@pytest.mark.parametrize("spelling", ["saved", "hub", "memory"])
def test_every_spelling_becomes_the_hubs(tmp_path, family, spelling):
    write_checkpoint(tmp_path, family)
    if spelling != "saved":
        rewrite(tmp_path, lambda tensors: {respell(name, spelling): value for name, value in tensors.items()})
    checkpoint, found = architecture(tmp_path)
    found.check(checkpoint)
    names = set(found.on_hub.values())
    assert len(names) == len(checkpoint.tensors)
    assert {
        "language_model.lm_head.weight",
        "language_model.model.embed_tokens.weight",
        "language_model.model.layers.1.mlp.down_proj.weight",
        "vision_tower.vision_model.embeddings.patch_embedding.weight",
        "vision_tower.vision_model.encoder.layers.0.self_attn.q_proj.weight",
        "multi_modal_projector.linear_1.bias",
    } <= names
    assert ("image_newline" in names) == (family != "llava")
    assert set(found.names.values()) == checkpoint.tensors.keys()


def test_another_vision_tower_and_text_model(tmp_path):
    checkpoint, found = architecture(write_checkpoint(tmp_path, "llava", "qwen2", "siglip"))
    found.check(checkpoint)
    assert len(found.linears) == 3 * 7
    names = set(found.on_hub.values())
    assert "vision_tower.vision_model.encoder.layers.2.mlp.fc1.weight" in names
    assert "language_model.model.layers.0.self_attn.q_proj.bias" in names


def test_linears_are_those_of_the_language_model(tmp_path, demo):
    _, found = architecture(write_checkpoint(tmp_path))
    assert len(found.linears) == 3 * 7
    assert all(name.startswith("model.language_model.layers.") for name in found.linears)
    _, found = architecture(demo)
    assert len(found.linears) == 8 * 7
    assert "model.language_model.layers.3.cross_attn.k_proj" in found.linears
    assert set(found.on_hub.values()) == set(found.names.values())


def test_a_tied_head_has_the_embeddings_values(tmp_path):
    checkpoint, found = architecture(write_checkpoint(tmp_path, tied=True))
    found.check(checkpoint)
    assert found.tied == {"lm_head.weight": "model.language_model.embed_tokens.weight"}
    assert found.source("lm_head.weight") == "language_model.model.embed_tokens.weight"
    assert found.on_hub["lm_head.weight"] == "language_model.lm_head.weight"


def without(tensors, name):
    return {key: value for key, value in tensors.items() if key != name}


LINEAR = "language_model.model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda tensors: without(tensors, LINEAR), rf"lacks tensor {LINEAR} \(shape \[128, 64\]\)"),
        (
            lambda tensors: without(tensors, "language_model.lm_head.weight"),
            "lacks tensor language_model.lm_head.weight",
        ),
        (
            lambda tensors: {**tensors, LINEAR: tensors[LINEAR].T.contiguous()},
            r"has shape \[64, 128\], expected \[128, 64\]",
        ),
        (
            lambda tensors: {**tensors, LINEAR.replace("1", "3"): tensors[LINEAR].clone()},
            "config.json describes no layer for tensor language_model.model.layers.3.mlp.up_proj.weight",
        ),
    ],
)
def test_a_linear_layer_that_the_description_would_miss_is_refused(tmp_path, change, message):
    write_checkpoint(tmp_path)
    rewrite(tmp_path, change)
    checkpoint, found = architecture(tmp_path)
    with pytest.raises(BadInputError, match=message):
        found.check(checkpoint)


def test_two_names_for_one_weight_are_refused(tmp_path):
    write_checkpoint(tmp_path)
    rewrite(tmp_path, lambda tensors: {**tensors, f"model.{LINEAR.replace('.model', '')}": torch.zeros(128, 64)})
    with pytest.raises(BadInputError, match="are the same weight"):
        architecture(tmp_path)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("config.json", {"quantize": "w8a16"}, r"already quantized \(w8a16\)"),
        ("quant_model_description.json", {}, r"already quantized \(quant_model_description.json\)"),
        ("quant_model_description_w8a8.json", {}, r"already quantized \(quant_model_description_w8a8.json\)"),
    ],
)
def test_what_is_quantized_already_is_refused(tmp_path, file, content, message):
    write_checkpoint(tmp_path)
    path = tmp_path / file
    known = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(known | content))
    with pytest.raises(BadInputError, match=message):
        open_checkpoint(tmp_path)
