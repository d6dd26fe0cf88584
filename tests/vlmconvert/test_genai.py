"""OpenVINO GenAI opens the folders of the LLaVA line as they are, and answers as our runtime does."""

import numpy as np
import openvino as ov
import openvino_genai
import pytest
from PIL import Image

from calibration.inputs import chat_text, load_processor, process
from tests.checkpoints import SIZE, write_checkpoint
from tests.conftest import vlmconvert
from vlmconvert.runtime import Runner

TOKENS = 12
# Both sides in float32, so that a token tells whether the models are the same.
EXACT = {"INFERENCE_PRECISION_HINT": "f32", "EXECUTION_MODE_HINT": "ACCURACY"}
# A size at which neither side has to resize: one crop, or the grid's resolution.
NATIVE = {"llava": (SIZE, SIZE), "llava-next": (2 * SIZE, 2 * SIZE), "llava-next-video": (2 * SIZE, 2 * SIZE)}


@pytest.fixture(scope="module", params=NATIVE)
def folder(request, tmp_path_factory, store):
    place = tmp_path_factory.mktemp("genai")
    checkpoint = write_checkpoint(place / "checkpoint", request.param)
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


def ours(folder, text, images=(), videos=()):
    processor = load_processor(folder)
    processed = process(processor, [text], [images], [videos])
    tokens = [int(token[0]) for token in Runner(folder).generate(processed, TOKENS)]
    return processor.decode(tokens, skip_special_tokens=True)


def theirs(folder, text, backend="SDPA", options=EXACT, **inputs):
    pipeline = openvino_genai.VLMPipeline(str(folder), "CPU", ATTENTION_BACKEND=backend, **options)
    config = openvino_genai.GenerationConfig(max_new_tokens=TOKENS, do_sample=False, apply_chat_template=False)
    # GenAI ends an image's tokens with a line break of its own.
    for tag in ("<image>", "<video>"):
        text = text.replace(f"{tag}\n", tag)
    (answer,) = pipeline.generate(text, generation_config=config, **inputs).texts
    return answer


@pytest.mark.parametrize("backend", ["SDPA", "PA"])
@pytest.mark.parametrize("count", [0, 1, 2])
def test_the_same_answer_from_the_same_pixels(folder, backend, count):
    images = [noise(seed, NATIVE[folder.name]) for seed in range(count)]
    text = chat_text(load_processor(folder), (("What colour is the circle?", None),), count)
    expected = ours(folder, text, images)
    assert theirs(folder, text, backend, images=[tensor(image) for image in images]) == expected
    assert count == 0 or ours(folder, text, [noise(7, NATIVE[folder.name])] * count) != expected


@pytest.mark.parametrize("folder", ["llava-next-video"], indirect=True)
def test_the_same_answer_from_the_same_frames(folder):
    frames = [noise(seed, (SIZE, SIZE)) for seed in range(4)]
    text = chat_text(load_processor(folder), (("What happens?", None),), 0, 1)
    video = ov.Tensor(np.stack([np.array(frame) for frame in frames]))
    assert theirs(folder, text, videos=[video]) == ours(folder, text, (), [frames])


@pytest.mark.parametrize("folder", ["llava"], indirect=True)
def test_the_chat_template_and_the_default_precision_of_genai(folder):
    pipeline = openvino_genai.VLMPipeline(str(folder), "CPU")
    assert pipeline.generate("Hello", max_new_tokens=4).texts[0]
