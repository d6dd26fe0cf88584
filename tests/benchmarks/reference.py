"""Peak memory of the reference: the checkpoint whole in torch, and one block at a time.

    python -m tests.benchmarks.reference --work DIR

Each way answers the same prompts in a fresh process; peak memory is that process's.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from pathlib import Path

import click

PROMPTS, TOKENS = 8, 4


def answer(folder: Path, way: str) -> None:
    """Answer the prompts, and print seconds and peak memory in bytes."""
    from passes.validate.greedy import greedy
    from passes.validate.streamed import StreamedModel, TorchBlocks
    from tests.models import opened_model
    from tests.prompts import prompt_inputs
    from vlmconvert import load_processor
    from vlmconvert.families import load_family
    from vlmconvert.measuring.questions import load_questions

    questions = load_questions("scenes", PROMPTS, 0)[1]
    images = [question.sample.images[0] for question in questions]
    processed = prompt_inputs(load_processor(folder), images, [question.prompt for question in questions])
    if way == "whole":
        start = time.monotonic()
        model = load_family("mllama").reference(folder)
    else:
        opened = opened_model(folder, folder.parent / "store")
        family = opened.family
        start = time.monotonic()
        blocks = TorchBlocks(opened.checkpoint, opened.names, opened.config)
        model = StreamedModel(blocks, opened.config, opened.components, family.inputs, family.next_inputs)
    tokens = greedy(model, processed, [], TOKENS).tokens
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    click.echo(f"{time.monotonic() - start} {peak} {tokens.tolist()}")


@click.command()
@click.option("--work", type=click.Path(path_type=Path), default=Path("build/benchmarks"), show_default=True)
@click.option("--layers", default="20,40", show_default=True, help="Depths, separated by commas.")
@click.option("--way", help="Answer with this way, in this process.")
@click.option("--folder", type=click.Path(path_type=Path))
def main(work: Path, layers: str, way: str | None, folder: Path | None) -> None:
    """Compare the references."""
    if way is not None and folder is not None:
        answer(folder, way)
        return
    from tests.benchmarks.random_mllama import write_random_mllama

    for depth in (int(part) for part in layers.split(",")):
        folder = work / f"mllama-{depth}"
        if not (folder / "model.safetensors.index.json").exists():
            write_random_mllama(folder, layers=depth)
        said = {}
        for name in ("whole", "streamed"):
            command = [sys.executable, "-m", "tests.benchmarks.reference", "--way", name, "--folder", str(folder)]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1]
            seconds, peak, said[name] = output.split(" ", 2)
            click.echo(f"{depth} layers  {name:8}  {float(seconds):6.1f} s  {int(peak) / 1e9:5.2f} GB")
        click.echo("the same tokens" if said["whole"] == said["streamed"] else "other tokens")


if __name__ == "__main__":
    main()
