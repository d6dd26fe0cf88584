"""Every command on the LLaVA line, as on mllama."""

import json

import pytest
import torch
from transformers import LlavaForConditionalGeneration

import vlmconvert as package
from calibration.inputs import chat_text, load_processor, process
from calibration.scenes import Split, draw_scene
from manifests.bench import read_bench
from manifests.evaluation import read_evaluation
from manifests.io import read_manifest
from tests.checkpoints import write_checkpoint
from tests.conftest import vlmconvert
from tests.garbage import copy, flip_bit
from vlmconvert.families import FAMILIES

LINE = [family for family in FAMILIES if family != "mllama"]


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


@pytest.mark.parametrize("family", LINE)
def test_compressed_conversion_and_its_record(places, family):
    _, artifact = places(family)
    manifest = read_manifest(artifact)
    precisions = {item.name: item.precision for item in manifest.components}
    assert precisions["language_model"] == precisions["text_embeddings"] == "int4-awq"
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


@pytest.mark.parametrize("family", LINE)
def test_verify_run_evaluate_check_and_bench(places, family, store, tmp_path):
    checkpoint, artifact = places(family)
    for options in (
        ("verify", artifact),
        ("evaluate", artifact, "--checkpoint", checkpoint, "--samples", 4, "--block-samples", 2, "--store", store,
         "--metrics", "kl,token_agreement", "--max-new-tokens", 4),
        ("check", artifact, "--baseline", artifact, "--samples", 4),
        ("bench", artifact, "--baseline", checkpoint, "--repeats", 1, "--warmup", 0, "--new-tokens", 3, "--batch", "1,2"),
    ):  # fmt: skip
        result = vlmconvert(*options)
        assert result.exit_code == 0, (options, result.output)
    evaluation = read_evaluation(artifact / "evaluation")
    blocks = {(item.component, item.block) for item in evaluation.blocks}
    expected = {("vision_embeddings", "layers.0"), ("text_embeddings", "embed_tokens"), ("language_model", "layers.2")}
    assert expected <= blocks
    if family == "llava-next-video":
        # No sample has a video, so nothing is known of the pooling.
        assert ("multi_modal_projector", "multi_modal_projector") in blocks
        assert not any(component == "vision_resampler" for component, _ in blocks)
    rows = read_bench(artifact).rows
    assert [row.batch for row in rows] == [1, 2]
    assert all(row.vision_ms.median > 0 for row in rows)
    picture = tmp_path / "scene.png"
    draw_scene(Split.TEST, 0).image.save(picture)
    result = vlmconvert("run", artifact, "--image", picture, "--prompt", "What is this?", "--max-new-tokens", 3)
    assert result.exit_code == 0, result.output
    assert "first token" in result.output


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
    texts = [chat_text(processor, ((scene.questions[0].text, None),)) for scene in scenes]
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
        ({"text": "phi"}, "the text model is a phi, whose layers cannot be streamed"),
        ({"layer": 9}, "takes hidden state 9 of the vision tower"),
        ({"text": "qwen2", "text_options": {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}},
         "of several kinds"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_what_cannot_be_converted_is_refused(options, message, tmp_path, store):
    checkpoint = write_checkpoint(tmp_path / "checkpoint", **options)
    result = vlmconvert("llava", checkpoint, "-o", tmp_path / "out", "--store", store)
    assert result.exit_code == 2, result.output
    assert message in result.output
    assert not (tmp_path / "out").exists()


def test_the_wrong_family_is_named(places, store, tmp_path):
    checkpoint, _ = places("llava-next")
    result = vlmconvert("llava", checkpoint, "-o", tmp_path / "out", "--store", store)
    assert result.exit_code == 2
    assert "use vlmconvert llava-next" in result.output


def test_a_family_without_an_embedded_checkpoint_asks_for_one(store, tmp_path):
    result = vlmconvert("llava-next", "-o", tmp_path / "out", "--store", store)
    assert result.exit_code == 2
    assert "there is no embedded llava-next checkpoint" in result.output
