"""`bench.json`: the speed of an artifact as `vlmconvert bench` measured it."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from manifests.files import read_record, write_atomically

__all__ = ["BENCH_NAME", "Bench", "BenchRow", "Spread", "read_bench", "write_bench"]

BENCH_NAME = "bench.json"


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Spread(_Record):
    """Median, lowest and highest value of one figure over the repeats of a measurement."""

    median: float
    low: float
    high: float


class BenchRow(_Record):
    """One workload: the prompts in a batch, the images in each prompt, the tokens of each answer, and the speed."""

    label: str
    batch: int = Field(ge=1)
    images: int = Field(ge=0)
    new_tokens: int = Field(ge=1)
    vision_ms: Spread = Field(description="time of the vision encoder for the whole batch; 0 without images")
    first_token_ms: Spread = Field(description="time from the prompt to the first token, vision encoder included")
    per_token_ms: Spread = Field(description="time of each token after the first, for the whole batch")
    tokens_per_s: Spread = Field(description="new tokens of the batch per second, from the prompt to the last token")


class Bench(_Record):
    """`bench.json`: how fast an artifact answers on one machine, and how fast a baseline does, if one was measured."""

    schema_version: Literal["1.0"] = "1.0"
    artifact: str
    device: str
    load_s: float = Field(description="time to read the graphs, in seconds")
    compile_s: float = Field(description="time to compile the graphs for the device, in seconds")
    peak_rss: int = Field(description="maximum resident memory of the artifact's own process, in bytes")
    rows: list[BenchRow]
    baseline_label: str | None = Field(default=None, description="name of the baseline that was measured too")
    baseline_rows: list[BenchRow] | None = None
    environment: dict[str, str]


def write_bench(bench: Bench, folder: Path) -> Path:
    """Write `bench.json` into an existing folder."""
    path = folder / BENCH_NAME
    write_atomically(path, bench.model_dump_json(indent=2) + "\n")
    return path


def read_bench(folder: Path) -> Bench:
    """Read `bench.json`.

    Raises:
        BadInputError: if the file is missing or not a benchmark.
    """
    return read_record(folder / BENCH_NAME, Bench, "a benchmark", "make it with vlmconvert bench")
