"""OpenVINO GenAI opens the folders of every family that it knows as they are, and answers as our runtime does."""

import json
import subprocess
import sys

import numpy as np
import openvino as ov
import openvino_genai
import pytest
from PIL import Image

from calibration.scenes import Split, draw_scene
from tests.checkpoints import QWEN, SIZE, as_transformers_4, write_checkpoint
from tests.conftest import exhaustive_but, vlmconvert
from tests.prompts import chat_prompt, process
from vlmconvert import load_processor
from vlmconvert.running.open import open_runner
from vlmconvert.targets.openvino.genai import _write_settings

pytestmark = pytest.mark.slow

TOKENS = 12
QUESTIONS = 50
# Both sides in float32, so that a token tells whether the models are the same.
EXACT = {"INFERENCE_PRECISION_HINT": "f32", "EXECUTION_MODE_HINT": "ACCURACY"}
# A size at which neither side has to resize: one crop, or the grid's resolution.
NATIVE = {
    "llava": (SIZE, SIZE),
    "llava-next": (2 * SIZE, 2 * SIZE),
    "llava-next-video": (2 * SIZE, 2 * SIZE),
    "qwen2-vl": (2 * SIZE, SIZE),
    "qwen2.5-vl": (2 * SIZE, SIZE),
    "qwen3-vl": (2 * SIZE, SIZE),
    "internvl": (SIZE, SIZE),
    "gemma3": (SIZE, SIZE),
}


@pytest.fixture(
    scope="module",
    params=exhaustive_but(["llava", "llava-next-video", "qwen2.5-vl", "qwen3-vl", "internvl", "gemma3"], NATIVE),
)
def folder(request, tmp_path_factory, store):
    place = tmp_path_factory.mktemp("genai")
    # A tied head of random weights answers with the last token of the question, again and again.
    options = {"tie_word_embeddings": False} if request.param == "gemma3" else {}
    checkpoint = write_checkpoint(place / "checkpoint", request.param, text_options=options, **options)
    output = place / request.param
    result = vlmconvert(
        request.param, checkpoint, "--llm", "fp32", "--vision", "fp32", "-o", output, "--store", store, "--no-validate"
    )
    assert result.exit_code == 0, result.output
    return output


def noise(seed, size):
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8))


def tensor(image):
    return ov.Tensor(np.array(image)[None])


def ours(folder, text, images=(), videos=(), count=TOKENS):
    processor = load_processor(folder)
    processed = process(processor, [text], [images], [videos])
    tokens = [int(token[0]) for token in open_runner(folder).generate(processed, count)]
    return processor.decode(tokens, skip_special_tokens=True)


def theirs(folder, text, backend="SDPA", options=EXACT, count=TOKENS, **inputs):
    pipeline = openvino_genai.VLMPipeline(str(folder), "CPU", ATTENTION_BACKEND=backend, **options)
    config = openvino_genai.GenerationConfig(max_new_tokens=count, do_sample=False, apply_chat_template=False)
    # GenAI ends an image's tokens with a line break of its own.
    for tag in ("<image>", "<video>"):
        text = text.replace(f"{tag}\n", tag)
    text = text.replace("<IMG_CONTEXT>", "<image>")  # which it expands as InternVL's processor expands the other
    (answer,) = pipeline.generate(text, generation_config=config, **inputs).texts
    return answer


@pytest.mark.parametrize("backend", ["SDPA", "PA"])
@pytest.mark.parametrize("count", [0, 1, 2])
def test_the_same_answer_from_the_same_pixels(folder, backend, count):
    images = [noise(seed, NATIVE[folder.name]) for seed in range(count)]
    text = chat_prompt(load_processor(folder), (("What colour is the circle?", None),), count)
    # With SDPA, GenAI numbers the tokens of Gemma 3's prompts from 1, and further ones from 0 on.
    tokens = 1 if (folder.name, backend) == ("gemma3", "SDPA") else TOKENS
    expected = ours(folder, text, images, count=tokens)
    assert theirs(folder, text, backend, images=[tensor(image) for image in images], count=tokens) == expected
    if count and tokens > 1:
        assert ours(folder, text, [noise(7, NATIVE[folder.name])] * count) != expected


SIGLIP = {
    "do_normalize": True,
    "do_rescale": True,
    "do_resize": True,
    "image_mean": [0.5, 0.5, 0.5],
    "image_processor_type": "SiglipImageProcessor",
    "image_std": [0.5, 0.5, 0.5],
    "processor_class": "LlavaProcessor",
    "resample": 3,
    "rescale_factor": 1 / 255,
    "size": {"height": SIZE, "width": SIZE},
}
# Checkpoints of transformers 4: what `preprocessor_config.json` says, and whether there is a `processor_config.json` too.
OLD_SETTINGS = {
    "height and width": (SIGLIP, True),
    "height and width, alone": (SIGLIP, False),
    "one number": (
        SIGLIP
        | {"image_processor_type": "CLIPImageProcessor", "size": SIZE, "crop_size": SIZE, "do_center_crop": True},
        True,
    ),
}


def inputs_of(folder, image):
    processor = load_processor(folder)
    return process(processor, [chat_prompt(processor, (("What is it?", None),))], [[image]])


@pytest.mark.parametrize("name", exhaustive_but(list(OLD_SETTINGS)[:1], OLD_SETTINGS))
def test_settings_that_genai_does_not_read_are_rewritten(name, tmp_path, store):
    """As of llava-interleave, whose tower is a SigLIP; transformers makes of the artifact what it makes of the checkpoint."""
    settings, beside = OLD_SETTINGS[name]
    checkpoint, output = tmp_path / "checkpoint", tmp_path / "out"
    write_checkpoint(
        checkpoint, text="qwen2", vision="siglip", strategy="full", layer=-1, text_options={"tie_word_embeddings": True}
    )
    nested = checkpoint / "processor_config.json"
    rest = {key: value for key, value in json.loads(nested.read_text()).items() if key != "image_processor"}
    nested.write_text(json.dumps(rest)) if beside else nested.unlink()
    (checkpoint / "preprocessor_config.json").write_text(json.dumps(settings))
    before = {path.name: path.read_bytes() for path in checkpoint.iterdir()}
    result = vlmconvert(
        "llava", checkpoint, "--llm", "fp32", "--vision", "fp32", "-o", output, "--store", store, "--no-validate"
    )
    assert result.exit_code == 0, result.output
    assert {path.name: path.read_bytes() for path in checkpoint.iterdir()} == before
    for size in ((SIZE, SIZE), (90, 45), (20, 61)):
        ours_now, at_first = (inputs_of(place, noise(3, size)) for place in (output, checkpoint))
        assert ours_now.keys() == at_first.keys()
        for name, value in at_first.items():
            np.testing.assert_array_equal(ours_now[name], value)
    image = noise(1, (SIZE, SIZE))
    text = chat_prompt(load_processor(output), (("What colour is the circle?", None),))
    expected = ours(output, text, [image])
    assert theirs(output, text, images=[tensor(image)]) == expected != ours(output, text, [noise(2, (SIZE, SIZE))])
    assert vlmconvert("verify", output).exit_code == 0


def test_settings_that_genai_reads_stay_as_they_are(tmp_path):
    flat = {"size": {"shortest_edge": SIZE}, "crop_size": {"height": SIZE, "width": SIZE}, "do_center_crop": True}
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(flat))
    _write_settings(tmp_path, crops=True)
    assert json.loads((tmp_path / "preprocessor_config.json").read_text()) == flat
    assert not (tmp_path / "processor_config.json").exists()


def test_frames_keep_the_settings_that_images_had(tmp_path):
    """Older video checkpoints have one file for both."""
    checkpoint = as_transformers_4(write_checkpoint(tmp_path / "checkpoint", "llava-next-video"))
    path = checkpoint / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"size": {"height": SIZE, "width": SIZE}}))

    def pixels():
        processor = load_processor(checkpoint)
        text = chat_prompt(processor, (("What happens?", None),), 1, 1)
        return process(processor, [text], [[noise(1, (90, 45))]], [[[noise(seed, (60, 44)) for seed in range(2)]]])

    before = pixels()
    _write_settings(checkpoint, crops=True)
    assert json.loads(path.read_text())["size"] == {"shortest_edge": SIZE}
    for name, value in pixels().items():
        np.testing.assert_array_equal(value, before[name])


WITH_VIDEOS = ("llava-next-video", "qwen2-vl", "qwen2.5-vl", "qwen3-vl")


@pytest.mark.parametrize("folder", exhaustive_but(WITH_VIDEOS[:1] + WITH_VIDEOS[2:], WITH_VIDEOS), indirect=True)
def test_the_same_answer_from_the_same_frames(folder):
    side = NATIVE[folder.name] if folder.name in QWEN else (SIZE, SIZE)
    frames = [noise(seed, side) for seed in range(4)]
    text = chat_prompt(load_processor(folder), (("What happens?", None),), 0, 1)
    times = openvino_genai.VideoMetadata()
    times.fps, times.frames_indices = 2.0, list(range(4))
    given = {"videos": [ov.Tensor(np.stack([np.array(frame) for frame in frames]))], "videos_metadata": [times]}
    if folder.name not in QWEN:
        del given["videos_metadata"]
    assert theirs(folder, text, **given) == ours(folder, text, (), [frames])
    if folder.name in QWEN:
        assert theirs(folder, text, "PA", **given) == ours(folder, text, (), [frames])
        assert ours(folder, text, (), [frames[::-1]]) != ours(folder, text, (), [frames])
        # GenAI takes the sizes of videos before those of images, whatever the prompt says.
        image, tag = noise(9, side), "<|vision_start|><|image_pad|><|vision_end|>"
        both = text.replace("What happens?", f"{tag}What happens?")
        assert theirs(folder, both, images=[tensor(image)], **given) == ours(folder, both, [image], [frames])


@pytest.mark.parametrize("folder", ["llava"], indirect=True)
def test_the_chat_template_and_the_default_precision_of_genai(folder):
    """In a process with all cores: with one, to which test processes keep, GenAI 2026.4 divides by zero."""
    program = f"""
import os
if hasattr(os, "sched_setaffinity"):
    os.sched_setaffinity(0, range(os.cpu_count()))
import openvino_genai
print(openvino_genai.VLMPipeline({str(folder)!r}, "CPU").generate("Hello", max_new_tokens=4).texts[0])
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert ended.stdout.strip()


def test_the_demo_from_the_same_pixels_and_from_genais_own(tmp_path, store):
    """GenAI scales the shorter edge and crops, without antialiasing; the demo's processor stretches."""
    folder = tmp_path / "demo"
    result = vlmconvert("llava", "--llm", "fp32", "--vision", "fp32", "-o", folder, "--store", store, "--no-validate")
    assert result.exit_code == 0, result.output
    processor, runner = load_processor(folder), open_runner(folder)
    pipeline = openvino_genai.VLMPipeline(str(folder), "CPU", **EXACT)
    settings = openvino_genai.GenerationConfig(max_new_tokens=TOKENS, do_sample=False)
    settings.eos_token_id = processor.tokenizer.eos_token_id
    right = {"same pixels": 0, "its own": 0}
    for number in range(QUESTIONS):
        scene = draw_scene(Split.TEST, number)
        question, answer = scene.questions[0].text, scene.questions[0].answer
        text = chat_prompt(processor, ((question, None),))
        tokens = [int(token[0]) for token in runner.generate(process(processor, [text], [[scene.image]]), TOKENS)]
        expected = processor.decode(tokens, skip_special_tokens=True).strip()
        stretched = scene.image.resize((112, 112), Image.Resampling.BICUBIC)
        for way, image in (("same pixels", stretched), ("its own", scene.image)):
            (found,) = pipeline.generate(question, images=[tensor(image)], generation_config=settings).texts
            if way == "same pixels":
                assert found.strip() == expected, number
            right[way] += found.strip() == answer
    print(f"right of {QUESTIONS}: {right}")
    assert right["same pixels"] >= 0.9 * QUESTIONS > right["its own"]


# Text model -> options with a window in all layers, and in all but the first.
WINDOWS = {
    "mistral": {"sliding_window": 8},
    "qwen2": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
}


@pytest.mark.parametrize("text", exhaustive_but(["qwen2"], WINDOWS))
def test_a_sliding_window_is_seen_by_every_backend(tmp_path, store, text):
    """Paged attention drops the mask, and finds the window in its operations; the prompt is several windows long."""
    checkpoint, output = tmp_path / "checkpoint", tmp_path / "out"
    write_checkpoint(checkpoint, text=text, text_options=WINDOWS[text])
    result = vlmconvert(
        "llava", checkpoint, "--llm", "fp32", "--vision", "fp32", "-o", output, "--store", store, "--no-validate"
    )
    assert result.exit_code == 0, result.output
    question = "What colour is the circle, and which shape is to the left of the largest square in this picture?"
    for count in (0, 1):
        images = [noise(seed, NATIVE["llava"]) for seed in range(count)]
        asked = chat_prompt(load_processor(output), ((question, None),), count)
        expected = ours(output, asked, images)
        for backend in ("SDPA", "PA"):
            assert theirs(output, asked, backend, images=[tensor(image) for image in images]) == expected
    config = json.loads((output / "config.json").read_text())
    config["text_config"]["sliding_window"] = 100_000
    (checkpoint / "config.json").write_text(json.dumps(config))
    wide = tmp_path / "wide"
    result = vlmconvert(
        "llava", checkpoint, "--llm", "fp32", "--vision", "fp32", "-o", wide, "--store", store, "--no-validate"
    )
    assert result.exit_code == 0, result.output
    assert ours(wide, asked, images) != expected
