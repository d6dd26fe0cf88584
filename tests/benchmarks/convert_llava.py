"""Convert a random LLaVA our way and with optimum-cli; print wall time, peak memory, size and error with their ratios.

    python -m tests.benchmarks.convert_llava --optimum-cli ../optimum/bin/optimum-cli
    python -m tests.benchmarks.convert_llava --optimum-cli ... --rows fp16,int8 --runs 3

optimum-intel pins an older transformers, so it has an environment of its own:

    python -m venv ../optimum
    ../optimum/bin/pip install torch==2.13.0 "optimum-intel[openvino]==2.2.0"

Every conversion runs alone in a fresh process tree, with an empty store; see `tests.benchmarks.measure`. The error is that
of the logits along the checkpoint's own greedy answers (float32, in torch): the mean KL divergence, and the greatest
difference as a share of the logits' range. Errors of 4-bit and of 8-bit layers add up or cancel by chance, so on one
set of random weights two conversions that are equally good differ in the third digit.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
import tempfile
from pathlib import Path
from statistics import mean, median
from typing import NamedTuple

import click
import numpy as np
import psutil

from tests.benchmarks.measure import measure

PROMPTS, STEPS = 16, 4
# Row -> (options of vlmconvert, options of optimum-cli). Neither side looks at samples: optimum's must come from a hub.
ROWS = {
    "fp16": ("--llm fp16 --vision fp16", "--weight-format fp16"),
    "int8": ("--llm int8 --vision int8", "--weight-format int8"),
    "int4": ("--llm int4 --vision int8", "--weight-format int4 --group-size 64 --ratio 1.0"),
    "int4-awq": (
        "--llm int4-awq --samples 0 --no-scale-estimation --vision int8",
        "--weight-format int4 --group-size 64 --ratio 1.0 --awq",
    ),
}


class Figures(NamedTuple):
    """Of one conversion: seconds, bytes of memory, bytes of the graphs, and the error."""

    wall: float
    peak: float
    size: float
    kl: float
    difference: float


def commands(row: str, checkpoint: Path, output: Path, optimum_cli: Path, workers: int) -> dict[str, list[str]]:
    """The command of each side."""
    ours, theirs = (options.split() for options in ROWS[row])
    run = [sys.executable, "-m", "vlmconvert", "llava", str(checkpoint), *ours, "--no-validate"]
    run += ["--workers", str(workers), "--store", str(output / "store"), "-o", str(output / "ours")]
    export = [str(optimum_cli), "export", "openvino", "-m", str(checkpoint), "--task", "image-text-to-text", *theirs]
    return {"optimum": [*export, str(output / "optimum")], "ours": run}


def size(folder: Path) -> int:
    """Bytes of the model's graphs."""
    return sum(path.stat().st_size for path in folder.glob("openvino_*_model.*"))


def adopt(folder: Path, like: Path) -> Path:
    """Let our runtime open a folder of optimum's: its graphs' tensors get our names besides their own."""
    import openvino as ov

    output = folder.with_name(f"{folder.name}-adopted")
    shutil.copytree(folder, output)
    for name in ("manifest.json", "config.json", "generation_config.json"):
        shutil.copyfile(like / name, output / name)
    for stem, taken, made in (("vision", "pixel_values", "image_features"), ("text", "input_ids", "inputs_embeds")):
        path = output / f"openvino_{stem}_embeddings_model.xml"
        model = ov.Core().read_model(folder / path.name)
        model.inputs[0].get_tensor().add_names({taken})
        model.outputs[0].get_tensor().add_names({made})
        ov.save_model(model, path, compress_to_fp16=False)
    return output


def errors(checkpoint: Path, folders: dict[str, Path]) -> dict[str, tuple[float, float]]:
    """Mean KL and greatest difference of each folder's logits."""
    from calibration.scenes import Split
    from calibration.sources import load_samples
    from passes.validate.comparison import kl_divergence
    from passes.validate.greedy import forced_logits, greedy
    from tests.prompts import prompt_inputs
    from vlmconvert import load_processor
    from vlmconvert.families import load_family
    from vlmconvert.running.open import open_runner

    processor = load_processor(checkpoint)
    samples = load_samples("scenes", PROMPTS, split=Split.TEST).samples
    processed = prompt_inputs(processor, [item.image for item in samples], [item.turns[0][0] for item in samples])
    expected = greedy(load_family("llava").reference(checkpoint), processed, [], STEPS)
    found = {}
    for side, folder in folders.items():
        logits = forced_logits(open_runner(folder), processed, expected.tokens)
        difference = np.abs(logits - expected.logits).max() / np.ptp(expected.logits)
        found[side] = (float(kl_divergence(expected.logits, logits).mean()), float(difference))
    return found


def summary(runs: list[Figures]) -> Figures:
    """Medians of what the machine disturbs, means of the errors."""
    wall, peak, size, kl, difference = zip(*runs, strict=True)
    return Figures(median(wall), median(peak), mean(size), mean(kl), mean(difference))


@click.command()
@click.option("--optimum-cli", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--work", type=click.Path(path_type=Path), default=Path("build/benchmarks"), show_default=True)
@click.option("--rows", default=",".join(ROWS), show_default=True)
@click.option("--layers", default=20, show_default=True)
@click.option("--workers", default=2, show_default=True)
@click.option("--runs", default=1, show_default=True, help="Runs of each side, each on other weights.")
def main(optimum_cli: Path, work: Path, rows: str, layers: int, workers: int, runs: int) -> None:
    """Compare the conversions."""
    from tests.benchmarks.random_llava import write_random_llava

    memory = psutil.virtual_memory().total / 2**30
    click.echo(f"{platform.machine()}, {os.cpu_count()} cores, {memory:.0f} GiB, {layers} layers, {workers} workers")
    os.environ["HF_HUB_OFFLINE"] = "1"
    for row in rows.split(","):
        figures: dict[str, list[Figures]] = {"optimum": [], "ours": []}
        for seed in range(runs):
            checkpoint = work / f"llava-{layers}-{seed}"
            if not (checkpoint / "model.safetensors.index.json").exists():
                write_random_llava(checkpoint, layers=layers, seed=seed)
            with tempfile.TemporaryDirectory(dir=work) as temporary:
                output = Path(temporary)
                measured = {
                    side: measure(command)
                    for side, command in commands(row, checkpoint, output, optimum_cli, workers).items()
                }
                adopted = adopt(output / "optimum", output / "ours")
                found = errors(checkpoint, {"optimum": adopted, "ours": output / "ours"})
                for side in figures:
                    figures[side].append(Figures(*measured[side][:2], size(output / side), *found[side]))
        before, after = (summary(of_side) for of_side in figures.values())
        for side, its in (("optimum", before), ("ours", after)):
            line = f"{row:9} {side:8} {its.wall:7.1f} s {its.peak / 1e9:6.2f} GB {its.size / 1e6:8.1f} MB"
            line += f"   KL {its.kl:.4g}   difference {its.difference:.3g}"
            if side == "ours":
                ratios = (f"{name} {a / b:.3g} x" for name, a, b in zip(Figures._fields, after, before, strict=True))
                line += "   " + "   ".join(ratios)
            click.echo(line)


if __name__ == "__main__":
    main()
