"""`vlmconvert.load` behind transformers' `generate`, against the checkpoint in torch."""

from __future__ import annotations

import json
import shutil
from types import SimpleNamespace

import numpy as np
import openvino as ov
import pytest
import torch
from transformers import MllamaForConditionalGeneration, TextStreamer

import vlmconvert
from calibration.scenes import Split, draw_scene
from manifests.errors import BadInputError
from tests.prompts import chat_prompt, prompt_inputs
from vlmconvert import load_processor
from vlmconvert.running.chat import Chat
from vlmconvert.running.open import open_runner
from vlmconvert.targets.openvino.runtime import resolve_device

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder(build):
    return build("--llm", "fp32", "--vision", "fp32")


@pytest.fixture(scope="module")
def model(folder):
    return vlmconvert.load(folder)


@pytest.fixture(scope="module")
def checkpoint(demo):
    return MllamaForConditionalGeneration.from_pretrained(demo, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def processor(folder):
    return load_processor(folder)


def prompts(processor, numbers, images=1):
    scenes = [draw_scene(Split.TEST, number) for number in numbers]
    texts = [
        chat_prompt(processor, ((scene.questions[number % len(scene.questions)].text, None),), images)
        for number, scene in zip(numbers, scenes, strict=True)
    ]
    pictures = [[draw_scene(Split.TEST, number + shift).image for shift in range(images)] for number in numbers]
    return processor(
        images=pictures if images else None,
        text=texts,
        return_tensors="pt",
        padding=True,
        padding_side="left",
        add_special_tokens=False,
    )


@pytest.mark.parametrize(
    ("options", "batch", "count"),
    [({}, 1, 40), ({}, 4, 100), ({"num_beams": 3}, 1, 12), ({"num_beams": 3}, 4, 32)],
    ids=["greedy", "greedy, batch", "beam search", "beam search, batch"],
)
def test_tokens_equal_the_checkpoints(model, checkpoint, processor, options, count, batch):
    for first in range(0, count, batch):
        inputs = prompts(processor, range(first, first + batch))
        expected = checkpoint.generate(**inputs, **options, max_new_tokens=8)
        assert torch.equal(model.generate(**inputs, **options, max_new_tokens=8), expected), first


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True, "top_k": 20, "temperature": 1.5},
        {"do_sample": True, "num_beams": 2},
        {"num_beams": 4, "num_return_sequences": 2},
        {"num_return_sequences": 3, "do_sample": True},
        {"repetition_penalty": 1.3},
    ],
    ids=str,
)
def test_other_ways_to_decode(model, checkpoint, processor, options):
    inputs = prompts(processor, range(3))
    answers = []
    for side in (checkpoint, model):
        torch.manual_seed(7)
        answers.append(side.generate(**inputs, **options, max_new_tokens=12))
    assert torch.equal(*answers)


def test_text_only_several_images_and_stop_strings(model, checkpoint, processor):
    for inputs, options in (
        (prompts(processor, [3], images=0), {}),
        (prompts(processor, [3, 9], images=2), {}),
        (prompts(processor, [5]), {"stop_strings": ["o"], "tokenizer": processor.tokenizer}),
    ):
        expected = checkpoint.generate(**inputs, **options, max_new_tokens=12)
        assert torch.equal(model.generate(**inputs, **options, max_new_tokens=12), expected)


def test_streamer_gives_the_text_that_generate_returns(model, processor):
    pieces = []

    class Collect(TextStreamer):
        def on_finalized_text(self, text, stream_end=False):
            pieces.append(text)

    inputs = prompts(processor, [0])
    tokens = model.generate(
        **inputs, max_new_tokens=8, streamer=Collect(processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
    )
    answer = processor.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert "".join(pieces) == answer == draw_scene(Split.TEST, 0).questions[0].answer


def test_a_misspelt_option_is_refused(model, processor):
    with pytest.raises(ValueError, match="max_new_tokns"):
        model.generate(**prompts(processor, [0]), max_new_tokns=3)


def test_forward_gives_logits(model, checkpoint, processor):
    inputs = prompts(processor, [0, 1])
    with torch.no_grad():
        expected = checkpoint(**inputs).logits[:, -1:]
    torch.testing.assert_close(model(**inputs).logits, expected, atol=1e-3, rtol=0)
    inputs["pixel_values"] = inputs["pixel_values"].bfloat16()
    torch.testing.assert_close(model(**inputs).logits, expected, atol=0.1, rtol=0)


def test_the_processor_is_loaded_as_the_checkpoints(folder, processor):
    image = draw_scene(Split.TEST, 0).image
    found, expected = (
        prompt_inputs(loaded, [image], ["What is it?"])
        for loaded in (vlmconvert.load_processor(str(folder)), processor)
    )
    assert found.keys() == expected.keys()
    for name in found:
        np.testing.assert_array_equal(found[name], expected[name])


def test_a_padding_token_may_be_null(folder, processor, tmp_path):
    copied = shutil.copytree(folder, tmp_path / "artifact")
    settings = json.loads((copied / "generation_config.json").read_text())
    (copied / "generation_config.json").write_text(json.dumps(settings | {"pad_token_id": None}))
    inputs = {name: np.asarray(value) for name, value in prompts(processor, [0, 1]).items()}
    found, expected = ([*open_runner(path).generate(inputs, 8)] for path in (copied, folder))
    np.testing.assert_array_equal(found[0], expected[0])
    assert len(found) == len(expected)


def address(runner, component, name):
    """Where a tensor of a graph lies in memory."""
    return runner.graphs[component].request.get_tensor(name).data.ctypes.data


def test_images_are_encoded_once_and_shared_without_a_copy(folder, processor):
    runner = open_runner(folder)
    arrays = {name: value.numpy() for name, value in prompts(processor, [0]).items()}
    runner.prefill(arrays)
    assert runner.timings.vision > 0
    name = "cross_attn_key_values.1.key"
    assert address(runner, "language_model", name) == address(runner, "vision_encoder", name)
    runner.prefill(arrays)
    assert runner.timings.vision == 0
    runner.prefill({name: value.numpy() for name, value in prompts(processor, [1]).items()})
    assert runner.timings.vision > 0


def test_a_conversation_is_that_of_the_checkpoint(folder, checkpoint, processor):
    chat = Chat(folder)
    scene = draw_scene(Split.TEST, 11)
    turns = []
    for number, question in enumerate(scene.questions[:3]):
        answer = "".join(chat.ask(question.text, [scene.image] if number == 0 else []))
        text = chat_prompt(processor, (*turns, (question.text, None)))
        inputs = processor(images=[[scene.image]], text=[text], return_tensors="pt", add_special_tokens=False)
        tokens = checkpoint.generate(**inputs, max_new_tokens=16)[0, inputs["input_ids"].shape[1] :]
        assert answer == processor.decode(tokens, skip_special_tokens=True)
        assert (chat.timings.vision_ms == 0) == (number > 0)
        turns.append((question.text, answer))


def test_a_failure_while_answering_reaches_the_reader(folder):
    chat = Chat(folder)
    chat._model.runner.step = lambda *arguments: 1 / 0
    with pytest.raises(ZeroDivisionError):
        list(chat.ask("What is this?"))


@pytest.mark.parametrize(
    ("device", "available", "expected"),
    [
        ("CPU", ["CPU"], "CPU"),
        ("GPU.1", ["CPU", "GPU.0", "GPU.1"], "GPU.1"),
        ("AUTO", ["CPU"], "CPU"),
        ("AUTO", ["CPU", "GPU"], "GPU"),
        ("AUTO", ["CPU", "GPU.0", "GPU.1"], "GPU.0"),
        ("AUTO:CPU", ["CPU", "GPU"], "CPU"),
        ("AUTO:CPU,GPU", ["CPU", "GPU.0"], "GPU.0"),
    ],
)
def test_device_names(device, available, expected):
    assert resolve_device(SimpleNamespace(available_devices=available), device) == expected


def test_auto_without_any_of_its_devices_is_refused():
    with pytest.raises(BadInputError, match="OpenVINO has no device of AUTO:GPU"):
        resolve_device(SimpleNamespace(available_devices=["CPU"]), "AUTO:GPU")


@pytest.mark.parametrize("device", ["GPU", "GPU.0", "AUTO"])
def test_a_gpu_keeps_the_vision_encoders_outputs(folder, processor, device, monkeypatch):
    """The code path of a GPU, on the CPU: its context is asked for a tensor for every shared output, of the right shape."""
    created = {}

    class Context:
        def create_tensor(self, element_type, shape, properties):
            tensor = ov.Tensor(element_type, shape)
            created[tensor.data.ctypes.data] = tensor
            return tensor

    class Core:
        available_devices = ("CPU", "GPU.0") if device == "GPU.0" else ("CPU", "GPU")

        def __init__(self):
            self.core = real()

        def compile_model(self, model, device, options):
            assert device.startswith("GPU")
            return self.core.compile_model(model, "CPU", options)

        def read_model(self, path):
            return self.core.read_model(path)

        def get_default_context(self, device):
            assert device.startswith("GPU")
            return Context()

    arrays = {name: value.numpy() for name, value in prompts(processor, [0, 1]).items()}
    expected = open_runner(folder).prefill(arrays)
    real = ov.Core
    monkeypatch.setattr(ov, "Core", Core)
    runner = open_runner(folder, device)
    np.testing.assert_array_equal(runner.prefill(arrays), expected)
    shared = set(runner.handed)
    assert shared == {f"cross_attn_key_values.{layer}.{part}" for layer in (1, 3, 5, 7) for part in ("key", "value")}
    for name in shared:
        assert address(runner, "language_model", name) in created
