"""The LLaVA line: its records, what it generates, and what it refuses."""

import json

import onnx
import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText, LlavaForConditionalGeneration

import vlmconvert as package
from calibration.scenes import Split, draw_scene
from manifests.errors import BadInputError, ConversionError
from manifests.io import read_manifest
from passes.architecture import config_to_blame
from tests.checkpoints import GRID, SIZE, as_transformers_4, write_checkpoint
from tests.conftest import exhaustive_but, vlmconvert
from tests.garbage import copy, flip_bit
from tests.passes.test_architecture import rewrite
from tests.prompts import chat_prompt, process, write_clip
from vlmconvert import load_processor
from vlmconvert.families import FAMILIES, load_family

pytestmark = pytest.mark.slow

LINE = [family for family in FAMILIES.names if family != "mllama"]


@pytest.fixture(scope="module")
def places(tmp_path_factory, store):
    """Checkpoint and compressed artifact of a family, made once."""
    made = {}

    def make(family):
        if family not in made:
            folder = tmp_path_factory.mktemp(family)
            checkpoint = write_checkpoint(folder / "checkpoint", family)
            result = vlmconvert(
                family, checkpoint, "--samples", 8, "--vision-samples", 8, "--group-size", 32, "--validation-samples", 10,
                "--max-drop", 100, "--max-kl", 10, "-o", folder / "artifact", "--store", store,
            )  # fmt: skip
            assert result.exit_code == 0, result.output
            made[family] = checkpoint, folder / "artifact"
        return made[family]

    return make


@pytest.mark.parametrize("family", exhaustive_but(["llava", "llava-next-video"], LINE))
def test_compressed_conversion_and_its_record(places, family):
    _, artifact = places(family)
    manifest = read_manifest(artifact)
    precisions = {item.name: item.precision for item in manifest.components}
    assert precisions["language_model"] == precisions["text_embeddings"] == "int4-gptq"
    assert precisions["vision_embeddings"] == "int8-ptq"
    weights = {item.name: item.weights for item in manifest.components}
    assert weights["language_model"].keys() == {"int4", "int8"}
    assert weights["text_embeddings"].keys() == {"int8"}
    assert "int8" in weights["vision_embeddings"]
    if family == "llava-next-video":
        assert weights["vision_resampler"] == {}
        assert "int8" in weights["multi_modal_projector"]
    # Both sides' errors are seen.
    kl = {item.component: item.value for item in manifest.validation if item.metric == "kl"}
    assert all(0 < kl[component] < 10 for component in ("vision_embeddings", "language_model", "artifact")), kl


def test_generate_gives_the_checkpoints_tokens(places, tmp_path, store):
    checkpoint, _ = places("llava")
    exact = tmp_path / "exact"
    result = vlmconvert(
        "llava", checkpoint, "--llm", "fp32", "--vision", "fp32", "--no-validate", "-o", exact, "--store", store
    )
    assert result.exit_code == 0, result.output
    model, processor = package.load(exact), load_processor(exact)
    peer = LlavaForConditionalGeneration.from_pretrained(checkpoint, dtype=torch.float32).eval()
    scenes = [draw_scene(Split.TEST, number) for number in range(6)]
    texts = [chat_prompt(processor, ((scene.questions[0].text, None),)) for scene in scenes]
    inputs = process(processor, texts, [[scene.image] for scene in scenes], tensors="pt")
    for options in ({}, {"num_beams": 3}, {"do_sample": True, "top_k": 10}):
        answers = []
        for side in (peer, model):
            torch.manual_seed(3)
            answers.append(side.generate(**inputs, **options, max_new_tokens=10))
        assert torch.equal(*answers), options


def test_a_damaged_text_embedding_is_named(places, tmp_path):
    artifact = copy(places("llava")[1], tmp_path / "damaged")
    flip_bit(artifact / "openvino_text_embeddings_model.bin", 0.1)
    result = vlmconvert("verify", artifact, "--no-run", "--json", tmp_path / "checks.json")
    assert result.exit_code == 1
    failed = [
        item for item in json.loads((tmp_path / "checks.json").read_text())["checks"] if item["outcome"] == "failed"
    ]
    assert any("embed_tokens" in item["place"] for item in failed), failed


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"text": "phi"}, "the text model is a phi, which cannot be converted layer by layer"),
        ({"text_options": {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}}},
         "change with the length of the prompt (rope_type dynamic)"),
        ({"layer": 9}, "takes hidden state 9 of the vision tower"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_what_cannot_be_converted_is_refused(options, message, tmp_path, store):
    checkpoint = write_checkpoint(tmp_path / "checkpoint", **options)
    result = vlmconvert("llava", checkpoint, "-o", tmp_path / "out", "--store", store)
    assert result.exit_code == 2, result.output
    assert message in result.output
    assert not (tmp_path / "out").exists()


def with_config(checkpoint, part, key, value):
    path = checkpoint / "config.json"
    config = json.loads(path.read_text())
    (config[part] if part else config)[key] = value
    path.write_text(json.dumps(config))
    return checkpoint


NO_MODEL = "config.json describes no {} that can be made (KeyError: 'nope')"


@pytest.mark.parametrize(
    ("family", "part", "key", "value", "message"),
    [
        ("llava", "text_config", "layer_types", ["full_attention", "chunked_attention", "full_attention"],
         "are of the type chunked_attention"),
        ("llava-next-video", None, "spatial_pool_mode", "median", "by median (spatial_pool_mode)"),
        ("llava-next-video", None, "spatial_pool_stride", 0, "stride of 0 (spatial_pool_stride)"),
        ("llava-next-video", None, "spatial_pool_stride", 5, "stride of 5 (spatial_pool_stride)"),
        ("llava", None, "projector_hidden_act", "nope", NO_MODEL.format("select_and_project")),
        ("llava", "text_config", "hidden_act", "nope", NO_MODEL.format("text_embeddings")),
        ("llava", "vision_config", "hidden_act", "nope", NO_MODEL.format("vision_embeddings")),
        ("llava", "text_config", "rope_parameters", {"rope_type": "nope", "rope_theta": 1e4}, "KeyError: 'nope'"),
        ("llava", "vision_config", "patch_size", 0, "patches of 0 x 0 (image_size and patch_size of vision_config)"),
        ("llava", "text_config", "num_key_value_heads", 3, "cannot share 3 heads of keys and values (num_key_value_heads"),
        ("llava", "text_config", "num_key_value_heads", 0, "ZeroDivisionError"),
        ("llava", "text_config", "num_hidden_layers", 0, "has no layers (num_hidden_layers"),
        ("llava", None, "image_token_index", 10**6, "has image_token_index 1000000, and the vocabulary"),
        ("llava-next-video", None, "video_token_index", 10**6, "has video_token_index 1000000, and the vocabulary"),
        ("llava", "text_config", "vocab_size", -4, "has text_config.vocab_size -4, and no tensor of the checkpoint has a dimension"),
    ],
)  # fmt: skip
def test_a_config_that_describes_no_model_is_refused(family, part, key, value, message, tmp_path):
    checkpoint = with_config(write_checkpoint(tmp_path / "checkpoint", family), part, key, value)
    assert_refused(family, checkpoint, message, tmp_path)


@pytest.mark.parametrize("family", ["llava-next", "llava-next-video"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strategy": "full"}, "takes 17 features of a patch whose grid has 4 x 4 (vision_feature_select_strategy full): "
         "set it to default"),
        ({"vision": "siglip"}, "takes 15 features of a patch whose grid has 4 x 4 (vision_feature_select_strategy default): "
         "set it to full"),
        ({"pinpoints": []}, "(image_grid_pinpoints)"),
        ({"pinpoints": [[SIZE]]}, "(image_grid_pinpoints)"),
    ],
    ids=["clip, full", "siglip, default", "no resolution", "half a resolution"],
)  # fmt: skip
def test_a_grid_that_transformers_cannot_pack_either_is_refused(family, options, message, tmp_path):
    options = dict(options)
    pinpoints = options.pop("pinpoints", GRID)
    checkpoint = write_checkpoint(tmp_path / "checkpoint", family, **options)
    with_config(checkpoint, None, "image_grid_pinpoints", pinpoints)
    assert_refused(family, checkpoint, message, tmp_path)
    peer = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32)
    pixels, sizes = torch.zeros(1, 5, 3, SIZE, SIZE), torch.tensor([[2 * SIZE, 2 * SIZE]])
    with pytest.raises((RuntimeError, TypeError, ValueError)):
        peer.get_image_features(pixels, sizes)


def assert_refused(family, checkpoint, message, place):
    """With one sentence and exit code 2, and no file is left."""
    before = {path for path in place.rglob("*") if path.is_file()}
    result = vlmconvert(family, checkpoint, "-o", place / "out", "--store", place / "store")
    assert result.exit_code == 2, result.output
    assert message in result.output
    assert "config.json" in result.output
    assert {path for path in place.rglob("*") if path.is_file()} == before
    assert not (place / "out").exists()


@pytest.mark.parametrize("error", [ImportError("libfoo"), ConversionError("a sentence")])
def test_what_the_config_is_not_to_blame_for_keeps_its_name(error):
    with pytest.raises(type(error), match=str(error)), config_to_blame("no model"):
        raise error
    with pytest.raises(BadInputError) as raised, config_to_blame("no model"):
        raise KeyError("nope")
    assert isinstance(raised.value.__cause__, KeyError)


@pytest.mark.parametrize("family", exhaustive_but(["qwen3-vl"], LINE))
@pytest.mark.parametrize("target", ["openvino", "onnx"])
def test_generate_gives_every_familys_tokens(family, target, tmp_path, store):
    checkpoint = write_checkpoint(tmp_path / "checkpoint", family)
    exact = tmp_path / "exact"
    result = vlmconvert(
        family, checkpoint, "--target", target, "--llm", "fp32", "--vision", "fp32", "--no-validate", "-o", exact,
        "--store", store,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    model, processor = package.load(exact), load_processor(exact)
    peer = AutoModelForImageTextToText.from_pretrained(checkpoint, dtype=torch.float32).eval()
    scenes = [draw_scene(Split.TEST, number) for number in range(4)]
    frames = [scenes[0].image.resize((60, 40))] * 2
    # SmolVLM takes no images beside videos.
    videos = [[frames]] * 4 if load_family(family).takes_videos and family != "smolvlm" else ()
    texts = [chat_prompt(processor, ((scene.questions[0].text, None),), 1, bool(videos)) for scene in scenes]
    inputs = process(processor, texts, [[scene.image] for scene in scenes], videos, tensors="pt")
    assert torch.equal(*(side.generate(**inputs, max_new_tokens=8) for side in (peer, model)))


@pytest.mark.exhaustive
def test_onnx_files_and_ports_are_those_of_the_ecosystem(tmp_path, store):
    checkpoint = write_checkpoint(tmp_path / "checkpoint")
    options = ("--llm", "int4", "--group-size", 32, "--vision", "fp32", "--no-validate", "--store", store)
    result = vlmconvert("llava", checkpoint, "--target", "onnx", *options, "-o", tmp_path / "out")
    assert result.exit_code == 0, result.output
    ports = {}
    for path in (tmp_path / "out").glob("*.onnx"):
        onnx.checker.check_model(path)
        graph = onnx.load(path, load_external_data=False).graph
        ports[path.name] = [item.name for item in graph.input], [item.name for item in graph.output]
    assert ports["vision_encoder.onnx"] == (["pixel_values"], ["image_features"])
    assert ports["embed_tokens.onnx"] == (["input_ids"], ["inputs_embeds"])
    inputs, outputs = ports["decoder_model_merged.onnx"]
    caches = [f"{layer}.{part}" for layer in range(3) for part in ("key", "value")]
    names = {"inputs_embeds", "attention_mask", "position_ids"}
    assert set(inputs) == names | {f"past_key_values.{name}" for name in caches}
    assert set(outputs) == {"logits"} | {f"present.{name}" for name in caches}


def test_run_answers_about_a_video_with_files_of_transformers_4(tmp_path, store):
    checkpoint = as_transformers_4(write_checkpoint(tmp_path / "checkpoint", "llava-next-video"))
    result = vlmconvert(
        "llava-next-video", checkpoint, "--llm", "fp16", "--vision", "fp16", "--no-validate", "-o", tmp_path / "out",
        "--store", store,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    write_clip(tmp_path / "clip.mp4")
    result = vlmconvert(
        "run", tmp_path / "out", "--video", tmp_path / "clip.mp4", "--frames", 4, "--prompt", "What happens?",
        "--max-new-tokens", 3,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert "first token" in result.output


@pytest.mark.parametrize("family", [family for family in LINE if family.startswith("llava")])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"text_config": {"model_type": "opt"}}, "the text model is a opt"),
        ({"text_config": {"model_type": "gpt2"}}, "the text model is a gpt2"),
        ({"vision_config": {"model_type": "siglip2_vision_model"}}, "the vision tower is a siglip2_vision_model"),
        ({"vision_feature_layer": []}, "takes no hidden state of the vision tower"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_part_that_cannot_be_streamed_is_named(family, options, message):
    config = AutoConfig.for_model(family.replace("-", "_"), **options).to_dict()
    with pytest.raises(BadInputError, match=message):
        load_family(family).components(config)


@pytest.mark.parametrize("other", [True, False])
def test_a_tied_head_with_values_of_its_own_is_refused(other, tmp_path, store):
    checkpoint = write_checkpoint(tmp_path / "checkpoint", tied=True)
    rewrite(
        checkpoint,
        lambda tensors: {
            **tensors, "language_model.lm_head.weight": tensors["language_model.model.embed_tokens.weight"] + int(other)
        },
    )  # fmt: skip
    result = vlmconvert(
        "llava",
        checkpoint,
        "--llm",
        "fp16",
        "--vision",
        "fp16",
        "--no-validate",
        "-o",
        tmp_path / "out",
        "--store",
        store,
    )
    assert result.exit_code == (2 if other else 0), result.output
    assert ("set tie_word_embeddings to false" in result.output) == other


@pytest.mark.exhaustive
def test_a_pooling_that_no_sample_reaches_is_compressed_without_activations(tmp_path, store):
    checkpoint = write_checkpoint(tmp_path / "checkpoint", "llava-next-video", spatial_pool_mode="conv")
    result = vlmconvert(
        "llava-next-video", checkpoint, "--vision-samples", 4, "--samples", 4, "--group-size", 32, "--no-validate",
        "-o", tmp_path / "out", "--store", store,
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    components = {item.name: item for item in read_manifest(tmp_path / "out").components}
    assert components["vision_resampler"].precision == "int8"
    assert "no sample reaches it" in components["vision_resampler"].fallbacks[0]
    assert components["vision_embeddings"].precision == "int8-ptq"


def test_the_wrong_family_is_named(places, store, tmp_path):
    checkpoint, _ = places("llava-next")
    result = vlmconvert("llava", checkpoint, "-o", tmp_path / "out", "--store", store)
    assert result.exit_code == 2
    assert "use vlmconvert llava-next" in result.output


def test_a_family_without_an_embedded_checkpoint_asks_for_one(store, tmp_path):
    result = vlmconvert("llava-next", "-o", tmp_path / "out", "--store", store)
    assert result.exit_code == 2
    assert "llava-next has no demo checkpoint" in result.output
