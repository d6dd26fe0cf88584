"""MindIE's throughput protocol: batches of 1 to 10, 256 new tokens, no early end, one line a batch."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

from manifests.errors import ConversionError
from vlmconvert.endpoint import Answer, Endpoint
from vlmconvert.measured import Repeat

__all__ = ["BATCHES", "NEW_TOKENS", "ProtocolRow", "endpoint_row", "local_row", "protocol_csv", "run_protocol"]

BATCHES = tuple(range(1, 11))
NEW_TOKENS = 256
# As MindIE's own script heads its file.
_COLUMNS = (
    "batch",
    "input_len",
    "output_len",
    "embedding_len",
    "first_token_time(ms)",
    "non_first_token_time(ms)",
    "ResponseTime(ms)",
    "E2E Throughput Average(Tokens/s)",
)


@dataclass(frozen=True)
class ProtocolRow:
    """One batch.

    Attributes:
        batch: prompts at once.
        input_tokens: of the prompt's text.
        output_tokens: of each answer.
        embedding_tokens: of the prompt with its image, as the language model sees it.
        first_token_ms: from the question to the first token.
        later_token_ms: each token after it.
        response_ms: from the question to the last token.
        tokens_per_s: new tokens of all answers per second, end to end.
    """

    batch: int
    input_tokens: int
    output_tokens: int
    embedding_tokens: int
    first_token_ms: float
    later_token_ms: float
    response_ms: float
    tokens_per_s: float


def run_protocol(
    measure: Callable[[int], ProtocolRow],
    batches: Sequence[int] = BATCHES,
    step: Callable[[str], None] = lambda label: None,
) -> list[ProtocolRow]:
    """Measure every batch size in order."""
    rows = []
    for batch in batches:
        rows.append(measure(batch))
        step(f"batch {batch}")
    return rows


def protocol_csv(rows: Iterable[ProtocolRow]) -> str:
    """The rows as MindIE's script writes them."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for row in rows:
        times = (row.first_token_ms, row.later_token_ms, row.response_ms, row.tokens_per_s)
        counts = (row.batch, row.input_tokens, row.output_tokens, row.embedding_tokens)
        writer.writerow([*counts, *(f"{value:.3f}" for value in times)])
    return stream.getvalue()


def local_row(repeat: Repeat, batch: int, input_tokens: int, embedding_tokens: int, new_tokens: int) -> ProtocolRow:
    """What a process on this machine measured, as a row."""
    response = repeat.first_token_ms + (new_tokens - 1) * repeat.per_token_ms
    return ProtocolRow(
        batch=batch,
        input_tokens=input_tokens,
        output_tokens=new_tokens,
        embedding_tokens=embedding_tokens,
        first_token_ms=repeat.first_token_ms,
        later_token_ms=repeat.per_token_ms,
        response_ms=response,
        tokens_per_s=repeat.tokens_per_s,
    )


def endpoint_row(
    endpoint: Endpoint, batch: int, prompt: str, image: Path, input_tokens: int, new_tokens: int = NEW_TOKENS
) -> ProtocolRow:
    """Ask a server `batch` questions at once, each to be answered with exactly `new_tokens` tokens.

    Raises:
        ConversionError: if the server refuses, or ends an answer early.
    """

    def ask(_number: int) -> Answer:
        return endpoint.ask(prompt, image, new_tokens, ignore_eos=True)

    with ThreadPoolExecutor(batch) as threads:
        answers = list(threads.map(ask, range(batch)))
    for answer in answers:
        if answer.new_tokens != new_tokens:
            raise ConversionError(
                f"{endpoint.url} answered with {answer.new_tokens} tokens instead of {new_tokens}: use a server that knows ignore_eos"
            )
    response = max(answer.whole_s for answer in answers)
    return ProtocolRow(
        batch=batch,
        input_tokens=input_tokens,
        output_tokens=new_tokens,
        embedding_tokens=answers[0].prompt_tokens,
        first_token_ms=1000 * mean(answer.first_s for answer in answers),
        later_token_ms=1000 * mean((answer.whole_s - answer.first_s) / max(new_tokens - 1, 1) for answer in answers),
        response_ms=1000 * response,
        tokens_per_s=batch * new_tokens / response,
    )
