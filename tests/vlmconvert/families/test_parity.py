"""The float graphs of each family but mllama against the checkpoint in torch, over text models and vision towers."""

import numpy as np
import pytest
import torch

from calibration.scenes import Split, draw_scene
from tests.checkpoints import PATCH, write_checkpoint
from tests.conftest import exhaustive_but, vlmconvert
from tests.prompts import chat_prompt, process
from vlmconvert import load_processor
from vlmconvert.families import FAMILIES, load_family
from vlmconvert.running.open import open_runner

pytestmark = pytest.mark.slow

# Share of the logits' range by which any logit may differ.
TOLERANCE = 1e-5
STEPS = 6

CHECKPOINTS = {
    "llava, llama, clip": {},
    "llava, mistral with a window, siglip, full": {
        "text": "mistral",
        "vision": "siglip",
        "strategy": "full",
        "layer": -1,
        "dtype": torch.float16,
        "text_options": {"sliding_window": 12},
    },
    "llava, qwen2 tied with windows in some layers, siglip, two layers, no bias": {
        "text": "qwen2",
        "vision": "siglip",
        "layer": [0, -2],
        "multimodal_projector_bias": False,
        "text_options": {
            "tie_word_embeddings": True,
            "use_sliding_window": True,
            "sliding_window": 12,
            "max_window_layers": 1,
        },
    },
    "llava, qwen3, clip, two layers": {"text": "qwen3", "layer": [1, -1], "dtype": torch.float32},
    "llava, llama with biases and scaled positions, full": {
        "strategy": "full",
        "text_options": {
            "attention_bias": True,
            "mlp_bias": True,
            "rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
        },
    },
    "llava-next, mistral, clip": {"family": "llava-next", "text": "mistral"},
    "llava-next, llama, siglip, full": {"family": "llava-next", "vision": "siglip", "strategy": "full"},
    "llava-next-video, llama, clip": {"family": "llava-next-video"},
    "llava-next-video, qwen2, maximum": {"family": "llava-next-video", "text": "qwen2", "spatial_pool_mode": "max"},
    "llava-next-video, llama, convolution": {"family": "llava-next-video", "spatial_pool_mode": "conv"},
    "qwen2-vl, tied": {"family": "qwen2-vl", "tied": True},
    "qwen2-vl, one layer in the tower": {
        "family": "qwen2-vl",
        "dtype": torch.float32,
        "vision_options": {"depth": 1},
        "text_options": {"num_hidden_layers": 2},
    },
    "qwen2.5-vl": {"family": "qwen2.5-vl", "dtype": torch.float16},
    "qwen2.5-vl, windows in all layers of the tower and some of the text, tied": {
        "family": "qwen2.5-vl",
        "tied": True,
        "vision_options": {"fullatt_block_indexes": [], "window_size": 2 * PATCH},
        "text_options": {"use_sliding_window": True, "sliding_window": 12, "max_window_layers": 1},
    },
    "qwen3-vl": {"family": "qwen3-vl"},
    "qwen3-vl, tied, one merger more": {
        "family": "qwen3-vl",
        "tied": True,
        "dtype": torch.float32,
        "vision_options": {"deepstack_visual_indexes": [1], "depth": 2, "num_position_embeddings": 16},
        "text_options": {"attention_bias": True, "num_hidden_layers": 2},
    },
    "internvl, qwen2, tied": {"family": "internvl", "text": "qwen2", "tied": True},
    "internvl, llama, norms of another kind": {
        "family": "internvl",
        "text": "llama",
        "dtype": torch.float32,
        "vision_options": {
            "norm_type": "rms_norm",
            "use_qk_norm": True,
            "use_mean_pooling": False,
            "attention_bias": True,
        },
    },
    "idefics3, llama": {"family": "idefics3", "text": "llama"},
    "smolvlm, llama, tied": {"family": "smolvlm", "text": "llama", "tied": True, "dtype": torch.float32},
    "gemma3, tied": {"family": "gemma3"},
    "gemma3, not tied, windows in all layers": {
        "family": "gemma3",
        "dtype": torch.float32,
        "tie_word_embeddings": False,
        "text_options": {"layer_types": ["sliding_attention"] * 3, "tie_word_embeddings": False},
    },
}


# For ONNX, one of each family: what differs between text models and vision towers is the same torch module on both sides.
CASES_BUILT = [(name, "openvino") for name in CHECKPOINTS]
CASES_BUILT += [
    (name, "onnx")
    for name in (
        "llava, llama, clip",
        "llava-next, mistral, clip",
        "llava-next-video, llama, clip",
        "qwen2-vl, tied",
        "qwen2.5-vl",
        "qwen3-vl",
        "internvl, qwen2, tied",
        "idefics3, llama",
        "smolvlm, llama, tied",
        "gemma3, tied",
    )
]


KEPT = [
    ("llava, mistral with a window, siglip, full", "openvino"),
    ("llava, qwen2 tied with windows in some layers, siglip, two layers, no bias", "openvino"),
    ("llava-next, llama, siglip, full", "openvino"),
    ("gemma3, tied", "openvino"),
    ("qwen2.5-vl", "onnx"),
    ("qwen2-vl, tied", "openvino"),
    ("qwen2.5-vl, windows in all layers of the tower and some of the text, tied", "openvino"),
    ("qwen3-vl", "openvino"),
    ("qwen3-vl", "onnx"),
    ("internvl, llama, norms of another kind", "openvino"),
    ("internvl, qwen2, tied", "onnx"),
    ("idefics3, llama", "onnx"),
    ("smolvlm, llama, tied", "openvino"),
    ("llava-next-video, qwen2, maximum", "openvino"),
    ("llava-next-video, llama, clip", "onnx"),
]

FRAMES = ("llava-next-video", "qwen2-vl", "qwen2.5-vl", "qwen3-vl", "internvl", "smolvlm")
VIDEO = [case for case in CASES_BUILT if CHECKPOINTS[case[0]].get("family") in FRAMES]


class Built:
    def __init__(self, name, target, folder, store):
        options = CHECKPOINTS[name]
        self.family = options.get("family", "llava")
        checkpoint, artifact = folder / "checkpoint", folder / "artifact"
        write_checkpoint(checkpoint, **options)
        precisions = ("--target", target, "--llm", "fp32", "--vision", "fp32")
        result = vlmconvert(self.family, checkpoint, *precisions, "-o", artifact, "--store", store, "--no-validate")
        assert result.exit_code == 0, result.output
        self.reference = load_family(self.family).reference(checkpoint)
        self.runner = open_runner(artifact)
        self.processor = load_processor(artifact)


@pytest.fixture(scope="module", params=exhaustive_but(KEPT, CASES_BUILT), ids=" for ".join)
def built(request, tmp_path_factory, store):
    return Built(*request.param, tmp_path_factory.mktemp("llava"), store)


def image(number, size=None):
    scene = draw_scene(Split.TEST, number).image
    return scene.resize(size) if size else scene


# Texts and images of each prompt. The third image's size is one that no grid fits.
CASES = {
    "prefill and decode": [("What colour is the circle?", [image(0)])],
    "batch with padding": [("How many shapes are there?", [image(1)]), ("Where is it?", [image(2)])],
    "several images": [("Describe the image.", [image(3), image(4), image(5)])],
    "one and two images in one batch": [("Describe it.", [image(6)]), ("Which?", [image(7), image(8)])],
    "odd sizes": [("What is this?", [image(9, (131, 17))]), ("And this?", [image(9, (33, 90))])],
    "text alone": [("How many shapes are there?", []), ("Why?", [])],
}


def assert_parity(built, processed):
    reference, runner = built.reference, built.runner
    expected = reference.prefill(processed)
    for step in range(STEPS):
        actual = runner.prefill(processed) if step == 0 else runner.step(tokens)  # noqa: F821
        assert np.abs(actual[:, -1] - expected[:, -1]).max() <= TOLERANCE * np.ptp(expected[:, -1])
        tokens = expected[:, -1].argmax(axis=-1)
        expected = reference.step(tokens)


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_the_checkpoints(built, case):
    prompts = CASES[case]
    texts = [chat_prompt(built.processor, ((text, None),), len(images)) for text, images in prompts]
    assert_parity(built, process(built.processor, texts, [images for _, images in prompts]))


@pytest.mark.parametrize(
    "built", exhaustive_but([case for case in KEPT if case in VIDEO], VIDEO), indirect=True, ids=" for ".join
)
def test_video_frames(built):
    frames = [image(10, (60, 44))] * 3 + [image(11, (60, 44))]
    text = chat_prompt(built.processor, (("What happens?", None),), 0, 1)
    assert_parity(built, process(built.processor, [text], [], [[frames]]))
    if built.family != "smolvlm":  # whose processor drops the images of such a prompt
        both = chat_prompt(built.processor, (("What happens?", None),), 2, 1)
        assert_parity(built, process(built.processor, [both], [[image(12), image(13)]], [[frames]]))
    batch = [text, chat_prompt(built.processor, (("And then, after it?", None),), 0, 1)]
    assert_parity(built, process(built.processor, batch, [], [[frames], [frames[::-1]]]))


def test_the_vision_side_is_the_checkpoints(built):
    texts = [chat_prompt(built.processor, (("Describe it.", None),))]
    processed = process(built.processor, texts, [[image(14)]])
    expected = built.reference.prefill(processed)
    handed = built.reference.handed
    made = built.runner.encode_images(processed)
    built.runner.prefill(processed)
    built.runner.step(np.array([7]))
    for name, value in built.runner.handed.items():
        np.testing.assert_array_equal(value, made[name])
    assert built.runner.handed.keys() == handed.keys()
    for name, value in handed.items():
        assert np.abs(made[name] - value).max() <= TOLERANCE * np.ptp(value)
    shuffled = {name: value[..., ::-1].copy() for name, value in handed.items()}
    other = built.reference.prefill(processed, shuffled)
    assert np.abs(other[:, -1] - expected[:, -1]).max() > 10 * TOLERANCE * np.ptp(expected)
    actual = built.runner.prefill(processed, shuffled)
    assert np.abs(actual[:, -1] - other[:, -1]).max() <= TOLERANCE * np.ptp(other)


def test_every_family_has_a_checkpoint_here():
    assert {options.get("family", "llava") for options in CHECKPOINTS.values()} == set(FAMILIES.names) - {"mllama"}
