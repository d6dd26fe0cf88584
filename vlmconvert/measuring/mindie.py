"""MindIE's throughput benchmark: batch sizes from 1 to 10, and answers of exactly 256 tokens."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import count, islice
from pathlib import Path
from statistics import mean

import numpy as np
from rich.table import Table

from calibration.scenes import CAPTION_QUESTION
from manifests.errors import ConversionError
from manifests.io import read_manifest
from manifests.leftovers import scratch_folder
from passes.checkpoint import read_config
from vlmconvert.console import Reporter
from vlmconvert.families import load_family
from vlmconvert.families.base import Family
from vlmconvert.measuring.bench import bench_pictures, bench_prompts
from vlmconvert.measuring.process import MeasuredProcess, Repeat, Side
from vlmconvert.running.endpoint import Answer, Endpoint

__all__ = [
    "BATCHES",
    "NEW_TOKENS",
    "ProtocolRequest",
    "ProtocolRow",
    "bench_protocol",
    "endpoint_row",
    "local_row",
    "protocol_csv",
    "protocol_table",
    "run_protocol",
]

BATCHES = tuple(range(1, 11))
NEW_TOKENS = 256
# The column names of the file that MindIE's own script writes.
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
    """The measurement of one batch size.

    Attributes:
        batch: number of prompts that are answered at once.
        input_tokens: number of tokens of a prompt's text.
        output_tokens: number of tokens of each answer.
        embedding_tokens: number of tokens of a prompt with its image, as the language model gets them.
        first_token_ms: time from the question to the first token.
        later_token_ms: time of each further token.
        response_ms: time from the question to the last token.
        tokens_per_s: tokens of all answers divided by the time from the question to the last token.
    """

    batch: int
    input_tokens: int
    output_tokens: int
    embedding_tokens: int
    first_token_ms: float
    later_token_ms: float
    response_ms: float
    tokens_per_s: float


@dataclass(frozen=True)
class ProtocolRequest:
    """One benchmark by the protocol.

    Attributes:
        folder: the artifact; if a server runs it, only its processor is used here, to count the tokens of a prompt.
        endpoint: address of a server that runs the artifact; None runs it on this machine.
        batches: batch sizes; each gives one row.
        new_tokens: number of tokens of every answer.
        warmup: number of measurements of each batch size before the one that counts.
        device: device name of the artifact's runtime.
        ov_config: options of that runtime.
        cache_dir: folder where OpenVINO keeps compiled models.
    """

    folder: Path
    endpoint: str | None = None
    batches: tuple[int, ...] = BATCHES
    new_tokens: int = NEW_TOKENS
    warmup: int = 1
    device: str = "CPU"
    ov_config: Mapping[str, str] = field(default_factory=dict)
    cache_dir: Path | None = None


def bench_protocol(
    request: ProtocolRequest, reporter: Reporter, keep: Callable[[list[ProtocolRow]], None] = lambda rows: None
) -> list[ProtocolRow]:
    """Measure an artifact by the protocol; every prompt has one drawn image and the same question.

    Every prompt has another image, so that no runtime can reuse earlier results.

    Args:
        request: the artifact, and how it is measured.
        reporter: shows progress.
        keep: called after each row with all rows so far.

    Raises:
        BadInputError: if the folder is not an artifact, or the server does not answer.
        ConversionError: if the artifact cannot run, or the server refuses a question.
    """
    manifest = read_manifest(request.folder)
    family = load_family(manifest.family)
    with ExitStack() as stack:
        if request.endpoint is not None:
            prompt, _other = bench_prompts(request.folder, family, 1, 1)
            counts = _token_counts(request.folder, family, prompt)
            folder = stack.enter_context(scratch_folder())
            endpoint = Endpoint(request.endpoint, Endpoint(request.endpoint).served_model())
            numbers = count()

            def images(batch: int) -> Iterator[Path]:
                for number in islice(numbers, batch):
                    (picture,) = bench_pictures(request.folder, family, [number])
                    picture.save(folder / f"{number}.png")
                    yield folder / f"{number}.png"

            def measure(batch: int) -> ProtocolRow:
                rows = [
                    endpoint_row(endpoint, CAPTION_QUESTION, list(images(batch)), counts[0], request.new_tokens)
                    for _ in range(request.warmup + 1)
                ]
                return rows[-1]
        else:
            side = Side(request.folder, manifest.name, request.device, request.ov_config, request.cache_dir)
            process = stack.enter_context(MeasuredProcess(side))
            with reporter.stage(f"opening {side.label}"):
                process.open()

            def measure(batch: int) -> ProtocolRow:
                prompts = bench_prompts(request.folder, family, batch, 1)
                process.take(prompts)
                repeats = [process.measure(request.new_tokens) for _ in range(request.warmup + 1)]
                return local_row(
                    repeats[-1], batch, *_token_counts(request.folder, family, prompts[1]), request.new_tokens
                )

        with reporter.stage("measuring", len(request.batches)) as step:
            return run_protocol(measure, request.batches, step, keep)


def protocol_table(rows: Iterable[ProtocolRow], title: str) -> Table:
    """The rows as a table for the terminal."""
    table = Table(title=title, title_justify="left")
    for column in _COLUMNS:
        table.add_column(column, justify="right")
    for row in rows:
        table.add_row(*_cells(row))
    return table


def run_protocol(
    measure: Callable[[int], ProtocolRow],
    batches: Sequence[int] = BATCHES,
    step: Callable[[str], None] = lambda label: None,
    keep: Callable[[list[ProtocolRow]], None] = lambda rows: None,
) -> list[ProtocolRow]:
    """Measure every batch size in turn.

    Args:
        measure: measures one batch size.
        batches: the batch sizes.
        step: called with a label after each batch size.
        keep: called after each batch size with all rows so far.
    """
    rows: list[ProtocolRow] = []
    for batch in batches:
        rows.append(measure(batch))
        keep(rows)
        step(f"batch {batch}")
    return rows


def protocol_csv(rows: Iterable[ProtocolRow]) -> str:
    """The rows as CSV, in the format of MindIE's script."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for row in rows:
        writer.writerow(_cells(row))
    return stream.getvalue()


def local_row(repeat: Repeat, batch: int, input_tokens: int, embedding_tokens: int, new_tokens: int) -> ProtocolRow:
    """Make a row from the measurement of a process on this machine."""
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
    endpoint: Endpoint, prompt: str, images: Sequence[Path], input_tokens: int, new_tokens: int = NEW_TOKENS
) -> ProtocolRow:
    """Ask a server about all images at the same time, and make a row from the times of its answers.

    Args:
        endpoint: the server.
        prompt: the question.
        images: files of the images, one for each prompt of the batch.
        input_tokens: number of tokens of a prompt's text.
        new_tokens: number of tokens that each answer must have.

    Raises:
        ConversionError: if the server refuses, or ends an answer early.
    """

    def ask(image: Path) -> Answer:
        return endpoint.ask(prompt, image, new_tokens, ignore_eos=True)

    batch = len(images)
    with ThreadPoolExecutor(batch) as threads:
        answers = list(threads.map(ask, images))
    for answer in answers:
        if answer.new_tokens != new_tokens:
            raise ConversionError(
                f"{endpoint.url} answered with {answer.new_tokens} tokens instead of {new_tokens}: use a server that supports ignore_eos"
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


def _cells(row: ProtocolRow) -> list[str]:
    """The values of a row, in the order of the columns."""
    counts = (row.batch, row.input_tokens, row.output_tokens, row.embedding_tokens)
    times = (row.first_token_ms, row.later_token_ms, row.response_ms, row.tokens_per_s)
    return [*map(str, counts), *(f"{value:.3f}" for value in times)]


def _token_counts(folder: Path, family: Family, prompt: Mapping[str, np.ndarray]) -> tuple[int, int]:
    """Number of tokens of a prompt without and with its image tokens."""
    tokens = prompt["input_ids"][0]
    return int((tokens != family.image_token(read_config(folder))).sum()), len(tokens)
