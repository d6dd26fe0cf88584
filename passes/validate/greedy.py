"""Greedy decoding and teacher forcing, for checkpoint and artifact alike."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from passes.validate.model import Model

__all__ = ["Greedy", "forced_logits", "greedy"]


@dataclass(frozen=True)
class Greedy:
    """Greedy answers of a batch.

    Attributes:
        tokens: [batch, steps], the chosen tokens.
        logits: [batch, steps, vocabulary], float32; each token was chosen by these.
        valid: [batch, steps], false for steps after the end of a row's answer.
    """

    tokens: np.ndarray
    logits: np.ndarray
    valid: np.ndarray


def greedy(model: Model, processed: dict[str, np.ndarray], ends: list[int], steps: int) -> Greedy:
    """Decode greedily until every row has chosen one of the tokens `ends`, at most for `steps` tokens."""
    logits = model.prefill(processed)[:, -1]
    ended = np.zeros(logits.shape[0], bool)
    tokens, all_logits, valid = [], [], []
    for step in range(steps):
        chosen = logits.argmax(axis=-1)
        tokens.append(chosen)
        all_logits.append(logits)
        valid.append(~ended)
        ended = ended | np.isin(chosen, ends)
        if ended.all() or step == steps - 1:
            break
        logits = model.step(chosen)[:, -1]
    return Greedy(np.stack(tokens, 1), np.stack(all_logits, 1), np.stack(valid, 1))


def forced_logits(
    model: Model, processed: dict[str, np.ndarray], tokens: np.ndarray, handed: dict[str, np.ndarray] | None = None
) -> np.ndarray:
    """Logits [batch, steps, vocabulary] of a model that is fed with `tokens` [batch, steps] (teacher forcing).

    Args:
        model: the model.
        processed: the prompts, as outputs of the processor.
        tokens: the answers to follow.
        handed: outputs of the vision side to use instead of the model's own; see `Model.handed`.
    """
    logits = [model.prefill(processed, handed)[:, -1]]
    logits += [model.step(tokens[:, step])[:, -1] for step in range(tokens.shape[1] - 1)]
    return np.stack(logits, 1)
