"""Compare how fast four ways decode: our graphs, the graph traced whole, and PyTorch in bf16 and f32.

    python -m tests.benchmarks.decode                                          the demo
    python -m tests.benchmarks.decode --checkpoint build/benchmarks/mllama-20 --new-tokens 32 --rounds 3

In every round our graphs and each other way run in fresh processes of their own and take turns, answer by answer. A ratio
is the median over the rounds. The two OpenVINO ways have the same vision encoder, precision and compile options; they are
also run in one process, token by token in turn, which other work on the machine disturbs least: that ratio has the limit.
"""

from __future__ import annotations

import math
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import click

from vlmconvert.console import Reporter
from vlmconvert.families import demo_checkpoint, load_family
from vlmconvert.measuring.bench import BenchRequest, bench, bench_prompts
from vlmconvert.measuring.process import MeasuredProcess, Side
from vlmconvert.running.open import open_runner

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
    from tests.benchmarks import whole_graph as peer

    language = next(item for item in read_manifest(folder).components if item.name == "language_model")
    half = language.precision == "fp16"
    # Not bfloat16: its weights would stay so, and ours are float16.
    graph = peer.stateful_language_model(peer.load(checkpoint, torch.float16 if half else torch.float32))
    ov.save_model(peer.slice_lm_head(graph), folder / "openvino_language_model.xml", compress_to_fp16=half)


def ratio_of_processes(ours: Path, whole: Path, new_tokens: int, repeats: int, pairs: int) -> float:
    """Our tokens per second over the whole graph's: medians over fresh processes, each alone, whose order changes."""
    prompts = bench_prompts(ours, load_family("mllama"), batch=1, images=1)
    times: dict[Path, list[float]] = {ours: [], whole: []}
    for number in range(pairs):
        for folder in (ours, whole) if number % 2 else (whole, ours):
            with MeasuredProcess(Side(folder, folder.name)) as process:
                process.open()
                process.take(prompts)
                process.measure(new_tokens)
                times[folder].append(median(process.measure(new_tokens).per_token_ms for _ in range(repeats)))
    return median(times[whole]) / median(times[ours])


def ratio_by_steps(ours: Path, whole: Path, new_tokens: int, repeats: int) -> float:
    """Our tokens per second over the whole graph's, with neither favoured for being opened first, which costs some percent."""
    forth, back = steps_ratio(ours, whole, new_tokens, repeats), steps_ratio(whole, ours, new_tokens, repeats)
    return math.sqrt(forth / back)


def steps_ratio(left: Path, right: Path, new_tokens: int, repeats: int) -> float:
    """Speed of `left` over that of `right`: the median of the ratios of neighbouring steps."""
    prompts = bench_prompts(left, load_family("mllama"), batch=1, images=1)
    first, second = open_runner(left), open_runner(right)
    ratios = []
    for number in range(repeats + 1):
        tokens = [runner.prefill(prompts[0])[:, -1].argmax(axis=-1) for runner in (first, second)]
        for step in range(new_tokens - 1):
            times = [0.0, 0.0]
            # Who goes first changes, because the second finds the caches warm or cold of the other's making.
            for index in (0, 1) if step % 2 == 0 else (1, 0):
                start = time.perf_counter()
                logits = (first, second)[index].step(tokens[index])
                times[index] = time.perf_counter() - start
                tokens[index] = logits[:, -1].argmax(axis=-1)
            if number:
                ratios.append(times[1] / times[0])
    return median(ratios)


@click.command()
@click.option("--checkpoint", type=click.Path(path_type=Path), help="An mllama checkpoint.  [default: the demo]")
@click.option("--precision", type=click.Choice(("fp16", "fp32")), default="fp16", show_default=True)
@click.option("--new-tokens", default=256, show_default=True)
@click.option("--rounds", default=3, show_default=True)
@click.option("--repeats", default=7, show_default=True, help="Answers of each process that count.")
@click.option(
    "--pairs", default=5, show_default=True, help="Fresh processes of ours and of the whole graph, each alone."
)
@click.option("--ways", default="whole,torch-bf16,torch-f32", show_default=True)
@click.option("--peer", type=click.Path(path_type=Path), help="Write the whole graph into this artifact, and stop.")
def main(
    checkpoint: Path | None,
    precision: str,
    new_tokens: int,
    rounds: int,
    repeats: int,
    pairs: int,
    ways: str,
    peer: Path | None,
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
        others = {"whole": (whole, "f32"), "torch-bf16": (checkpoint, "bf16"), "torch-f32": (checkpoint, "f32")}
        reporter = Reporter()
        ratios: dict[str, list[float]] = {way: [] for way in ways.split(",")}
        for number in range(rounds):
            for way in ratios:
                folder, dtype = others[way]
                request = BenchRequest(ours, new_tokens=new_tokens, repeats=repeats, baseline=folder, dtype=dtype)
                result = bench(request, reporter)
                mine, other = result.rows[0].per_token_ms.median, result.baseline_rows[0].per_token_ms.median
                ratios[way].append(other / mine)
                click.echo(f"round {number + 1}  ours {1000 / mine:.1f} tokens/s  {way} {1000 / other:.1f} tokens/s")
        for way, found in ratios.items():
            click.echo(f"ours / {way}: {median(found):.3f}")
        if "whole" in ratios:
            alone = ratio_of_processes(ours, whole, new_tokens, repeats, pairs)
            click.echo(f"ours / whole, {pairs} fresh processes of each alone: {alone:.3f}")
            by_steps = [ratio_by_steps(ours, whole, new_tokens, repeats) for _ in range(rounds)]
            ratio = median(by_steps)
            click.echo(f"ours / whole, token by token: {ratio:.3f} ({min(by_steps):.3f}-{max(by_steps):.3f})")
            if ratio < LEAST_RATIO:
                raise SystemExit(f"ours decodes slower than {LEAST_RATIO} x the whole graph")


if __name__ == "__main__":
    main()
