"""MindIE's throughput protocol: batches of 1 to 10, 256 new tokens, no early end, one line a batch."""

from __future__ import annotations

import csv
import io
import tempfile
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
from passes.checkpoint import read_config
from vlmconvert.bench import bench_pictures, bench_prompts
from vlmconvert.console import Reporter
from vlmconvert.endpoint import Answer, Endpoint
from vlmconvert.measured import MeasuredProcess, Repeat, Side

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


@dataclass(frozen=True)
class ProtocolRequest:
    """What to measure.

    Attributes:
        folder: the artifact; of one behind a server, its processor counts the tokens of the prompt.
        endpoint: the server's address; None measures on this machine.
        batches: prompts at once, one line each.
        new_tokens: tokens of every answer.
        warmup: measurements of each batch before the one that counts.
        device: device name of the artifact's runtime.
        ov_config: options of that runtime.
        cache_dir: where OpenVINO keeps compiled models.
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
    """Measure an artifact by the protocol: one drawn image and one fixed question a prompt.

    No image is shown twice, so that no runtime can reuse what it has computed.

    Args:
        request: what to measure.
        reporter: shows progress.
        keep: called with all rows so far after each of them.

    Raises:
        BadInputError: if the folder is no artifact, or the server does not answer.
        ConversionError: if it cannot run, or the server refuses.
    """
    manifest = read_manifest(request.folder)
    with ExitStack() as stack:
        if request.endpoint is not None:
            prompt, _other = bench_prompts(request.folder, manifest.family, 1, 1)
            counts = _token_counts(request.folder, prompt)
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            endpoint = Endpoint(request.endpoint, Endpoint(request.endpoint).served_model())
            numbers = count()

            def images(batch: int) -> Iterator[Path]:
                for number in islice(numbers, batch):
                    (picture,) = bench_pictures(request.folder, manifest.family, [number])
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
                prompts = bench_prompts(request.folder, manifest.family, batch, 1)
                process.take(prompts)
                repeats = [process.measure(request.new_tokens) for _ in range(request.warmup + 1)]
                return local_row(repeats[-1], batch, *_token_counts(request.folder, prompts[1]), request.new_tokens)

        with reporter.stage("measuring", len(request.batches)) as step:
            return run_protocol(measure, request.batches, step, keep)


def protocol_table(rows: Iterable[ProtocolRow], title: str) -> Table:
    """The rows as a person reads them."""
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
    """Measure every batch size in order."""
    rows: list[ProtocolRow] = []
    for batch in batches:
        rows.append(measure(batch))
        keep(rows)
        step(f"batch {batch}")
    return rows


def protocol_csv(rows: Iterable[ProtocolRow]) -> str:
    """The rows as MindIE's script writes them."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(_COLUMNS)
    for row in rows:
        writer.writerow(_cells(row))
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
    endpoint: Endpoint, prompt: str, images: Sequence[Path], input_tokens: int, new_tokens: int = NEW_TOKENS
) -> ProtocolRow:
    """Ask a server about all images at once, each to be answered with exactly `new_tokens` tokens.

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


def _cells(row: ProtocolRow) -> list[str]:
    """A row's values in the order of the columns."""
    counts = (row.batch, row.input_tokens, row.output_tokens, row.embedding_tokens)
    times = (row.first_token_ms, row.later_token_ms, row.response_ms, row.tokens_per_s)
    return [*map(str, counts), *(f"{value:.3f}" for value in times)]


def _token_counts(folder: Path, prompt: Mapping[str, np.ndarray]) -> tuple[int, int]:
    """Tokens of a prompt's text, and with its image."""
    tokens = prompt["input_ids"][0]
    return int((tokens != read_config(folder)["image_token_index"]).sum()), len(tokens)
