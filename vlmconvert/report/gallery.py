"""Samples on which an artifact and its checkpoint disagree."""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from PIL import Image

from calibration.scenes import Split, draw_scene
from calibration.sources import open_image
from calibration.sources.images import on_white
from manifests.evaluation import EVALUATION_FOLDER, IMAGES_FOLDER, Prediction, read_predictions
from vlmconvert.report.variants import Variant, Yardstick

__all__ = ["Answer", "Card", "Tally", "disagreements", "thumbnail"]

_SIDE = 320  # maximum width and height of a thumbnail, in pixels
_LARGE = 16_000  # bytes; a larger PNG shows a photograph, which is stored as JPEG
_SCENE = re.compile(rf"({'|'.join(split.name.lower() for split in Split)})-(\d+)-(\d+)")


@dataclass
class Answer:
    """An answer that differs from the checkpoint's answer.

    Attributes:
        text: text of the answer.
        verdict: `worse`, `better` or `different`, by its score.
        numbers: numbers of the variants that gave this answer.
    """

    text: str
    verdict: str
    numbers: list[int]


@dataclass
class Card:
    """One sample: the question, the answer of the checkpoint, and the different answers of variants.

    Attributes:
        id: id of the sample.
        image: thumbnail as a data URI; None if the image is not available.
        prompt: the question.
        references: correct answers.
        checkpoint_answer: answer of the checkpoint.
        answers: answers that differ from the checkpoint's.
        agreeing: numbers of the variants that answered as the checkpoint.
    """

    id: str
    image: str | None
    prompt: str
    references: list[str]
    checkpoint_answer: str
    answers: list[Answer] = field(default_factory=list)
    agreeing: list[int] = field(default_factory=list)

    def count(self, verdict: str) -> int:
        """Number of variants whose answers got this verdict."""
        return sum(len(answer.numbers) for answer in self.answers if answer.verdict == verdict)


@dataclass(frozen=True)
class Tally:
    """How often the answers of one variant differ from its checkpoint's, and how many of them are worse or better."""

    variant: Variant
    samples: int
    differing: int
    worse: int
    better: int


def disagreements(
    variants: Sequence[Variant], yardstick: Yardstick | None, most: int
) -> tuple[list[Card], list[Tally]]:
    """Collect the samples on which variants and checkpoint disagree.

    Args:
        variants: the artifacts of the report.
        yardstick: metric that decides whether an answer is worse or better; None decides nothing.
        most: maximum number of samples.

    Returns:
        The samples, those with the most worse answers first, and for each variant a tally over all samples.

    Raises:
        BadInputError: if predictions or thumbnails are damaged.
    """
    cards: dict[tuple[str, ...], Card] = {}
    pictures: dict[tuple[str, ...], tuple[Variant, int, Prediction]] = {}
    tallies = []
    for variant in variants:
        if variant.evaluation is None:
            continue
        verdicts = []
        for number, item in enumerate(read_predictions(variant.folder / EVALUATION_FOLDER)):
            if item.checkpoint_answer is None:
                continue
            key: tuple[str, ...] = (variant.evaluation.data.digest, item.id, item.prompt, item.checkpoint_answer)
            card = cards.setdefault(key, Card(item.id, None, item.prompt, item.references, item.checkpoint_answer))
            verdict = _verdict(item, yardstick)
            verdicts.append(verdict)
            if verdict == "same":
                card.agreeing.append(variant.number)
                continue
            pictures.setdefault(key, (variant, number, item))
            for answer in card.answers:
                if answer.text == item.answer:
                    answer.numbers.append(variant.number)
                    break
            else:
                card.answers.append(Answer(item.answer, verdict, [variant.number]))
        if verdicts:
            differing = len(verdicts) - verdicts.count("same")
            tallies.append(Tally(variant, len(verdicts), differing, verdicts.count("worse"), verdicts.count("better")))
    differing_cards = [(key, card) for key, card in cards.items() if card.answers]
    differing_cards.sort(key=lambda item: (-item[1].count("worse"), -item[1].count("different")))
    for key, card in differing_cards[:most]:
        card.image = thumbnail(*pictures[key])
    return [card for _key, card in differing_cards[:most]], tallies


def thumbnail(variant: Variant, number: int, prediction: Prediction) -> str | None:
    """The image of a prediction as a data URI: the stored image, or a scene drawn again; None if neither exists.

    Args:
        variant: the artifact that was evaluated.
        number: index of the prediction in the evaluation.
        prediction: the prediction.
    """
    stored = variant.folder / EVALUATION_FOLDER / IMAGES_FOLDER / f"{number}.png"
    if stored.is_file():
        return _data_uri(open_image(stored))
    match = _SCENE.fullmatch(prediction.image)
    if match and variant.evaluation is not None and variant.evaluation.data.source == "scenes":
        split, seed, index = match.groups()
        try:
            return _data_uri(draw_scene(Split[split.upper()], int(index), int(seed)).image)
        except ValueError:  # the split has no scene of that number
            return None
    return None


def _verdict(item: Prediction, yardstick: Yardstick | None) -> str:
    if item.checkpoint_answer is None or item.answer.strip() == item.checkpoint_answer.strip():
        return "same"
    metric = yardstick.metric if yardstick else ""
    if metric not in item.scores or metric not in item.checkpoint_scores:
        return "different"
    change = item.scores[metric] - item.checkpoint_scores[metric]
    return "worse" if change < 0 else "better" if change > 0 else "different"


def _data_uri(image: Image.Image) -> str:
    image = on_white(image)
    image.thumbnail((_SIDE, _SIDE))
    stream = io.BytesIO()
    image.save(stream, kind := "PNG", optimize=True)
    if stream.tell() > _LARGE:
        stream = io.BytesIO()
        image.save(stream, kind := "JPEG", quality=82)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(stream.getvalue()).decode('ascii')}"
