"""How far a model is from the reference's answers, token by token; and answers kept on disk."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from passes.validate.greedy import Greedy, forced_logits
from passes.validate.parity import kl_divergence
from passes.validate.protocol import Model

__all__ = ["Distances", "distances", "read_greedy", "write_greedy"]


@dataclass(frozen=True)
class Distances:
    """Along the reference's own answers, for each row the mean over its tokens.

    Attributes:
        kl: Kullback-Leibler divergence from the reference, in nats.
        agreement: share of tokens that are the most likely ones here too.
        loss, reference_loss: negative log-likelihood of the tokens, in nats; their exponentials are perplexities.
        tokens: how many each row has.
    """

    kl: np.ndarray
    agreement: np.ndarray
    loss: np.ndarray
    reference_loss: np.ndarray
    tokens: np.ndarray

    def lists(self) -> dict[str, list[float]]:
        """As plain lists, by attribute."""
        return {field.name: getattr(self, field.name).tolist() for field in fields(self)}

    @classmethod
    def of_lists(cls, lists: dict[str, list[float]]) -> Distances:
        """What `lists` gave."""
        return cls(**{name: np.array(values) for name, values in lists.items()})


def distances(reference: Greedy, model: Model, processed: dict[str, np.ndarray]) -> Distances:
    """Make `model` follow the reference's answers to a batch of prompts, and compare."""
    logits = forced_logits(model, processed, reference.tokens)
    valid = reference.valid
    count = valid.sum(axis=1)

    def mean(values: np.ndarray) -> np.ndarray:
        return np.where(valid, values, 0).sum(axis=1) / count

    return Distances(
        mean(kl_divergence(reference.logits, logits)),
        mean(logits.argmax(axis=-1) == reference.tokens),
        mean(_loss(logits, reference.tokens)),
        mean(_loss(reference.logits, reference.tokens)),
        count,
    )


def write_greedy(answers: Greedy, file: Path) -> None:
    """Keep answers as safetensors; of the logits, those of valid steps only."""
    from safetensors.numpy import save_file

    arrays = {"tokens": answers.tokens, "valid": answers.valid, "logits": answers.logits[answers.valid]}
    save_file({name: np.ascontiguousarray(value) for name, value in arrays.items()}, file)


def read_greedy(file: Path) -> Greedy:
    """What `write_greedy` kept; logits of steps after a row's end are zero."""
    from safetensors.numpy import load_file

    arrays = load_file(file)
    logits = np.zeros((*arrays["valid"].shape, arrays["logits"].shape[-1]), np.float32)
    logits[arrays["valid"]] = arrays["logits"]
    return Greedy(arrays["tokens"], logits, arrays["valid"])


def _loss(logits: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    shifted = logits.astype(np.float64) - logits.max(axis=-1, keepdims=True)
    chosen = np.take_along_axis(shifted, tokens[..., None], axis=-1)[..., 0]
    return np.log(np.exp(shifted).sum(axis=-1)) - chosen
