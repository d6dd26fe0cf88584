"""Families as objects: found, checked, and sent to other processes."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from safetensors.numpy import save_file

from calibration.activations import read_file
from calibration.inputs import write_inputs
from calibration.sources import load_samples
from manifests.errors import BadInputError
from passes.ascend.family import AscendFamily
from passes.checkpoint import open_checkpoint, read_config
from passes.registry import Registry
from passes.vocabulary import kinds_of
from tests.checkpoints import FAMILIES as WRITTEN
from tests.checkpoints import QWEN, write_checkpoint
from tests.conftest import vlmconvert
from vlmconvert import families, load_processor
from vlmconvert.families import (
    FAMILIES,
    check_family,
    check_tied,
    complete_config,
    demo_checkpoint,
    family_of,
    load_family,
)
from vlmconvert.families.base import Family

WITH_ASCEND = ("mllama", "llava", "llava-next", "llava-next-video", *QWEN)
WITH_VIDEOS = ("llava-next-video", *QWEN, "internvl", "smolvlm")
# Features of the largest image for calibration, of families whose processors set a limit of their own.
LIMITED = {**dict.fromkeys(QWEN, 16), "internvl": 20, "idefics3": 68, "smolvlm": 68}
HEAD, EMBEDDINGS = "lm_head.weight", "model.language_model.embed_tokens.weight"


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A checkpoint of each family."""
    folders = {name: write_checkpoint(tmp_path_factory.mktemp(name) / "random", name) for name in WRITTEN}
    return folders | {"mllama": demo_checkpoint("mllama")}


def completed(folder) -> dict:
    from passes.architecture import load_config

    return load_config(folder).to_dict()


@pytest.mark.parametrize("name", FAMILIES.names)
def test_a_family_goes_to_another_process_and_comes_back(name):
    family = load_family(name)
    assert family is load_family(name)
    assert family.name == name
    assert pickle.loads(pickle.dumps(family)) == family
    assert len({family, pickle.loads(pickle.dumps(family))}) == 1
    # What workers are handed.
    assert pickle.loads(pickle.dumps(family.components)).__self__ == family


@pytest.mark.parametrize("name", FAMILIES.names)
def test_a_family_is_found_by_the_config(checkpoints, name):
    folder = checkpoints[name]
    family = family_of(read_config(folder), str(folder))
    assert family is load_family(name)
    check_family(family, read_config(folder), str(folder))


@pytest.mark.parametrize("name", FAMILIES.names)
def test_what_a_family_says_fits_its_checkpoint(checkpoints, name):
    family, config, folder = load_family(name), completed(checkpoints[name]), checkpoints[name]
    assert family.architecture in read_config(folder)["architectures"]
    assert family.components(config)[-1].logits
    assert kinds_of(family.components(config))
    assert set(family.sequence_inputs) <= set(family.processor_outputs)
    assert isinstance(family.ascend, AscendFamily) == (name in WITH_ASCEND)
    processor = load_processor(folder)
    # Gemma 3's processor calls so the token that it expands.
    token = processor.tokenizer.image_token_id if name == "gemma3" else processor.image_token_id
    assert family.image_token(config) == token == family.image_token(read_config(folder))
    assert (family.video_token(config) is not None) == family.takes_videos == (name in WITH_VIDEOS)
    if family.takes_videos and name not in ("internvl", "smolvlm"):  # whose frames are tiles of an image
        assert family.video_token(config) == processor.video_token_id
    ends = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    assert family.end_tokens(folder) == (ends if isinstance(ends, list) else [ends])


@pytest.mark.parametrize("name", FAMILIES.names)
def test_the_processor_makes_what_the_family_takes(checkpoints, name):
    """`image_tokens` is reached by one of `image_sizes`, and by none exceeded; where the processor sets the limit, it is less."""
    from PIL import Image

    family, config = load_family(name), completed(checkpoints[name])
    processor = family.load_processor(checkpoints[name])
    counts = []
    for size in family.image_sizes(config):
        processed = family.prompt_inputs(processor, [[Image.new("RGB", size)]], ["What is it?"])
        assert set(processed) <= set(family.processor_outputs)
        length = processed["input_ids"].shape[1]
        assert {processed[name].shape[1] for name in family.sequence_inputs} == {length}
        counts.append(int((processed["input_ids"] == family.image_token(config)).sum()))
        known = complete_config(family, config, *_names_and_checkpoint(checkpoints[name], family))
        assert {"input_ids", "attention_mask", "pixel_values"} <= family.inputs(processed, known).keys()
    limit = family.image_tokens(config)
    assert max(counts) == limit or max(counts) == LIMITED[name] < limit


@pytest.mark.parametrize("name", FAMILIES.names)
def test_a_family_takes_samples_of_all_kinds(checkpoints, name, tmp_path):
    family, folder = load_family(name), checkpoints[name]
    samples = load_samples("mixed", 60)
    kinds = {(len(sample.pictures), len(sample.video)): sample for sample in samples.samples}
    assert {(0, 0), (1, 0), (2, 0), (0, 8)} <= kinds.keys()
    config = complete_config(family, completed(folder), *_names_and_checkpoint(folder, family))
    write_inputs(folder, replace(samples, samples=tuple(kinds.values())), family, config, 0, tmp_path)
    for number, (pictures, frames) in enumerate(kinds):
        values = read_file(tmp_path / f"{number:05d}.safetensors")
        tokens, video = values["input_ids"], family.video_token(config)
        image = family.image_token(config)
        assert (tokens == image).any() == (pictures > 0 or (frames > 0 and video in (None, image)))
        if video == image:
            continue
        assert (tokens == video).any() == (frames > 0 and video is not None)
        assert ("pixel_values" in values) == (pictures + frames > 0)


def _names_and_checkpoint(folder, family):
    checkpoint = open_checkpoint(folder)
    return {tensor: _in_file(checkpoint, tensor) for tensor in family.config_tensors.values()}, checkpoint


def _in_file(checkpoint, tensor):
    return next(name for name in checkpoint.tensors if tensor.removeprefix("model.") == name.removeprefix("model."))


def test_a_checkpoint_of_no_family_is_refused():
    for config, message in (
        ({"model_type": "gpt2"}, "here is a gpt2 checkpoint, which has no vision side"),
        ({"model_type": "gemma3_text"}, "here is a gemma3-text checkpoint, which has no vision side"),
        (
            {
                "model_type": "paligemma",
                "text_config": {"model_type": "gemma"},
                "vision_config": {"model_type": "siglip_vision_model"},
            },
            "here is a paligemma checkpoint: the nearest family is gemma3, whose text model is a gemma3_text and not a gemma;",
        ),
        (
            {
                "model_type": "vipllava",
                "text_config": {"model_type": "llama"},
                "vision_config": {"model_type": "clip_vision_model"},
            },
            "here is a vipllava checkpoint: the nearest family is llava, which joins the same text model and vision tower in",
        ),
        ({"model_type": "x", "text_config": 3, "vision_config": []}, "here is a x checkpoint: the nearest family is "),
    ):
        with pytest.raises(BadInputError, match=message):
            family_of(config, "here")
        with pytest.raises(BadInputError, match=message):
            check_family(load_family("llava"), config, "here")
    with pytest.raises(BadInputError, match="is a llava-next checkpoint, not llava: use vlmconvert llava-next"):
        check_family(load_family("llava"), {"model_type": "llava_next"}, "here")
    with pytest.raises(BadInputError, match="there is no family gpt2"):
        load_family("gpt2")


class Nothing(Family):
    """Its name is another than it is registered by."""

    def components(self, config):
        return ()

    def inputs(self, processed, config):
        return {}

    def next_inputs(self, previous, tokens):
        return {}

    def image_token(self, config):
        return 0

    def image_sizes(self, config):
        return []

    def image_tokens(self, config):
        return 0

    def reference(self, folder):
        return None


FAMILY = Nothing("nothing", "NothingForConditionalGeneration", ("input_ids",))


@pytest.mark.parametrize("name", ["something", "function"])
def test_what_is_no_family_of_that_name_is_refused(monkeypatch, name):
    brought = {"something": f"{__name__}:FAMILY", "function": "json:loads", "nothing": f"{__name__}:FAMILY"}
    monkeypatch.setattr(
        families, "FAMILIES", Registry("family", "vlmconvert.families", "vlmconvert.families.base:Family", brought)
    )
    assert load_family("nothing") is FAMILY
    with pytest.raises(BadInputError, match=f"registers a family {name} that is not a .*Family of that name"):
        load_family(name)


def test_a_family_without_the_rest_has_defaults(tmp_path):
    assert (FAMILY.ascend, FAMILY.demo, FAMILY.video_token({})) == (None, None, None)
    assert FAMILY.repeat_rows({"x": np.array([[1], [2]])}, 2)["x"].tolist() == [[1], [1], [2], [2]]
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "x", "text_config": {"eos_token_id": 7}}))
    assert FAMILY.end_tokens(tmp_path) == [7]
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [8, 9]}))
    assert FAMILY.end_tokens(tmp_path) == [8, 9]


def tied_checkpoint(folder, head: np.ndarray):
    embeddings = np.arange(12, dtype=np.float32).reshape(3, 4)
    save_file({"head": head, "embeddings": embeddings}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"model_type": "llava", "text_config": {}}))
    return open_checkpoint(folder)


@pytest.mark.parametrize("where", ["config", "text_config"])
@pytest.mark.parametrize("names", [{HEAD: "head", EMBEDDINGS: "embeddings"}, {EMBEDDINGS: "embeddings"}])
def test_a_tied_head_must_have_the_values_of_the_embeddings(tmp_path, where, names):
    family = load_family("llava")
    tie = {"tie_word_embeddings": True}
    config = {"text_config": {}} | tie if where == "config" else {"text_config": tie}
    same = np.arange(12, dtype=np.float32).reshape(3, 4)
    check_tied(family, config, names, tied_checkpoint(tmp_path, same))
    for other in (same + 1, same.astype(np.float16), same[:2]):
        checkpoint = tied_checkpoint(tmp_path, other)
        check_tied(family, {"text_config": {}}, names, checkpoint)
        if HEAD not in names:
            check_tied(family, config, names, checkpoint)
            continue
        with pytest.raises(
            BadInputError, match="ties tensor head to embeddings, and their values differ: set tie_word"
        ):
            check_tied(family, config, names, checkpoint)


def test_a_tensor_that_belongs_into_the_config_must_be_there(checkpoints):
    family = load_family("llava-next")
    names, checkpoint = _names_and_checkpoint(checkpoints["llava-next"], family)
    config = complete_config(family, {"kept": 1}, names, checkpoint)
    assert config["kept"] == 1
    np.testing.assert_array_equal(np.float32(config["image_newline"]), checkpoint.read(*names.values()))
    with pytest.raises(BadInputError, match="lacks tensor model.image_newline: fetch the checkpoint again"):
        complete_config(family, {}, {}, checkpoint)


def test_families_are_light_to_import():
    """The command line loads them to show its help."""
    code = (
        "import sys; from vlmconvert.families import FAMILIES, load_family; "
        "[load_family(name) for name in FAMILIES.names]; "
        "print({'numpy', 'torch', 'transformers', 'openvino', 'nncf'} & set(sys.modules))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "set()"


def test_the_command_lists_what_the_registry_has(tmp_path):
    listed = tmp_path / "families.json"
    result = vlmconvert("families", "--json", listed)
    assert result.exit_code == 0, result.output
    entries = {entry["family"]: entry for entry in json.loads(listed.read_text())}
    assert list(entries) == list(FAMILIES.names)
    assert all(name in result.output for name in FAMILIES.names)
    assert all(entry["text_models"] and entry["vision_models"] for entry in entries.values())
    assert entries["llava"]["targets"] == ["openvino", "onnx", "ascend"]
    assert entries["internvl"]["targets"] == ["openvino", "onnx"]
    assert [name for name, entry in entries.items() if entry["demo"]] == ["mllama", "llava"]
    assert "qwen3-vl" in [name for name, entry in entries.items() if entry["videos"]]
