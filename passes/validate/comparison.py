"""Running checkpoint and artifact side by side on held-out prompts; the validation passes judge what was found."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from passes.validate.greedy import forced_logits, greedy
from passes.validate.model import Answered, Batch, Model
from passes.validate.streamed import StreamedModel

__all__ = ["STEPS", "Comparison", "Distance", "compare", "compare_in_blocks", "kl_divergence", "token_losses"]

# Maximum number of tokens of an answer.
STEPS = 16


@dataclass(frozen=True)
class Distance:
    """Distance of logits from the checkpoint's, along the checkpoint's own greedy answers to a batch.

    Attributes:
        kl: [tokens], Kullback-Leibler divergence from the checkpoint, in nats.
        agree: [tokens], whether the most likely token is the checkpoint's.
        greatest: maximum difference between two logits.
    """

    kl: np.ndarray
    agree: np.ndarray
    greatest: float


@dataclass(frozen=True)
class Comparison:
    """What one batch of prompts says about an artifact.

    Attributes:
        distances: name of a side, or "artifact" for the whole -> its distance from the checkpoint.
        right: how many greedy answers of the checkpoint, and how many of the artifact, are the right ones, letter by letter.
        samples: number of prompts.
        losses: [tokens, 2], negative log-likelihood of each token of the right answers for checkpoint and artifact, in nats;
            None if the comparison is along other answers.
    """

    distances: Mapping[str, Distance]
    right: tuple[int, int]
    samples: int
    losses: np.ndarray | None = None


def kl_divergence(reference: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Kullback-Leibler divergence of `other` from `reference` in nats; both are logits, with the vocabulary as last axis."""
    p, q = _log_softmax(reference), _log_softmax(other)
    return np.maximum((np.exp(p) * (p - q)).sum(axis=-1), 0.0)


def token_losses(logits: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """Negative log-likelihood of tokens [...] in nats, by the logits [..., vocabulary] that they are chosen by."""
    losses: np.ndarray = -np.take_along_axis(_log_softmax(logits), tokens[..., None], axis=-1)[..., 0]
    return losses


def _log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    found: np.ndarray = shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))
    return found


def compare(
    reference: Model,
    artifact: Model,
    batch: Batch,
    ends: list[int],
    sides: tuple[str, str],
    decode: Callable[[np.ndarray], list[str]],
) -> Comparison:
    """Run checkpoint and artifact on a batch of prompts.

    Each side is measured together with the other side of the checkpoint: the artifact's language model reads the outputs of
    the checkpoint's vision side, and the checkpoint's language model reads those of the artifact's vision side.

    Args:
        reference: the checkpoint.
        artifact: the artifact.
        batch: the prompts and their right answers.
        ends: tokens that end an answer.
        sides: names of the vision side and of the language model in `Comparison.distances`.
        decode: turns tokens [batch, steps] into texts.
    """
    expected = greedy(reference, batch.processed, ends, STEPS)
    handed = dict(reference.handed)
    answers = greedy(artifact, batch.processed, ends, STEPS)
    own = dict(artifact.handed)

    def distance(logits: np.ndarray) -> Distance:
        return Distance(
            kl_divergence(expected.logits, logits)[expected.valid],
            (logits.argmax(axis=-1) == expected.tokens)[expected.valid],
            float(np.abs(logits - expected.logits)[expected.valid].max()),
        )

    def right(tokens: np.ndarray, valid: np.ndarray) -> int:
        texts = decode(np.where(valid, tokens, ends[0]))
        return sum(text.strip() == answer.strip() for text, answer in zip(texts, batch.answers, strict=True))

    same = np.array_equal(answers.tokens, expected.tokens)
    whole = answers.logits if same else forced_logits(artifact, batch.processed, expected.tokens, own)
    distances = {
        sides[0]: distance(forced_logits(reference, batch.processed, expected.tokens, own)),
        sides[1]: distance(forced_logits(artifact, batch.processed, expected.tokens, handed)),
        "artifact": distance(whole),
    }
    counts = right(expected.tokens, expected.valid), right(answers.tokens, answers.valid)
    return Comparison(distances, counts, len(batch.answers))


def compare_in_blocks(
    reference: StreamedModel, artifact: StreamedModel, batch: Answered, sides: tuple[str, str]
) -> Comparison:
    """Run checkpoint and artifact block by block on prompts that end with the right answers.

    Distances are those along the right answers, so that every block is loaded only twice for each model. Greedy decoding gives
    the right answer if each of its tokens is the most likely one.

    Args:
        reference: the checkpoint.
        artifact: the artifact.
        batch: the prompts with their answers.
        sides: see `compare`.
    """
    count = batch.said.shape[1]
    tokens = batch.processed["input_ids"][:, -count:]

    def logits(model: StreamedModel, handed: dict[str, np.ndarray] | None = None) -> np.ndarray:
        found = model.prefill(batch.processed, handed, count + 1)[:, :-1]
        model.forget()
        return found

    expected, whole = logits(reference), logits(artifact)
    handed, own = dict(reference.handed), dict(artifact.handed)

    def distance(found: np.ndarray) -> Distance:
        return Distance(
            kl_divergence(expected, found)[batch.said],
            (found.argmax(axis=-1) == expected.argmax(axis=-1))[batch.said],
            float(np.abs(found - expected)[batch.said].max()),
        )

    def right(found: np.ndarray) -> int:
        return int(((found.argmax(axis=-1) == tokens) | ~batch.said).all(axis=1).sum())

    distances = {
        sides[0]: distance(logits(reference, own)),
        sides[1]: distance(logits(artifact, handed)),
        "artifact": distance(whole),
    }
    losses = np.stack([token_losses(found[batch.said], tokens[batch.said]) for found in (expected, whole)], axis=1)
    return Comparison(distances, (right(expected), right(whole)), len(batch.said), losses)
