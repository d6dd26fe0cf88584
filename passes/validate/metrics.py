"""Metrics over answers as texts: exact match, VQA accuracy, and the caption metrics of COCO.

Once a text is divided into words, BLEU, ROUGE-L and CIDEr are computed as in https://github.com/tylin/coco-caption. There,
words come from Stanford's PTBTokenizer, a Java program, and punctuation is removed; `tokenize` gives the same words for plain
captions. It differs for brackets and symbols, which it drops (COCO keeps `-lrb-`, `&`, `%`), for abbreviations (`u.s.`) and
slashes (`and/or`), which it splits, and for `cannot` and `gonna`, which it does not split. For captions with these, figures
are close to published ones, but not equal.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from manifests.errors import BadInputError
from passes.validate.vqa import LEAST_ANSWERS, vqa_accuracy

__all__ = ["METRICS", "Metric", "exact_match", "metric", "rouge_l", "tokenize"]

_N = 4  # longest n-gram
_BETA = 1.2  # ROUGE-L: weight of recall over precision
_SIGMA = 6.0  # CIDEr-D: standard deviation of the length penalty, in bigrams
# They make BLEU without any match almost 0 instead of undefined; the values are those of coco-caption.
_TINY, _SMALL = 1e-15, 1e-9
_CLITICS = "'(?:s|re|ve|ll|d|m)(?!\\w)"
_TOKEN = re.compile(rf"n't(?!\w)|{_CLITICS}|\d+(?:[.,:]\d+)+|\w+?(?=n't(?!\w))|\w+(?:-\w+|(?!{_CLITICS})'\w+)*")


class Metric(Protocol):
    """A metric: one figure over a corpus of answers, and a score for each sample."""

    @property
    def name(self) -> str:
        """Name of the metric on the command line and in evaluations."""
        ...

    def score(self, answers: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[float, list[float]]:
        """Score all answers.

        Args:
            answers: one for each sample.
            references: the right answers for each sample.

        Returns:
            The figure over the corpus, and one score for each sample.

        Raises:
            BadInputError: if there are no samples, or a sample has too few references.
        """
        ...


@dataclass(frozen=True)
class _Mean:
    """A metric that scores each sample by itself, from 0 to 1; the figure is the mean of the scores."""

    name: str
    one: Callable[[str, Sequence[str]], float]
    least_references: int = 1

    def score(self, answers: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[float, list[float]]:
        _check(self.name, references, self.least_references)
        scores = [self.one(*pair) for pair in zip(answers, references, strict=True)]
        return _mean(scores), scores


@dataclass(frozen=True)
class _Bleu:
    """BLEU-4, from 0 to 1 (Papineni et al., 2002).

    Matches and lengths are summed over the corpus before they are divided. The brevity penalty uses the reference whose
    length is nearest to the answer's, the shorter one of two. A sample's score is the same formula over that sample alone,
    not smoothed: almost 0 without a common 4-gram. So the figure is not the mean of the scores.
    """

    name: str = "bleu4"

    def score(self, answers: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[float, list[float]]:
        _check(self.name, references)
        counts = [self._count(*pair) for pair in zip(answers, references, strict=True)]
        return self._bleu([sum(column) for column in zip(*counts, strict=True)]), [self._bleu(row) for row in counts]

    @staticmethod
    def _count(answer: str, references: Sequence[str]) -> list[int]:
        """Length of the answer, length of the nearest reference, matching 1- to 4-grams, and all 1- to 4-grams."""
        words = tokenize(answer)
        others = [tokenize(reference) for reference in references]
        nearest = min((abs(len(other) - len(words)), len(other)) for other in others)[1]
        most: Counter[tuple[str, ...]] = Counter()
        for other in others:
            most |= _ngrams(other)
        matches = Counter(dict.fromkeys(range(1, _N + 1), 0))
        for ngram, count in (_ngrams(words) & most).items():
            matches[len(ngram)] += count
        return [len(words), nearest, *matches.values(), *(max(0, len(words) - n) for n in range(_N))]

    @staticmethod
    def _bleu(counts: Sequence[int]) -> float:
        length, nearest, matches, guesses = counts[0], counts[1], counts[2 : 2 + _N], counts[2 + _N :]
        pairs = zip(matches, guesses, strict=True)
        precision = math.prod((match + _TINY) / (guess + _SMALL) for match, guess in pairs) ** (1 / _N)
        ratio = (length + _TINY) / (nearest + _SMALL)
        return precision * math.exp(min(0.0, 1 - 1 / ratio))


@dataclass(frozen=True)
class _Cider:
    """CIDEr-D, from 0 to 10 (Vedantam et al., "CIDEr: Consensus-based Image Description Evaluation", 2015).

    The weight of an n-gram depends on how rare it is in the references of the scored corpus, so figures can be compared only
    on equal samples, and a single sample scores 0.
    """

    name: str = "cider"

    def score(self, answers: Sequence[str], references: Sequence[Sequence[str]]) -> tuple[float, list[float]]:
        _check(self.name, references)
        counted = [[_ngrams(tokenize(text)) for text in texts] for texts in references]
        frequency = Counter(ngram for texts in counted for ngram in set().union(*texts))
        size = math.log(len(counted))

        def weigh(ngrams: Counter[tuple[str, ...]]) -> _Weighted:
            weights = {ngram: count * (size - math.log(max(1, frequency[ngram]))) for ngram, count in ngrams.items()}
            squares = [0.0] * _N
            for ngram, weight in weights.items():
                squares[len(ngram) - 1] += weight**2
            bigrams = sum(count for ngram, count in ngrams.items() if len(ngram) == 2)
            return _Weighted(weights, [math.sqrt(square) for square in squares], bigrams)

        scores = []
        for answer, texts in zip(answers, counted, strict=True):
            own = weigh(_ngrams(tokenize(answer)))
            scores.append(10 * _mean([own.similarity(weigh(text)) for text in texts]))
        return _mean(scores), scores


@dataclass(frozen=True)
class _Weighted:
    """A text as CIDEr-D compares it: the weight of each n-gram, the norm for each n, and the number of bigrams."""

    weights: dict[tuple[str, ...], float]
    norms: list[float]
    bigrams: int

    def similarity(self, reference: _Weighted) -> float:
        products = [0.0] * _N
        for ngram, weight in self.weights.items():
            other = reference.weights.get(ngram, 0.0)
            # Clipped, so that repeating a rare word does not pay.
            products[len(ngram) - 1] += min(weight, other) * other
        cosines = [
            product / (own * other) if own and other else 0.0
            for product, own, other in zip(products, self.norms, reference.norms, strict=True)
        ]
        return _mean(cosines) * math.exp(-((self.bigrams - reference.bigrams) ** 2) / (2 * _SIGMA**2))


def exact_match(answer: str, references: Sequence[str]) -> float:
    """1 if the answer equals one of the references, apart from white space around them, otherwise 0."""
    return float(answer.strip() in {reference.strip() for reference in references})


def rouge_l(answer: str, references: Sequence[str]) -> float:
    """ROUGE-L, from 0 to 1 (Lin, "ROUGE", 2004), with COCO's beta of 1.2.

    The best precision and the best recall over the references count, even if they belong to different ones.
    """
    words = tokenize(answer)
    precision = recall = 0.0
    for reference in references:
        other = tokenize(reference)
        common = _longest_common(words, other)
        if common:
            precision = max(precision, common / len(words))
            recall = max(recall, common / len(other))
    if not precision:
        return 0.0
    return (1 + _BETA**2) * precision * recall / (recall + _BETA**2 * precision)


def tokenize(text: str) -> list[str]:
    """Words in lower case, without punctuation.

    As in the Penn Treebank, a clitic is a word of its own (`man 's`, `do n't`), and words are not split at hyphens, nor
    numbers at points.
    """
    return _TOKEN.findall(text.lower().replace("\u2019", "'"))


def metric(name: str) -> Metric:
    """The metric of that name.

    Raises:
        BadInputError: if no metric has that name.
    """
    if name not in METRICS:
        raise BadInputError(f"metric {name} is unknown: use {', '.join(METRICS)}")
    return METRICS[name]


METRICS: dict[str, Metric] = {
    item.name: item
    for item in (
        _Mean("exact_match", exact_match),
        _Mean("vqa", vqa_accuracy, LEAST_ANSWERS),
        _Cider(),
        _Bleu(),
        _Mean("rouge_l", rouge_l),
    )
}


def _check(name: str, references: Sequence[Sequence[str]], least: int = 1) -> None:
    if not references:
        raise BadInputError(f"metric {name} has no samples to score: give a source with samples")
    for number, given in enumerate(references, start=1):
        if len(given) < least:
            raise BadInputError(
                f"metric {name} needs at least {least} right answers, and sample {number} has {len(given)}: "
                "use another metric, or data with more answers"
            )


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _ngrams(words: Sequence[str]) -> Counter[tuple[str, ...]]:
    """How often each n-gram of 1 to 4 words occurs."""
    return Counter(tuple(words[first : first + n]) for n in range(1, _N + 1) for first in range(len(words) - n + 1))


def _longest_common(left: Sequence[str], right: Sequence[str]) -> int:
    """Length of the longest common subsequence."""
    row = [0] * (len(right) + 1)
    for word in left:
        diagonal = 0
        for place, other in enumerate(right, start=1):
            above = row[place]
            row[place] = diagonal + 1 if word == other else max(above, row[place - 1])
            diagonal = above
    return row[-1]
