"""Convert a random LLaVA to W8A16 our way and with msmodelslim; print wall time, peak memory and whether the weights are equal.

    python -m tests.benchmarks.convert_ascend --msmodelslim-python ../msmodelslim/bin/python
    python -m tests.benchmarks.convert_ascend --msmodelslim-python ... --runs 3
    python -m tests.benchmarks.convert_ascend --msmodelslim-python ... --layers 2 --hidden 128 --intermediate 256

The interpreter is one that has msmodelslim and transformers, such as that of this project's dev extra.

Every conversion runs alone in a fresh process tree; see `tests.benchmarks.measure`. msmodelslim computes in the dtype that it
loads: in float32 its codes and scales are ours, and in bfloat16 they are rounded. So both are measured, and both are compared
value by value. Our way is measured on twice the layers, too.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import click
import numpy as np
import psutil

from tests.benchmarks.measure import measure

# What msmodelslim's documentation shows, without the vision tower and the projector, which its runtimes want as they are.
PEER = """
import sys
import torch
from msmodelslim.pytorch.llm_ptq.llm_ptq_tools import Calibrator, QuantConfig
from transformers import AutoModelForImageTextToText

source, output, dtype = sys.argv[1:]
model = AutoModelForImageTextToText.from_pretrained(source, dtype=getattr(torch, dtype), local_files_only=True).eval()
language = "model.language_model."
linears = [name for name, part in model.named_modules() if isinstance(part, torch.nn.Linear)]
others = [name for name in linears if not name.startswith(language)]
config = QuantConfig(
    w_bit=8, a_bit=16, disable_names=others, disable_last_linear=False, dev_type="cpu", mm_tensor=False
)
calibrator = Calibrator(model, config, calib_data=[], disable_level="L0")
calibrator.run()
calibrator.save(output, save_type=["ascendV1"])
"""
# Its names are those of transformers' modules.
_ON_HUB = {"model.language_model.": "language_model.model."}


def ours(checkpoint: Path, output: Path) -> list[str]:
    """Our command, with an empty store."""
    run = [sys.executable, "-m", "vlmconvert", "llava", str(checkpoint), "--target", "ascend", "--llm", "w8a16"]
    return [*run, "--no-validate", "--store", f"{output}-store", "-o", str(output)]


def peer(python: Path, checkpoint: Path, output: Path, dtype: str) -> list[str]:
    """msmodelslim's command."""
    return [str(python), "-c", PEER, str(checkpoint), str(output), dtype]


def quantized(folder: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Codes and scales of a folder under on-hub names."""
    from safetensors import safe_open

    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            names = set(file.keys())
            for name in sorted(names):
                if f"{name.removesuffix('weight')}weight_scale" in names or name.endswith("weight_scale"):
                    prefix = next((prefix for prefix in _ON_HUB if name.startswith(prefix)), "")
                    yield _ON_HUB.get(prefix, "") + name.removeprefix(prefix), file.get_tensor(name).float().numpy()


def compare(first: Path, second: Path) -> str:
    """How many tensors are equal, in words."""
    expected = dict(quantized(second))
    found = dict(quantized(first))
    if found.keys() != expected.keys():
        return f"{len(found.keys() ^ expected.keys())} tensors are on one side only"
    different = [name for name, values in found.items() if not np.array_equal(values, expected[name])]
    return f"{len(found) - len(different)} of {len(found)} codes and scales equal" + (
        f", not {different[0]}" if different else ""
    )


@click.command()
@click.option("--msmodelslim-python", type=click.Path(path_type=Path, exists=True), required=True)
@click.option("--work", type=click.Path(path_type=Path), default=Path("build/benchmarks"), show_default=True)
@click.option("--layers", default=20, show_default=True)
@click.option("--hidden", default=2048, show_default=True)
@click.option("--intermediate", default=5632, show_default=True)
@click.option("--runs", default=1, show_default=True, help="Runs of each side; the median is printed.")
@click.option("--depth/--no-depth", default=True, show_default=True, help="Our way on twice the layers, too.")
def main(
    msmodelslim_python: Path,
    work: Path,
    layers: int,
    hidden: int,
    intermediate: int,
    runs: int,
    depth: bool,
) -> None:
    """Compare the conversions."""
    from tests.benchmarks.random_llava import write_random_llava

    memory = psutil.virtual_memory().total / 2**30
    click.echo(f"{platform.machine()}, {os.cpu_count()} cores, {memory:.0f} GiB, {layers} layers")
    os.environ["HF_HUB_OFFLINE"] = "1"

    def checkpoint(count: int) -> Path:
        folder = work / f"llava-{count}-{hidden}-{intermediate}"
        if not (folder / "model.safetensors.index.json").exists():
            write_random_llava(folder, layers=count, hidden=hidden, intermediate=intermediate)
        return folder

    source, deeper = checkpoint(layers), checkpoint(2 * layers) if depth else None
    figures: dict[str, list[tuple[float, float]]] = {}
    equal: dict[str, str] = {}
    for _ in range(runs):
        with tempfile.TemporaryDirectory(dir=work) as temporary:
            output = Path(temporary)
            commands = {
                "msmodelslim bf16": peer(msmodelslim_python, source, output / "bf16", "bfloat16"),
                "msmodelslim f32": peer(msmodelslim_python, source, output / "f32", "float32"),
                "ours": ours(source, output / "ours"),
            }
            if deeper is not None:
                commands["ours, depth x2"] = ours(deeper, output / "deeper")
            for side, command in commands.items():
                figures.setdefault(side, []).append(measure(command))
                if side == "ours, depth x2":
                    shutil.rmtree(output / "deeper")
            equal = {dtype: compare(output / "ours", output / dtype) for dtype in ("f32", "bf16")}
    medians = {
        side: tuple(median(figure[index] for figure in rows) for index in (0, 1)) for side, rows in figures.items()
    }
    for side, (wall, peak) in medians.items():
        line = f"{side:16} {wall:7.1f} s {peak / 1e9:6.2f} GB"
        others = {"ours": ("msmodelslim f32", "msmodelslim bf16"), "ours, depth x2": ("ours",)}.get(side, ())
        for other in others:
            line += f"   wall {wall / medians[other][0]:.2f} x, peak {peak / medians[other][1]:.2f} x of {other}"
        click.echo(line)
    for dtype, found in equal.items():
        click.echo(f"beside msmodelslim {dtype}: {found}")


if __name__ == "__main__":
    main()
