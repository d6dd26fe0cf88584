"""Convert a random mllama our way and the whole-graph way, and print wall time and peak memory with their ratios.

    python -m tests.benchmarks.convert_mllama                     the int4-awq rows
    python -m tests.benchmarks.convert_mllama --precision fp16    the rows without compression
    python -m tests.benchmarks.convert_mllama --ways ours-2 --layers 20,40

Every conversion runs alone in a fresh process tree, with an empty store. Peak memory is the largest sum of the resident
memory of all processes of the tree, sampled 20 times a second; memory that processes share counts once for each.
"""

from __future__ import annotations

import os
import platform
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import click
import psutil

from tests.benchmarks.measure import measure

SAMPLES, TOKENS = 16, 64


def whole_graph(folder: Path, output: Path, precision: str) -> None:
    """The peer: everything in memory, one trace, one NNCF call, the same samples and settings."""
    import numpy as np
    import openvino as ov
    import torch

    from calibration.sources import load_samples
    from tests.benchmarks import whole_graph as peer
    from tests.prompts import chat_prompt
    from vlmconvert import load_processor
    from vlmconvert.families import load_family

    model = peer.load(folder, torch.bfloat16)
    vision = peer.WholeVisionEncoder(model)
    language = peer.language_model(model)
    ov.save_model(peer.vision_encoder(model), output / "vision.xml")
    if precision == "int4-awq":
        processor = load_processor(folder)
        config = model.config.to_dict()
        names = [port.get_any_name() for port in language.inputs]
        samples: list[dict[str, Any]] = []
        for sample in load_samples("scenes", SAMPLES).samples:
            text = chat_prompt(processor, sample.turns)
            processed = processor(images=[sample.images], text=[text], return_tensors="np", add_special_tokens=False)
            arrays = {name: np.asarray(value) for name, value in processed.items()}
            for name in ("input_ids", "attention_mask", "cross_attention_mask"):
                arrays[name] = arrays[name][:, :TOKENS]
            values = load_family("mllama").inputs(arrays, config)
            pixels = ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")
            with torch.no_grad():
                outputs = vision(*(torch.from_numpy(values[name]) for name in pixels))[1:]
            ports = [f"cross_attn_key_values.{index}.{part}" for index in vision.layers for part in ("key", "value")]
            values |= {name: value.numpy() for name, value in zip(ports, outputs, strict=True)}
            samples.append({name: values[name] for name in names})
        del model, vision
        language = peer.compress_int4_awq(language, samples, lambda sample: sample)
    ov.save_model(language, output / "language.xml")


def command(way: str, folder: Path, output: Path, precision: str) -> list[str]:
    """The command of one way: `whole`, or `ours-N` with N workers."""
    if way == "whole":
        return [
            sys.executable,
            "-m",
            "tests.benchmarks.convert_mllama",
            "--peer",
            str(folder),
            "--output",
            str(output),
            "--precision",
            precision,
        ]
    options = ["--llm", precision, "--vision", "fp16", "--no-validate", "--workers", way.removeprefix("ours-")]
    options += ["--samples", str(SAMPLES), "--sequence-length", str(TOKENS), "--store", str(output / "store")]
    return [sys.executable, "-m", "vlmconvert", "mllama", str(folder), *options, "-o", str(output / "artifact")]


@click.command()
@click.option("--work", type=click.Path(path_type=Path), default=Path("build/benchmarks"), show_default=True)
@click.option("--precision", type=click.Choice(("int4-awq", "int4", "fp16")), default="int4-awq", show_default=True)
@click.option("--layers", default="20", show_default=True, help="Depths, separated by commas.")
@click.option("--ways", default="whole,ours-1,ours-2", show_default=True)
@click.option("--runs", default=1, show_default=True, help="Runs of each way; the median is printed.")
@click.option(
    "--peer", type=click.Path(path_type=Path), help="Run the whole-graph way on this checkpoint, in this process."
)
@click.option("--output", type=click.Path(path_type=Path))
def main(work: Path, precision: str, layers: str, ways: str, runs: int, peer: Path | None, output: Path | None) -> None:
    """Compare the conversions."""
    if peer is not None and output is not None:
        whole_graph(peer, output, precision)
        return
    from tests.benchmarks.random_mllama import write_random_mllama

    memory = psutil.virtual_memory().total / 2**30
    click.echo(
        f"{platform.machine()}, {os.cpu_count()} cores, {memory:.0f} GiB, {precision}, {SAMPLES} samples of {TOKENS} tokens"
    )
    for depth in (int(part) for part in layers.split(",")):
        folder = work / f"mllama-{depth}"
        if not (folder / "model.safetensors.index.json").exists():
            write_random_mllama(folder, layers=depth)
        results: dict[str, tuple[float, float]] = {}
        for way in ways.split(","):
            figures = []
            for _ in range(runs):
                with tempfile.TemporaryDirectory(dir=work) as temporary:
                    figures.append(measure(command(way, folder, Path(temporary), precision)))
            results[way] = (median(made.seconds for made in figures), median(made.memory for made in figures))
            wall, peak = results[way]
            line = f"{depth} layers  {way:8}  {wall:7.1f} s  {peak / 1e9:6.2f} GB"
            if "whole" in results and way != "whole":
                line += f"   wall {wall / results['whole'][0]:.2f} x   peak {peak / results['whole'][1]:.2f} x"
            click.echo(line)


if __name__ == "__main__":
    main()
