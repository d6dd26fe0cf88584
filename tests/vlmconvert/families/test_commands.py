"""Every command goes through for every family: on a compressed artifact, with images, and with a video where the family takes one."""

import json

import pytest

from calibration.scenes import Split, draw_scene
from manifests.bench import read_bench
from manifests.evaluation import read_evaluation
from manifests.io import read_manifest
from tests.checkpoints import write_checkpoint
from tests.conftest import exhaustive_but, vlmconvert
from tests.prompts import write_clip
from vlmconvert.families import FAMILIES, demo_checkpoint, load_family

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("name", exhaustive_but(["llava-next-video", "qwen3-vl"], FAMILIES.names))
def test_every_command(name, tmp_path, store):
    family = load_family(name)
    checkpoint = demo_checkpoint(name) or write_checkpoint(tmp_path / "checkpoint", name)
    artifact, photos = tmp_path / "artifact", tmp_path / "photos"
    photos.mkdir()
    for number in range(2):
        draw_scene(Split.TEST, number).image.save(photos / f"{number}.png")

    def run(*line):
        result = vlmconvert(*line)
        assert result.exit_code == 0, (line, result.output)
        return result.output

    run(
        "convert", checkpoint, "--llm", "int4-awq", "--vision", "int8-ptq", "--samples", 8, "--vision-samples", 8,
        "--group-size", 32, "--validation-samples", 10, "--max-drop", 100, "--max-kl", 10, "-o", artifact, "--store", store,
    )  # fmt: skip
    kl = {item.component: item.value for item in read_manifest(artifact).validation if item.metric == "kl"}
    assert all(0 < kl[component] < 10 for component in ("language_model", "artifact")), kl
    run("verify", artifact)
    question = ("--prompt", "What is this?", "--max-new-tokens", 3)
    image = ("--image", photos / "0.png")
    assert "first token" in run("run", artifact, *image, *image, *question)
    assert "first token" in run("run", artifact, *question)
    if family.takes_videos:
        write_clip(tmp_path / "clip.mp4")
        assert "first token" in run("run", artifact, "--video", tmp_path / "clip.mp4", "--frames", 4, *question)
    run(
        "evaluate", artifact, "--checkpoint", checkpoint, "--samples", 4, "--block-samples", 2, "--store", store,
        "--metrics", "kl,token_agreement", "--max-new-tokens", 4,
    )  # fmt: skip
    blocks = {(item.component, item.block) for item in read_evaluation(artifact / "evaluation").blocks}
    assert ("language_model", "layers.2") in blocks
    visions = {part.name for part in read_manifest(artifact).components if part.name.startswith("vision")}
    # No sample has a video, so nothing is known of what only videos reach.
    assert visions - {"vision_resampler"} <= {component for component, _ in blocks}
    run("check", artifact, "--baseline", artifact, "--samples", 4)
    run("bench", artifact, "--baseline", checkpoint, "--repeats", 1, "--warmup", 0, "--new-tokens", 3, "--batch", "1,2")
    rows = read_bench(artifact).rows
    assert [row.batch for row in rows] == [1, 2]
    assert all(row.vision_ms.median > 0 for row in rows)
    run("describe", artifact, "--images", photos, "--max-new-tokens", 4, "-o", tmp_path / "described.json")
    assert len(json.loads((tmp_path / "described.json").read_text())["descriptions"]) == 2
    run("report", artifact, "-o", tmp_path / "report.html")
    assert name in (tmp_path / "report.html").read_text()
