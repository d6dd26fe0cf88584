"""The referee: CLIP itself from a local folder, and a stand-in whose scores are known."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    CLIPConfig,
    CLIPModel,
    CLIPProcessor,
    CLIPTokenizerFast,
)

from manifests.descriptions import Decoding, Description, Descriptions, read_descriptions, write_descriptions
from manifests.errors import BadInputError
from manifests.files import sha256_file
from passes.validate.referee import open_clip_model, referee
from tests.conftest import vlmconvert

WORDS = ("red", "green", "blue")


class Words:
    """A stand-in for CLIP: an image is as similar to a text as the text names its colour."""

    name = "words"

    def similarity(self, image, texts):
        colour = WORDS[int(np.argmax(np.asarray(image)[0, 0]))]
        return np.array([0.3 if colour in text else 0.1 for text in texts])


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for index, word in enumerate(WORDS * 4):
        colour = [0, 0, 0]
        colour[WORDS.index(word)] = 255
        Image.new("RGB", (8, 8), tuple(colour)).save(folder / f"{index:02d}-{word}.png")
    return folder


def said(images, model, right, **decoding):
    """A model that names the colour of its first `right` images."""
    paths = sorted(images.iterdir())
    return Descriptions(
        model=model,
        decoding=Decoding(**{"prompt": "Describe.", "max_new_tokens": 8} | decoding),
        descriptions=[
            Description(
                image=path.name,
                sha256=sha256_file(path),
                text=f"a {path.stem[3:]} square" if index < right else "something",
            )
            for index, path in enumerate(paths)
        ],
    )


def test_the_higher_mean_wins(images):
    report = referee(said(images, "float", 12), said(images, "artifact", 6), images, Words())
    assert report.means == (0.3, 0.2)
    assert report.winner == "float"
    assert report.p_value < 0.05
    assert report.scores["11-blue.png"] == (0.3, 0.1)
    equal = referee(said(images, "float", 6), said(images, "artifact", 6), images, Words())
    assert equal.winner is None
    assert equal.p_value == 1.0


@pytest.mark.parametrize(
    ("decoding", "message"),
    [
        ({"max_new_tokens": 9}, "asked differently: max_new_tokens is 8 and 9"),
        ({"prompt": "What is it?"}, "prompt is 'Describe.' and 'What is it"),
        ({"ignore_eos": True}, "ignore_eos is False and True"),
    ],
)
def test_models_that_were_asked_differently_are_refused(images, decoding, message):
    with pytest.raises(BadInputError, match=message):
        referee(said(images, "float", 6), said(images, "artifact", 6, **decoding), images, Words())


def test_other_images_are_refused(images):
    first = said(images, "float", 6)
    (images / "00-red.png").unlink()
    with pytest.raises(BadInputError, match="do not describe the same images"):
        referee(first, said(images, "artifact", 6), images, Words())
    with pytest.raises(BadInputError, match="00-red.png does not exist"):
        referee(first, first, images, Words())
    Image.new("RGB", (8, 8)).save(images / "00-red.png")
    with pytest.raises(BadInputError, match="is not the image that was described"):
        referee(first, first, images, Words())


def test_a_name_that_leads_out_of_the_folder_is_refused(images):
    bad = said(images, "float", 6)
    bad = bad.model_copy(update={"descriptions": [bad.descriptions[0].model_copy(update={"image": "../secret.png"})]})
    with pytest.raises(BadInputError, match="lies outside the folder"):
        referee(bad, bad, images, Words())


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A small random CLIP with its processor."""
    folder = tmp_path_factory.mktemp("clip")
    letters = [*"abcdefghijklmnopqrstuvwxyz"]
    vocabulary = [*letters, *(f"{letter}</w>" for letter in letters), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizerFast(
        vocab={token: index for index, token in enumerate(vocabulary)}, merges=[], model_max_length=16
    )
    text = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(
        text_config={
            **text,
            "vocab_size": len(vocabulary),
            "max_position_embeddings": 16,
            "eos_token_id": len(vocabulary) - 1,
        },
        vision_config={**text, "image_size": 16, "patch_size": 8},
        projection_dim=8,
    )
    torch.manual_seed(0)
    CLIPModel(config).save_pretrained(folder)
    from transformers import AutoImageProcessor

    image_processor = {
        "image_processor_type": "CLIPImageProcessor",
        "size": {"shortest_edge": 16},
        "crop_size": {"height": 16, "width": 16},
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(image_processor))
    CLIPProcessor(AutoImageProcessor.from_pretrained(folder, backend="pil"), tokenizer).save_pretrained(folder)
    return folder


def test_scores_are_clips_own(images, clip):
    model = open_clip_model(clip)
    image = Image.open(images / "00-red.png")
    texts = ["a red square", "nothing of the kind, and more words than the model can read"]
    found = model.similarity(image, texts)
    reference = CLIPModel.from_pretrained(clip).eval()
    processor = CLIPProcessor.from_pretrained(clip, backend="pil")
    inputs = processor(images=image, text=texts, return_tensors="pt", padding=True, truncation=True)
    with torch.no_grad():
        logits = reference(**inputs).logits_per_image[0]
    np.testing.assert_allclose(found, logits / reference.logit_scale.exp().detach(), atol=1e-5)
    assert abs(found[0] - found[1]) > 1e-4


def test_the_command(images, clip, tmp_path):
    for name, right in (("float", 12), ("artifact", 3)):
        write_descriptions(said(images, name, right), tmp_path / f"{name}.json")
    arguments = ("referee", tmp_path / "float.json", tmp_path / "artifact.json", "--images", images, "--clip", clip)
    result = vlmconvert(*arguments, "--json", tmp_path / "report.json")
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["images"] == 12
    assert f"{report['means'][0]:.4f}" in result.output
    scores = np.array(list(report["scores"].values()))
    np.testing.assert_allclose(scores.mean(axis=0), report["means"], atol=1e-6)
    assert report["winner"] == ("float", "artifact")[int(report["means"][1] > report["means"][0])]
    assert f"{report['winner']} is higher" in result.output
    write_descriptions(said(images, "artifact", 3, max_new_tokens=99), tmp_path / "artifact.json")
    result = vlmconvert(*arguments)
    assert result.exit_code == 2
    assert "asked differently" in result.output


def test_models_of_one_name_are_told_apart_by_their_files(images, clip, tmp_path):
    for name, right in (("one", 12), ("two", 3)):
        write_descriptions(said(images, "llava", right), tmp_path / f"{name}.json")
    arguments = ("referee", tmp_path / "one.json", tmp_path / "two.json", "--images", images, "--clip", clip)
    result = vlmconvert(*arguments, "--json", tmp_path / "report.json")
    assert result.exit_code == 0, result.output
    models = json.loads((tmp_path / "report.json").read_text())["models"]
    assert models == [f"llava ({tmp_path / name}.json)" for name in ("one", "two")]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "holds no CLIP model"),
        ({"config.json": '{"model_type": "llava"}'}, "holds no CLIP model"),
        ({"config.json": "{"}, "cannot be read"),
        ({"config.json": '{"model_type": "clip"}'}, "holds no CLIP model"),
        ({"config.json": '{"model_type": "clip"}', "model.safetensors": ""}, "cannot be opened"),
        ({"config.json": '{"model_type": "clip"}', "open_clip_pytorch_model.bin": ""}, "is a model of open_clip"),
        ({"open_clip_model.safetensors": ""}, r"is a model of open_clip.*vlmconvert\[referee\]"),
    ],
)
def test_a_folder_without_clip_is_refused(tmp_path, monkeypatch, files, message):
    import sys

    monkeypatch.setitem(sys.modules, "open_clip", None)
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(BadInputError, match=message):
        open_clip_model(tmp_path)


def test_files_of_answers_alone_are_refused(tmp_path):
    path = tmp_path / "predict_result.json"
    path.write_text('{"/images/01.jpg": "A cat."}')
    with pytest.raises(BadInputError, match="holds answers alone, as MindIE writes them"):
        read_descriptions(path)
    path.write_text('{"model": "a", "descriptions": []}')
    with pytest.raises(BadInputError, match="decoding: Field required"):
        read_descriptions(path)
    path.write_text('{"model": "a", "decoding": {"prompt": "b", "max_new_tokens": 1}, "descriptions": []}')
    with pytest.raises(BadInputError, match="descriptions: List should have at least 1 item"):
        read_descriptions(path)
    path.write_text("{")
    with pytest.raises(BadInputError, match="cannot be read"):
        read_descriptions(path)
