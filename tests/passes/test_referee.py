"""The referee: CLIP itself from a local folder, and a stand-in whose scores are known."""

from __future__ import annotations

import json
import shutil
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
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
        ({"max_new_tokens": 9}, "asked differently .max_new_tokens is 8 and 9"),
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


def edit(folder, name, change):
    content = json.loads((folder / name).read_text())
    change(content)
    (folder / name).write_text(json.dumps(content))


def without(*names):
    def change(folder):
        tensors = load_file(folder / "model.safetensors")
        save_file(
            {key: value for key, value in tensors.items() if not key.startswith(names)}, folder / "model.safetensors"
        )

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without("text_projection", "text_model"), "lacks tensor text_model.embeddings"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "lacks tokenizer.json or vocab.json"),
        (
            lambda folder: edit(folder, "config.json", lambda content: content.update(projection_dim=9)),
            "cannot be opened",
        ),
    ],
)
def test_a_broken_clip_is_refused(clip, tmp_path, change, message):
    folder = shutil.copytree(clip, tmp_path / "clip")
    change(folder)
    with pytest.raises(BadInputError, match=message):
        open_clip_model(folder)


def test_a_long_text_is_cut_whatever_the_tokenizer_says(clip, tmp_path):
    folder = shutil.copytree(clip, tmp_path / "clip")
    edit(folder, "tokenizer_config.json", lambda content: content.pop("model_max_length"))
    image, texts = Image.new("RGB", (16, 16)), ["more words than the model can read", "red"]
    expected = open_clip_model(clip).similarity(image, texts)
    np.testing.assert_array_equal(open_clip_model(folder).similarity(image, texts), expected)


def test_a_score_that_is_not_finite_is_refused(images):
    class Broken(Words):
        def similarity(self, image, texts):
            return super().similarity(image, texts) * np.nan

    first = said(images, "float", 6)
    with pytest.raises(BadInputError, match=r"words gives no finite score for 00-red\.png"):
        referee(first, first, images, Broken())


class OpenClip:
    """A stand-in for open_clip's functions, which remembers what it was asked for."""

    def __init__(self, fails=None):
        self.asked, self._fails = [], fails

    def create_model_from_pretrained(self, name, pretrained=None):
        if self._fails:
            raise self._fails
        self.asked.append((name, pretrained))
        encoder = SimpleNamespace(
            eval=lambda: None,
            encode_image=lambda pixels: pixels.mean(dim=(2, 3)),
            encode_text=lambda tokens: torch.eye(3)[tokens],
        )
        return encoder, lambda image: torch.from_numpy(np.array(image)).permute(2, 0, 1).float()

    def get_tokenizer(self, name):
        self.asked.append(name)
        return lambda texts: torch.tensor([WORDS.index(text) for text in texts])


@pytest.mark.parametrize("described", [False, True])
def test_a_model_of_open_clip(images, tmp_path, monkeypatch, described):
    library = OpenClip()
    monkeypatch.setitem(sys.modules, "open_clip", library)
    (tmp_path / "open_clip_model.safetensors").touch()
    if described:
        (tmp_path / "open_clip_config.json").write_text("{}")
    found = open_clip_model(tmp_path).similarity(Image.open(images / "01-green.png"), ["red", "green"])
    np.testing.assert_array_equal(found, [0, 1])
    # With settings beside the weights, the image's preparation is theirs too; without, it is the model of MindIE's protocol.
    name, weights = (
        (f"local-dir:{tmp_path}", None) if described else ("ViT-H-14", str(tmp_path / "open_clip_model.safetensors"))
    )
    assert library.asked == [(name, weights), name]


def test_a_damaged_model_of_open_clip_is_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "open_clip", OpenClip(RuntimeError("invalid\nheader")))
    (tmp_path / "open_clip_pytorch_model.bin").touch()
    with pytest.raises(BadInputError, match=r"cannot be opened \(invalid header\)"):
        open_clip_model(tmp_path)


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
        (
            {"config.json": '{"model_type": "clip"}', "model.safetensors": "", "tokenizer.json": "{}"},
            "cannot be opened",
        ),
        ({"config.json": '{"model_type": "clip"}', "open_clip_pytorch_model.bin": ""}, "needs open_clip"),
        ({"open_clip_model.safetensors": ""}, r"needs open_clip.*vlmconvert\[referee\]"),
    ],
)
def test_a_folder_without_clip_is_refused(tmp_path, monkeypatch, files, message):
    monkeypatch.setitem(sys.modules, "open_clip", None)
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(BadInputError, match=message):
        open_clip_model(tmp_path)


def test_files_of_answers_alone_are_refused(tmp_path):
    path = tmp_path / "predict_result.json"
    path.write_text('{"/images/01.jpg": "A cat."}')
    with pytest.raises(BadInputError, match="holds only answers, as MindIE writes them"):
        read_descriptions(path)
    path.write_text('{"model": "a", "descriptions": []}')
    with pytest.raises(BadInputError, match="decoding is missing"):
        read_descriptions(path)
    path.write_text('{"model": "a", "decoding": {"prompt": "b", "max_new_tokens": 1}, "descriptions": []}')
    with pytest.raises(BadInputError, match="descriptions is empty"):
        read_descriptions(path)
    once = {"image": "a.png", "sha256": "0" * 64, "text": "a"}
    twice = {"model": "a", "decoding": {"prompt": "b", "max_new_tokens": 1}, "descriptions": [once, once]}
    path.write_text(json.dumps(twice))
    with pytest.raises(BadInputError, match=r"a\.png is described 2 times"):
        read_descriptions(path)
    path.write_text("{")
    with pytest.raises(BadInputError, match="cannot be read"):
        read_descriptions(path)
