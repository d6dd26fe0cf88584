"""Benchmark: how fast an artifact answers on this machine, alone or compared with a baseline."""

from __future__ import annotations

import csv
import io
import json
import os
import platform
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Literal

import numpy as np
from rich.table import Table

from calibration.scenes import CAPTION_QUESTION, Split, draw_scene
from manifests.bench import Bench, BenchRow, Spread
from manifests.errors import BadInputError
from manifests.io import MANIFEST_NAME, read_manifest
from passes.checkpoint import read_config
from passes.store import library_versions
from vlmconvert.console import Reporter, format_size
from vlmconvert.families import load_family
from vlmconvert.measuring.process import MeasuredProcess, Repeat, Side, torch_name
from vlmconvert.targets import load_target

if TYPE_CHECKING:
    from PIL import Image

    from vlmconvert.families.base import Family

__all__ = ["BenchRequest", "bench", "bench_csv", "bench_notes", "bench_pictures", "bench_prompts", "bench_table"]

_FIGURES = ("vision_ms", "first_token_ms", "per_token_ms", "tokens_per_s")


@dataclass(frozen=True)
class BenchRequest:
    """One benchmark.

    Attributes:
        folder: the artifact.
        batches: batch sizes; each is measured on its own.
        new_tokens: number of tokens of every answer, 2 or more; end tokens do not end an answer earlier.
        images: number of images in every prompt; 0 for text alone.
        repeats: number of measurements that count.
        warmup: number of measurements before those that count.
        baseline: another artifact, or the folder of a checkpoint, which is run with PyTorch; None measures no baseline.
        device: OpenVINO device name.
        ov_config: OpenVINO compile options.
        cache_dir: folder where OpenVINO keeps compiled models; models that it finds there take less time to compile.
        dtype: data type in which a PyTorch baseline computes.
    """

    folder: Path
    batches: tuple[int, ...] = (1,)
    new_tokens: int = 256
    images: int = 1
    repeats: int = 5
    warmup: int = 1
    baseline: Path | None = None
    device: str = "CPU"
    ov_config: Mapping[str, str] = field(default_factory=dict)
    cache_dir: Path | None = None
    dtype: Literal["bf16", "f32"] = "bf16"


def bench(request: BenchRequest, reporter: Reporter) -> Bench:
    """Measure an artifact and, if the request has one, a baseline.

    Each of them runs in a new process. The two processes take turns, one repeat each, so that a disturbance of the
    machine slows down both; therefore both models are in memory at the same time.

    Raises:
        BadInputError: if the artifact is not an artifact, or the baseline is neither an artifact nor a checkpoint.
        ConversionError: if a model cannot run.
    """
    manifest = read_manifest(request.folder)
    sides = [_side(request, request.folder)]
    if request.baseline is not None:
        sides.append(_side(request, request.baseline))
    family = load_family(manifest.family)
    prompts = {batch: bench_prompts(request.folder, family, batch, request.images) for batch in request.batches}
    with ExitStack() as stack:
        processes = [stack.enter_context(MeasuredProcess(side)) for side in sides]
        opened = []
        for process in processes:
            with reporter.stage(f"opening {process.side.label}"):
                opened.append(process.open())
        repeats: dict[tuple[int, int], list[Repeat]] = {}
        rounds = request.warmup + request.repeats
        with reporter.stage("measuring", len(prompts) * rounds * len(sides)) as step:
            for batch, inputs in prompts.items():
                for process in processes:
                    process.take(inputs)
                for number in range(rounds):
                    for index, process in enumerate(processes):
                        repeat = process.measure(request.new_tokens)
                        if number >= request.warmup:
                            repeats.setdefault((index, batch), []).append(repeat)
                        step(f"batch {batch}")
        peaks = [process.peak_memory() for process in processes]
    environment = _environment(request)
    if request.baseline is not None:
        environment |= {
            "baseline_load_s": f"{opened[1].load_s:.3f}",
            "baseline_compile_s": f"{opened[1].compile_s:.3f}",
            "baseline_peak_rss": str(peaks[1]),
        }
    rows = [
        [_row(request, side.label, batch, repeats[index, batch]) for batch in request.batches]
        for index, side in enumerate(sides)
    ]
    return Bench(
        artifact=manifest.name,
        device=request.device,
        load_s=round(opened[0].load_s, 3),
        compile_s=round(opened[0].compile_s, 3),
        peak_rss=peaks[0],
        rows=rows[0],
        baseline_label=sides[1].label if request.baseline is not None else None,
        baseline_rows=rows[1] if request.baseline is not None else [],
        environment=environment,
    )


def bench_table(result: Bench) -> Table:
    """Table of all batch sizes: the artifact, the baseline, and the ratios of their figures."""
    table = Table(title=f"{result.artifact} on {result.device}", title_justify="left")
    table.add_column("")
    for column in ("batch", "vision ms", "first token ms", "per token ms", "tokens/s"):
        table.add_column(column, justify="right")
    if result.baseline_label is not None:
        for column in ("vision", "first token", "per token", "tokens/s"):
            table.add_column(f"{column} ratio", justify="right")
    for row, other in _pairs(result):
        ratios = [] if other is None else [_ratio(row, other, name) for name in _FIGURES]
        table.add_row(row.label, str(row.batch), *(_shown(getattr(row, name)) for name in _FIGURES), *ratios)
        if other is not None:
            table.add_row(other.label, str(other.batch), *(_shown(getattr(other, name)) for name in _FIGURES))
        table.add_section()
    return table


def bench_notes(result: Bench) -> Iterator[str]:
    """Yield how the benchmark was measured, and the load time, compile time and peak memory of each model."""
    row, environment = result.rows[0], result.environment
    yield f"{row.images} images and {row.new_tokens} new tokens a prompt; median (lowest-highest) of {environment['repeats']}"
    sides = [(row.label, result.load_s, result.compile_s, result.peak_rss)]
    if result.baseline_label is not None:
        load, compiling, peak = (float(environment[f"baseline_{name}"]) for name in ("load_s", "compile_s", "peak_rss"))
        sides.append((result.baseline_label, load, compiling, int(peak)))
    for label, load, compiling, peak in sides:
        yield f"{label}: load {load:.2f} s, compile {compiling:.2f} s, peak memory {format_size(peak)}"


def bench_csv(result: Bench) -> str:
    """The results as CSV: for each model and batch size, the median, lowest and highest value of each figure."""
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    names = [f"{name}{suffix}" for name in _FIGURES for suffix in ("", "_low", "_high")]
    writer.writerow(["side", "label", "batch", "images", "new_tokens", *names])
    for side, rows in (("artifact", result.rows), ("baseline", result.baseline_rows or [])):
        for row in rows:
            spreads: list[Spread] = [getattr(row, name) for name in _FIGURES]
            values = [value for spread in spreads for value in (spread.median, spread.low, spread.high)]
            writer.writerow([side, row.label, row.batch, row.images, row.new_tokens, *values])
    return stream.getvalue()


def _side(request: BenchRequest, folder: Path) -> Side:
    if (folder / MANIFEST_NAME).exists():
        read_manifest(folder)
        label = folder.resolve().name
    elif (folder / "config.json").exists():
        label = torch_name(folder, request.dtype)
    else:
        raise BadInputError(f"{folder} cannot be the baseline: give another artifact, or the folder of a checkpoint")
    return Side(folder, label, request.device, request.ov_config, request.cache_dir, request.dtype)


def bench_prompts(
    folder: Path, family: Family, batch: int, images: int
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Make two batches of prompts that differ only in their images, so that no runtime can reuse encoded images.

    Args:
        folder: the artifact or checkpoint, whose processor is used.
        family: its family.
        batch: number of prompts in each batch.
        images: number of images in each prompt.

    Returns:
        The processor's outputs by name, for both batches.
    """
    processor = family.load_processor(folder)
    text = family.prompt(processor, ((CAPTION_QUESTION, None),), images)

    def prompt(first: int) -> dict[str, np.ndarray]:
        pictures = bench_pictures(folder, family, range(first, first + batch * images))
        rows = [pictures[row * images : (row + 1) * images] for row in range(batch)]
        return family.process(processor, [text] * batch, rows)

    return prompt(0), prompt(batch * images)


def bench_pictures(folder: Path, family: Family, numbers: Iterable[int]) -> list[Image.Image]:
    """Draw scenes, enlarged to the largest size that the model takes, so that they fill all tiles as photos do."""
    from PIL import ImageOps

    size = family.image_sizes(read_config(folder))[-1]
    return [ImageOps.fit(draw_scene(Split.TEST, number).image, size) for number in numbers]


def _row(request: BenchRequest, label: str, batch: int, repeats: list[Repeat]) -> BenchRow:
    def spread(name: str) -> Spread:
        values = [getattr(repeat, name) for repeat in repeats]
        return Spread(median=round(median(values), 3), low=round(min(values), 3), high=round(max(values), 3))

    return BenchRow(
        label=label,
        batch=batch,
        images=request.images,
        new_tokens=request.new_tokens,
        vision_ms=spread("vision_ms"),
        first_token_ms=spread("first_token_ms"),
        per_token_ms=spread("per_token_ms"),
        tokens_per_s=spread("tokens_per_s"),
    )


def _environment(request: BenchRequest) -> dict[str, str]:
    import psutil

    return library_versions(*load_target(read_manifest(request.folder).target).distributions) | {
        "processor": _processor_name(),
        "cores": str(os.cpu_count()),
        "memory": format_size(psutil.virtual_memory().total),
        "system": platform.platform(),
        "ov_config": json.dumps(dict(request.ov_config), sort_keys=True),
        "repeats": str(request.repeats),
        "warmup": str(request.warmup),
        "spread": "median, lowest and highest of the repeats",
        "turns": "one process for each side; the sides take turns, one repeat each",
    }


def _processor_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _pairs(result: Bench) -> Iterator[tuple[BenchRow, BenchRow | None]]:
    others = {row.batch: row for row in result.baseline_rows or []}
    for row in result.rows:
        yield row, others.get(row.batch)


def _shown(spread: Spread) -> str:
    return f"{_short(spread.median)} ({_short(spread.low)}-{_short(spread.high)})"


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _ratio(row: BenchRow, other: BenchRow, name: str) -> str:
    below: float = getattr(other, name).median
    return f"{getattr(row, name).median / below:.2f}" if below else "-"
