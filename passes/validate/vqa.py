"""VQA accuracy as in the VQAv2 evaluation, and the list of answers that the VQAv2 server takes.

The rule is from Antol et al., "VQA: Visual Question Answering" (2015). Answers are normalized as in the evaluation code at
https://github.com/GT-Vision-Lab/VQA, by its tables of words with all their oddities, so that figures can be compared with
published ones.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from manifests.errors import BadInputError
from manifests.evaluation import Prediction

__all__ = ["LEAST_ANSWERS", "evalai", "normalize_answer", "vqa_accuracy"]

# Minimum number of references: with fewer, no answer could score 1, for which three people besides the one left out must agree.
LEAST_ANSWERS = 4

_ARTICLES = {"a", "an", "the"}
_NUMBERS = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
_DIGITS = {"none": "0"} | {word: str(number) for number, word in enumerate(_NUMBERS)}
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_DIGIT_COMMA_DIGIT = re.compile(r"\d,\d")
_PERIOD = re.compile(r"\.(?!\d)")
_CONTRACTED = """
    ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
    how'd how'll how's isn't it'd it'd've it'll ma'am might've mightn't mightn't've must've mustn't needn't not've o'clock
    oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
    someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's
    they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's where'd
    where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've y'all y'all'd've
    y'all'll you'd you'd've you'll you're you've
"""
# Contractions are recognised with any one of their apostrophes left out.
_CONTRACTIONS = {
    word[:place] + word[place + 1 :]: word
    for word in _CONTRACTED.split()
    for place, letter in enumerate(word)
    if letter == "'"
} | {"somebody'd": "somebodyd"}


def vqa_accuracy(answer: str, references: Sequence[str]) -> float:
    """Accuracy of one answer, from 0 to 1.

    Each reference is left out in turn, and min(matches among the others / 3, 1) is averaged. As in the official code, texts
    are normalized only if the references differ; otherwise, the answer must equal them letter by letter.
    """
    answer = _one_line(answer)
    references = [_one_line(reference) for reference in references]
    if len(set(references)) > 1:
        answer = normalize_answer(answer)
        references = [normalize_answer(reference) for reference in references]
    matches = references.count(answer)
    return sum(min((matches - (reference == answer)) / 3, 1.0) for reference in references) / len(references)


def normalize_answer(text: str) -> str:
    """Normalize a text: lower case, no punctuation, no articles, digits for numbers up to ten, apostrophes in contractions."""
    # As in the official code, a comma between digits changes how all punctuation of the text is treated.
    has_number = _DIGIT_COMMA_DIGIT.search(text) is not None
    cleaned = text
    for mark in _PUNCTUATION:
        joins = not has_number and f"{mark} " not in text and f" {mark}" not in text
        cleaned = cleaned.replace(mark, " " if joins else "")
    words = [_DIGITS.get(word, word) for word in _PERIOD.sub("", cleaned).lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def evalai(predictions: Iterable[Prediction]) -> list[dict[str, int | str]]:
    """The answers in the format of the VQA server on EvalAI: `[{"question_id": 1, "answer": "yes"}, ...]`.

    Raises:
        BadInputError: if the id of a sample is not a question_id, or occurs twice.
    """
    answers: dict[int, str] = {}
    for prediction in predictions:
        if not (prediction.id.isascii() and prediction.id.isdigit()):
            raise BadInputError(f"sample {prediction.id} is not named by a question_id: evaluate on VQA questions")
        if int(prediction.id) in answers:
            raise BadInputError(f"question_id {prediction.id} is answered twice: evaluate on a file without duplicates")
        answers[int(prediction.id)] = _one_line(prediction.answer)
    return [{"question_id": key, "answer": answer} for key, answer in answers.items()]


def _one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()
