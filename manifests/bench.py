"""What a benchmark leaves beside an artifact: `bench.json`."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from manifests.errors import BadInputError
from manifests.files import write_atomically

__all__ = ["BENCH_NAME", "Bench", "BenchRow", "Spread", "read_bench", "write_bench"]

BENCH_NAME = "bench.json"


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Spread(_Record):
    """One figure over the repeats of a measurement: its median, its lowest and its highest value."""

    median: float
    low: float
    high: float


class BenchRow(_Record):
    """One way of asking: so many questions at once, each with so many images, answered with so many tokens."""

    label: str
    batch: int = Field(ge=1)
    images: int = Field(ge=0)
    new_tokens: int = Field(ge=1)
    vision_ms: Spread = Field(description="vision encoder, for the whole batch; 0 without images")
    first_token_ms: Spread = Field(description="from the question to the first token, vision encoder included")
    per_token_ms: Spread = Field(description="each token after the first, for the whole batch")
    tokens_per_s: Spread = Field(description="new tokens of all rows per second, from the question to the last token")


class Bench(_Record):
    """`bench.json`: how fast an artifact answers on one machine, and perhaps a baseline measured beside it."""

    schema_version: Literal["1.0"] = "1.0"
    artifact: str
    device: str
    load_s: float = Field(description="reading the graphs, in seconds")
    compile_s: float = Field(description="compiling the graphs for the device, in seconds")
    peak_rss: int = Field(description="most resident memory of the artifact's own process, in bytes")
    rows: list[BenchRow]
    baseline_label: str | None = Field(default=None, description="what the artifact was measured beside")
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
        BadInputError: if it is missing or not a benchmark.
    """
    path = folder / BENCH_NAME
    try:
        return Bench.model_validate_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BadInputError(f"{path} is missing: make it with vlmconvert bench") from None
    except (OSError, ValidationError, ValueError) as error:
        raise BadInputError(f"{path} is not a benchmark ({str(error).splitlines()[0]}): measure again") from error
