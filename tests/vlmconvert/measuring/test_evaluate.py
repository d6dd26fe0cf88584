"""`vlmconvert evaluate`: figures, records, resuming, refusals."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

import vlmconvert.measuring.answering as module
from calibration.scenes import Split, draw_scene
from manifests.evaluation import read_evaluation, read_predictions
from passes.validate.answers import read_greedy, write_greedy
from passes.validate.greedy import Greedy
from tests.conftest import vlmconvert
from vlmconvert.targets.runner import GraphRunner

pytestmark = pytest.mark.slow

FLOAT = ("--llm", "fp32", "--vision", "fp32")
QUICK = ("--samples", "12", "--batch", "5", "--block-samples", "0")


@pytest.fixture
def artifact(build, tmp_path):
    """A copy, so that each test has its own evaluation folder."""
    return shutil.copytree(build(*FLOAT), tmp_path / "artifact")


def test_a_float_artifact_is_the_checkpoint(artifact, store):
    metrics = "exact_match,rouge_l,cider,bleu4,kl,token_agreement,perplexity"
    result = vlmconvert("evaluate", artifact, *QUICK, "--metrics", metrics, "--store", store)
    assert result.exit_code == 0, result.output
    evaluation = read_evaluation(artifact / "evaluation")
    figures = {item.metric: item for item in evaluation.figures}
    assert list(figures) == metrics.split(",")
    assert figures["kl"].value < 1e-8
    assert figures["token_agreement"].value == 1
    assert figures["perplexity"].value == pytest.approx(figures["perplexity"].reference, rel=1e-4)
    for name in ("exact_match", "rouge_l", "cider", "bleu4"):
        assert figures[name].value == figures[name].reference
    predictions = list(read_predictions(artifact / "evaluation"))
    assert [item.id for item in predictions] == [draw_scene(Split.TEST, number).id for number in range(12)]
    right = [item.answer == item.references[0] for item in predictions]
    assert figures["exact_match"].value == pytest.approx(np.mean(right))
    assert "exact_match" in result.stdout


def test_what_was_answered_is_never_answered_again(artifact, tmp_path, monkeypatch):
    """A run that dies in its second batch; the next one makes the rest only, and a third one nothing."""
    store = tmp_path / "store"
    counted = {"reference": 0, "artifact": 0}
    real, limit = module.greedy, 1

    def counting(model, *arguments):
        side = "artifact" if isinstance(model, GraphRunner) else "reference"
        if counted[side] == limit:
            raise KeyboardInterrupt
        counted[side] += 1
        return real(model, *arguments)

    monkeypatch.setattr(module, "greedy", counting)
    assert vlmconvert("evaluate", artifact, *QUICK, "--store", store).exit_code != 0
    assert counted == {"reference": 1, "artifact": 0}
    limit = 3
    assert vlmconvert("evaluate", artifact, *QUICK, "--store", store).exit_code == 0
    assert counted == {"reference": 3, "artifact": 3}
    assert vlmconvert("evaluate", artifact, *QUICK, "--store", store).exit_code == 0
    assert counted == {"reference": 3, "artifact": 3}


def test_without_a_checkpoint(artifact, store):
    result = vlmconvert("evaluate", artifact, *QUICK, "--no-checkpoint", "--store", store)
    assert result.exit_code == 0, result.output
    figures = read_evaluation(artifact / "evaluation").figures
    assert [(item.metric, item.reference) for item in figures] == [("exact_match", None)]
    refused = vlmconvert("evaluate", artifact, *QUICK, "--no-checkpoint", "--metrics", "kl", "--store", store)
    assert refused.exit_code == 2
    assert "need the checkpoint" in refused.output


def test_a_checkpoint_that_it_was_not_made_from_is_refused(artifact, demo, store, tmp_path):
    other = shutil.copytree(demo, tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    tensors["language_model.model.norm.weight"] += 1
    save_file(tensors, other / "model.safetensors")
    result = vlmconvert("evaluate", artifact, *QUICK, "--checkpoint", other, "--store", store)
    assert result.exit_code == 2
    assert "model.safetensors differs" in result.output


def test_a_folder_of_images_and_other_ids(artifact, store, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    lines = []
    for number in range(3):
        scene = draw_scene(Split.TEST, number)
        scene.image.save(folder / f"{number}.png")
        question = scene.questions[0]
        lines.append({"file_name": f"{number}.png", "question": question.text, "answer": question.answer})
    (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = vlmconvert(
        "evaluate", artifact, "--data", folder, "--block-samples", "0", "--store", store, "-o", tmp_path / "results"
    )
    assert result.exit_code == 0, result.output
    assert not (artifact / "evaluation").exists()
    predictions = list(read_predictions(tmp_path / "results"))
    assert {item.id for item in predictions} == {"0.png", "1.png", "2.png"}
    assert all(item.scores["exact_match"] for item in predictions)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--metrics", "fame"), "metric fame is unknown"),
        (("--samples", "0"), "--samples 0 is too small"),
        (("--data", "./nowhere"), "nowhere"),
        (("--checkpoint", "./nowhere"), "nowhere"),
    ],
)
def test_bad_input(artifact, store, options, message):
    result = vlmconvert("evaluate", artifact, *options, "--store", store)
    assert result.exit_code == 2, result.output
    assert message in result.output


def test_answers_survive_the_disk(tmp_path):
    valid = np.array([[True, True], [True, False]])
    logits = np.random.default_rng(0).standard_normal((2, 2, 7)).astype(np.float32)
    logits[~valid] = 0
    said = Greedy(np.array([[1, 2], [3, 4]]), logits, valid)
    write_greedy(said, tmp_path / "answers")
    back = read_greedy(tmp_path / "answers")
    for name in ("tokens", "logits", "valid"):
        np.testing.assert_array_equal(getattr(back, name), getattr(said, name))


def test_vqa_by_the_official_rule_and_the_form_of_evalai(artifact, store, tmp_path):
    """Three scenes as VQAv2 files, with ten answers each, one of which nobody else gave."""
    questions, annotations = [], []
    for number in range(3):
        scene = draw_scene(Split.TEST, number)
        scene.image.save(tmp_path / f"COCO_val2014_{number:012d}.jpg", quality=95)
        question = scene.questions[0]
        questions.append({"question_id": 70 + number, "image_id": number, "question": question.text})
        texts = [question.answer] * 9 + ["nothing"]
        annotations.append(
            {
                "question_id": 70 + number,
                "image_id": number,
                "answers": [{"answer": text, "answer_id": index} for index, text in enumerate(texts)],
            }
        )
    (tmp_path / "q.json").write_text(json.dumps({"questions": questions, "data_subtype": "val2014"}))
    (tmp_path / "a.json").write_text(json.dumps({"annotations": annotations, "data_subtype": "val2014"}))
    source = f"{tmp_path / 'q.json'},{tmp_path / 'a.json'}:{tmp_path}"
    options = ("--metrics", "vqa,exact_match", "--block-samples", "0", "--evalai", tmp_path / "evalai.json")
    result = vlmconvert("evaluate", artifact, "--data", source, *options, "--store", store)
    assert result.exit_code == 0, result.output
    predictions = list(read_predictions(artifact / "evaluation"))
    expected = [float(item.answer == item.references[0]) for item in predictions]
    assert [item.scores["vqa"] for item in predictions] == expected
    assert sum(expected) >= 2
    answers = json.loads((tmp_path / "evalai.json").read_text())
    assert answers == [{"question_id": int(item.id), "answer": item.answer} for item in predictions]
