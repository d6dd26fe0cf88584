"""Convert random checkpoints with the real shapes of large models, and print time, memory and disk of every stage.

    python -m tests.benchmarks.real_shapes whole     Llama-3.2-11B-Vision: conversions, verify, run
    python -m tests.benchmarks.real_shapes tower     its vision encoder: int8-ptq beside its float chain
    python -m tests.benchmarks.real_shapes layers    five of its text layers: int4-awq
    python -m tests.benchmarks.real_shapes larger    layers of LLaVA-1.6-34B and Llama-3.2-90B-Vision, and what the whole would take

Every stage runs alone in a fresh process tree. Memory is the largest sum of the resident memory of all processes of the tree;
*own* leaves out pages of files. Disk is the largest amount by which free space shrinks, and includes the artifact and the
store. *Expected* is what the plan says before.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import click
import psutil

from calibration.scenes import Split, draw_scene
from tests.benchmarks.measure import Measured, measure
from tests.benchmarks.random_llava import write_random_llava
from tests.benchmarks.random_mllama import write_random_mllama, write_real_mllama

_WORK = Path("build/benchmarks")
# The text model behind the real vision encoder, where only the vision encoder is measured.
_TEXT = {"hidden": 4096, "intermediate": 14336, "heads": 32, "key_value_heads": 8, "vocabulary": 128256}
_YI_34B = {"hidden": 7168, "intermediate": 20480, "heads": 56, "key_value_heads": 8, "vocabulary": 64064}
_LLAMA_90B = {"hidden": 8192, "intermediate": 28672, "heads": 64, "key_value_heads": 8, "vocabulary": 128256}
_SMALL = {"layers": 5, "hidden": 1024, "intermediate": 2048, "heads": 16, "vocabulary": 32000}


def vlmconvert(command: str, *arguments: object) -> list[str]:
    """A command line of vlmconvert."""
    return [sys.executable, "-m", "vlmconvert", command, *map(str, arguments)]


def checkpoint(name: str, write: Callable[..., None] = write_real_mllama, **shape: int) -> Path:
    """The folder of a random checkpoint, which is written if it does not exist."""
    folder = _WORK / name
    if not (folder / "model.safetensors.index.json").exists():
        click.echo(f"writing {folder} ...", err=True)
        write(folder, **shape)
    return folder


@contextmanager
def places() -> Iterator[list[str]]:
    """Options that put artifact and store into a temporary folder."""
    with tempfile.TemporaryDirectory(dir=_WORK) as temporary:
        yield ["--store", f"{temporary}/store", "-o", f"{temporary}/artifact"]


def show(title: str, measured: Measured, more: str = "") -> None:
    """Print one row."""
    memory = f"{measured.memory / 2**30:6.2f} GiB (own {measured.own / 2**30:5.2f})"
    click.echo(f"{title:44} {measured.seconds:7.1f} s {memory} {measured.disk / 1e9:5.1f} GB disk {more}")


def convert(title: str, folder: Path, *options: object, look: Callable[[Path], None] | None = None) -> Measured:
    """Convert with an empty store, and print a row; `look` is called with the artifact."""
    with places() as where:
        command = vlmconvert("convert", folder, *options, *where)
        plan = subprocess.run([*command, "--dry-run"], check=True, capture_output=True, text=True).stdout
        expected = next(line for line in plan.splitlines() if line.startswith("expected"))
        shutil.rmtree(where[1])
        measured = measure(command, _WORK)
        artifact = Path(where[-1])
        size = sum(path.stat().st_size for path in artifact.iterdir())
        show(title, measured, f"{size / 1e9:.2f} GB artifact; {expected.partition(';')[0]}")
        if look is not None:
            look(artifact)
    return measured


@click.group(help=__doc__)
def main() -> None:
    """Print the machine."""
    _WORK.mkdir(parents=True, exist_ok=True)
    memory = psutil.virtual_memory().total / 2**30
    click.echo(f"{platform.machine()}, {os.cpu_count()} cores, {memory:.0f} GiB")


@main.command()
@click.option("--counts", default="2,4", show_default=True, help="Numbers of samples, separated by commas.")
@click.option("--workers", default="1,2", show_default=True)
def tower(counts: str, workers: str) -> None:
    """The real vision encoder: int8-ptq, and the same samples through the float chain alone."""
    folder = checkpoint("tower", **_SMALL)
    numbers = [int(count) for count in counts.split(",")]
    slopes = {}
    ways = [("float chain", 1, ("--llm", "int4-awq", "--vision", "fp16", "--samples"))]
    ways += [
        ("int8-ptq", int(count), ("--llm", "fp16", "--vision", "int8-ptq", "--vision-samples"))
        for count in workers.split(",")
    ]
    for name, processes, options in ways:
        title = f"{name}, {processes} workers"
        walls = [
            convert(
                f"{title}, {count} samples", folder, *options, count, "--workers", processes, "--no-validate"
            ).seconds
            for count in numbers
        ]
        if len(numbers) > 1:
            slopes[title] = (walls[-1] - walls[0]) / (numbers[-1] - numbers[0])
    first = next(iter(slopes.values()), 0.0)
    for title, slope in slopes.items():
        click.echo(f"{title}: {slope:.1f} s for each sample, {slope / first:.2f} of the float chain")


@main.command()
@click.option("--layers", default=5, show_default=True)
@click.option("--samples", default=16, show_default=True)
@click.option("--workers", default="1,2", show_default=True)
def layers(layers: int, samples: int, workers: str) -> None:
    """Text layers of the 11B behind the demo's vision encoder: int4-awq."""
    folder = checkpoint(f"layers-{layers}", write_random_mllama, layers=layers, **_TEXT)
    for count in workers.split(","):
        options = ("--llm", "int4-awq", "--vision", "fp16", "--samples", samples, "--workers", count, "--no-validate")
        convert(f"{layers} layers, int4-awq, {count} workers", folder, *options)


@main.command()
@click.option("--samples", default=8, show_default=True)
@click.option("--validation-samples", default=1, show_default=True)
@click.option("--workers", default="1,2", show_default=True)
def whole(samples: int, validation_samples: int, workers: str) -> None:
    """The whole 11B: conversions with validation, verify and run, and the other targets."""
    folder = checkpoint("whole")
    # The answers of random weights mean nothing, so nothing is demanded of them.
    validation = ("--validation-samples", validation_samples, "--max-kl", 100, "--max-drop", 100)
    calibration = ("--samples", samples, "--vision-samples", samples)
    for count in workers.split(","):
        options = ("--llm", "int4", "--vision", "int8", "--workers", count, *validation)
        convert(f"int4, int8, {count} workers", folder, *options)
    for count in workers.split(","):
        options = ("--llm", "int4-awq", "--vision", "int8-ptq", *calibration, "--workers", count, *validation)
        convert(f"int4-awq, int8-ptq, {samples} samples, {count} workers", folder, *options, look=_use)
    options = ("--llm", "int4", "--vision", "int8", "--workers", 2, "--no-validate")
    convert("int4, int8 for ONNX, 2 workers", folder, "--target", "onnx", *options)
    ascend = ("--target", "ascend", "--llm", "w8a16", "--workers", 2, *validation)
    convert("w8a16 for Ascend, 2 workers", folder, *ascend)


def _use(artifact: Path) -> None:
    """Verify an artifact without running it, and ask it about an image."""
    show("  verify --no-run", measure(vlmconvert("verify", artifact, "--no-run"), _WORK))
    with tempfile.TemporaryDirectory(dir=_WORK) as temporary:
        image = Path(temporary) / "scene.png"
        draw_scene(Split.TEST, 0).image.save(image)
        question = ("--image", image, "--prompt", "What colour is the circle?", "--max-new-tokens", 8)
        measured = measure(vlmconvert("run", artifact, *question), _WORK)
    size = sum(path.stat().st_size for path in artifact.iterdir())
    show("  run with an image", measured, f"own memory {measured.own / size:.2f} of the artifact")


@main.command()
@click.option("--samples", default=8, show_default=True)
@click.option("--workers", default=2, show_default=True)
def larger(samples: int, workers: int) -> None:
    """One and three text layers of larger models behind a small vision encoder: what each further layer takes, and the whole."""
    options = ("--vision", "fp16", "--samples", samples, "--workers", workers, "--no-validate")
    for name, write, shape, depth in (
        ("LLaVA-1.6-34B", write_random_llava, _YI_34B, 60),
        ("Llama-3.2-90B-Vision", write_random_mllama, _LLAMA_90B, 100),
    ):
        folders = [checkpoint(f"{name}-{count}", write, layers=count, **shape) for count in (1, 3)]
        for precision in ("int4", "int4-awq"):
            few, more = (
                convert(f"{name}, {count} layers, {precision}", folder, "--llm", precision, *options)
                for count, folder in zip((1, 3), folders, strict=True)
            )
            each = (more.seconds - few.seconds) / 2
            click.echo(
                f"{name}, {depth} layers, {precision}, {workers} workers: {each:.1f} s for each layer, about "
                f"{(few.seconds + each * (depth - 1)) / 60:.0f} minutes and {more.memory / 2**30:.1f} GiB in all"
            )
        for folder in folders:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
