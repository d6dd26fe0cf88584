"""Compare how fast four ways decode: our graphs, the graph traced whole, and PyTorch in bf16 and f32.

    python -m tests.benchmarks.decode                                          the demo
    python -m tests.benchmarks.decode --checkpoint build/benchmarks/mllama-20 --new-tokens 32 --rounds 3

In every round each way runs alone in a fresh process, one after the other; a ratio is the median over the rounds of the
ratio within a round. The two OpenVINO ways have the same vision encoder, precision and compile options.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Literal

import click
import numpy as np

from vlmconvert.bench import bench_prompts
from vlmconvert.convert import demo_checkpoint
from vlmconvert.measured import MeasuredProcess, Side

LEAST_RATIO = 0.98


def convert(checkpoint: Path, output: Path, precision: str) -> None:
    """Our artifact."""
    options = ["--llm", precision, "--vision", precision, "--no-validate", "--store", str(output.parent / "store")]
    command = [sys.executable, "-m", "vlmconvert", "mllama", str(checkpoint), *options, "-o", str(output)]
    subprocess.run(command, check=True, capture_output=True)


def convert_whole(checkpoint: Path, ours: Path, output: Path) -> None:
    """Our artifact with the language model replaced by one traced whole, in a process of its own."""
    shutil.copytree(ours, output)
    command = [sys.executable, "-m", "tests.benchmarks.decode", "--checkpoint", str(checkpoint), "--peer", str(output)]
    subprocess.run(command, check=True, capture_output=True)


def write_whole_language_model(checkpoint: Path, folder: Path) -> None:
    """Replace the language model in `folder`; its precision stays that of the graph that was there."""
    import openvino as ov
    import torch

    from manifests.io import read_manifest
    from passes.export.slice_lm_head import SliceLmHeadPass
    from tests.benchmarks import whole_graph as peer

    language = next(item for item in read_manifest(folder).components if item.name == "language_model")
    half = language.precision == "fp16"
    graph = peer.stateful_language_model(peer.load(checkpoint, torch.bfloat16 if half else torch.float32))
    graph = SliceLmHeadPass().apply(graph)
    ov.save_model(graph, folder / "openvino_language_model.xml", compress_to_fp16=half)


def tokens_per_s(side: Side, prompts: tuple[dict[str, np.ndarray], ...], new_tokens: int, repeats: int) -> float:
    """Tokens after the first per second: the median of `repeats`, after one that does not count."""
    with MeasuredProcess(side) as process:
        process.open()
        process.take(prompts)
        speeds = [1000 / process.measure(new_tokens).per_token_ms for _ in range(repeats + 1)]
    return median(speeds[1:])


@click.command()
@click.option("--checkpoint", type=click.Path(path_type=Path), help="An mllama checkpoint.  [default: the demo]")
@click.option("--precision", type=click.Choice(("fp16", "fp32")), default="fp16", show_default=True)
@click.option("--new-tokens", default=256, show_default=True)
@click.option("--rounds", default=5, show_default=True)
@click.option("--repeats", default=3, show_default=True, help="Answers of each process that count.")
@click.option("--ways", default="ours,whole,torch-bf16,torch-f32", show_default=True)
@click.option("--peer", type=click.Path(path_type=Path), help="Write the whole graph into this artifact, and stop.")
def main(
    checkpoint: Path | None, precision: str, new_tokens: int, rounds: int, repeats: int, ways: str, peer: Path | None
) -> None:
    """Compare the decode speeds."""
    checkpoint = checkpoint or demo_checkpoint("mllama")
    if peer is not None:
        write_whole_language_model(checkpoint, peer)
        return
    with tempfile.TemporaryDirectory() as temporary:
        ours, whole = Path(temporary) / "ours", Path(temporary) / "whole"
        convert(checkpoint, ours, precision)
        convert_whole(checkpoint, ours, whole)
        prompts = bench_prompts(ours, "mllama", batch=1, images=1)

        def side(way: str) -> Side:
            kind, _, dtype = way.partition("-")
            folder = {"ours": ours, "whole": whole, "torch": checkpoint}[kind]
            computed: Literal["bf16", "f32"] = "bf16" if dtype == "bf16" else "f32"
            return Side(folder, way, dtype=computed)

        names = ways.split(",")
        speeds: dict[str, list[float]] = {way: [] for way in names}
        for number in range(rounds):
            # Every other round runs backwards, so that a machine that grows slower favours nobody.
            for way in names if number % 2 == 0 else reversed(names):
                speeds[way].append(tokens_per_s(side(way), prompts, new_tokens, repeats))
                click.echo(f"round {number + 1}  {way:11} {speeds[way][-1]:8.2f} tokens/s", err=True)
    for way in names:
        ratio = median(mine / other for mine, other in zip(speeds[names[0]], speeds[way], strict=True))
        click.echo(f"{way:11} {median(speeds[way]):8.2f} tokens/s   {names[0]} is {ratio:.3f} x")
        if way == "whole" and ratio < LEAST_RATIO:
            raise SystemExit(f"{names[0]} is slower than {LEAST_RATIO} x the whole graph")


if __name__ == "__main__":
    main()
