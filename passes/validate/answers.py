"""The distance of a model from the reference's answers, token by token; and storing answers on disk."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from passes.validate.comparison import kl_divergence, token_losses
from passes.validate.greedy import Greedy, forced_logits
from passes.validate.model import Model

__all__ = ["Distances", "distances", "read_greedy", "write_greedy"]


@dataclass(frozen=True)
class Distances:
    """Distances of a model from the reference along the reference's own answers; arrays [batch], means over a row's tokens.

    Attributes:
        kl: Kullback-Leibler divergence from the reference, in nats.
        agreement: share of the answer's tokens that are also the model's most likely ones.
        loss: negative log-likelihood that the model gives to the tokens, in nats; its exponential is the perplexity.
        reference_loss: the same of the reference.
        tokens: number of tokens of the answer.
    """

    kl: np.ndarray
    agreement: np.ndarray
    loss: np.ndarray
    reference_loss: np.ndarray
    tokens: np.ndarray

    def lists(self) -> dict[str, list[float]]:
        """All attributes as plain lists, by name."""
        return {field.name: getattr(self, field.name).tolist() for field in fields(self)}

    @classmethod
    def of_lists(cls, lists: dict[str, list[float]]) -> Distances:
        """Make the distances again from what `lists` returned."""
        return cls(**{name: np.array(values) for name, values in lists.items()})


def distances(reference: Greedy, model: Model, processed: dict[str, np.ndarray]) -> Distances:
    """Feed `model` with the reference's answers to a batch of prompts (teacher forcing), and compare the logits.

    Args:
        reference: the reference's greedy answers.
        model: the model to compare.
        processed: the prompts, as outputs of the processor.
    """
    logits = forced_logits(model, processed, reference.tokens)
    valid = reference.valid
    count = valid.sum(axis=1)

    def mean(values: np.ndarray) -> np.ndarray:
        return np.where(valid, values, 0).sum(axis=1) / count

    return Distances(
        mean(kl_divergence(reference.logits, logits)),
        mean(logits.argmax(axis=-1) == reference.tokens),
        mean(token_losses(logits, reference.tokens)),
        mean(token_losses(reference.logits, reference.tokens)),
        count,
    )


def write_greedy(answers: Greedy, file: Path) -> None:
    """Write answers to a safetensors file, with the logits of valid steps only."""
    from safetensors.numpy import save_file

    arrays = {"tokens": answers.tokens, "valid": answers.valid, "logits": answers.logits[answers.valid]}
    save_file({name: np.ascontiguousarray(value) for name, value in arrays.items()}, file)


def read_greedy(file: Path) -> Greedy:
    """Read what `write_greedy` wrote; logits of steps after a row's end are zero."""
    from safetensors.numpy import load_file

    arrays = load_file(file)
    logits = np.zeros((*arrays["valid"].shape, arrays["logits"].shape[-1]), np.float32)
    logits[arrays["valid"]] = arrays["logits"]
    return Greedy(arrays["tokens"], logits, arrays["valid"])
