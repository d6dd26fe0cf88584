"""The figures are those of the official code; see test_metrics.py."""

import json
from pathlib import Path

import pytest

from manifests.errors import BadInputError
from manifests.evaluation import Prediction
from passes.validate.metrics import metric
from passes.validate.vqa import evalai, normalize_answer, vqa_accuracy

FIGURES = json.loads(Path(__file__).with_name("reference_figures.json").read_text(encoding="utf-8"))


def test_accuracy_is_the_official_one():
    cases = FIGURES["vqa"]
    figure, scores = metric("vqa").score(cases["answers"], cases["references"])
    assert scores == pytest.approx(cases["accuracy"], abs=1e-9)
    assert figure == pytest.approx(cases["overall"], abs=1e-9)


def test_texts_are_normalized_as_officially():
    assert {text: normalize_answer(text) for text in FIGURES["normalized"]} == FIGURES["normalized"]


@pytest.mark.parametrize(("people", "accuracy"), [(0, 0), (1, 0.3), (2, 0.6), (3, 0.9), (4, 1), (10, 1)])
def test_people_who_agree(people, accuracy):
    assert vqa_accuracy("Two!", ["2"] * people + ["three"] * (10 - people)) == pytest.approx(
        # When all ten say the same, the official code normalizes nothing.
        0 if people == 10 else accuracy
    )


def prediction(id: str, answer: str) -> Prediction:
    return Prediction(
        id=id,
        image="",
        prompt="",
        references=[],
        answer=answer,
        checkpoint_answer=None,
        scores={},
        checkpoint_scores={},
    )


def test_evalai_takes_question_ids_and_answers():
    answers = evalai([prediction("262148000", " down\n"), prediction("5", "2")])
    assert answers == [{"question_id": 262148000, "answer": "down"}, {"question_id": 5, "answer": "2"}]
    with pytest.raises(BadInputError, match="scene-1 is not named by a question_id"):
        evalai([prediction("scene-1", "")])
    with pytest.raises(BadInputError, match="7 is answered twice"):
        evalai([prediction("7", "a"), prediction("7", "b")])
