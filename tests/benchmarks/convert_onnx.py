"""Convert a random mllama to ONNX our way and with one `torch.onnx.export`; print wall time and peak memory with their ratios.

    python -m tests.benchmarks.convert_onnx
    python -m tests.benchmarks.convert_onnx --ways ours --layers 20,40

Both write float32 weights. Every conversion runs alone in a fresh process tree, with an empty store; see
`tests.benchmarks.measure`.
"""

from __future__ import annotations

import os
import platform
import sys
import tempfile
from pathlib import Path

import click
import psutil

from tests.benchmarks.measure import measure


def whole_model(folder: Path, output: Path) -> None:
    """The peer: the language model in memory, one export, one file with its weights beside it."""
    import torch

    from tests.benchmarks import whole_graph as peer

    model = peer.load(folder)
    whole = peer.WholeLanguageModel(model).eval()
    text = model.config.text_config
    head_dim = text.hidden_size // text.num_attention_heads
    batch, sequence, past, vision = 2, 3, 4, 5
    dynamic = torch.export.Dim.DYNAMIC
    examples = [
        (torch.zeros(batch, sequence, dtype=torch.long), {0: dynamic, 1: dynamic}),
        (torch.ones(batch, past + sequence, dtype=torch.long), {0: dynamic, 1: dynamic}),
        (torch.zeros(batch, sequence, dtype=torch.long), {0: dynamic, 1: dynamic}),
        (torch.zeros(batch, 1, sequence, vision), {0: dynamic, 2: dynamic, 3: dynamic}),
        (torch.ones(batch, 1, sequence, 1), {0: dynamic, 2: dynamic}),
    ]
    for index in range(text.num_hidden_layers):
        length = vision if index in text.cross_attention_layers else past
        shape = (batch, text.num_key_value_heads, length, head_dim)
        examples += [(torch.zeros(shape), {0: dynamic, 2: dynamic})] * 2
    torch.onnx.export(
        whole,
        tuple(example for example, _ in examples),
        output / "language_model.onnx",
        input_names=whole.input_names(),
        dynamic_shapes=(*(axes for _, axes in examples[:5]), tuple(axes for _, axes in examples[5:])),
        dynamo=True,
        external_data=True,
    )


def command(way: str, folder: Path, output: Path) -> list[str]:
    """The command of one way, `whole` or `ours`."""
    if way == "whole":
        module = ["-m", "tests.benchmarks.convert_onnx", "--peer", str(folder), "--output", str(output)]
        return [sys.executable, *module]
    options = [
        "--target",
        "onnx",
        "--llm",
        "fp32",
        "--vision",
        "fp32",
        "--no-validate",
        "--store",
        str(output / "store"),
    ]
    return [sys.executable, "-m", "vlmconvert", "mllama", str(folder), *options, "-o", str(output / "artifact")]


@click.command()
@click.option("--work", type=click.Path(path_type=Path), default=Path("build/benchmarks"), show_default=True)
@click.option("--layers", default="20", show_default=True, help="Depths, separated by commas.")
@click.option("--ways", default="whole,ours", show_default=True)
@click.option("--peer", type=click.Path(path_type=Path), help="Run the peer on this checkpoint, in this process.")
@click.option("--output", type=click.Path(path_type=Path))
def main(work: Path, layers: str, ways: str, peer: Path | None, output: Path | None) -> None:
    """Compare the conversions."""
    if peer is not None and output is not None:
        whole_model(peer, output)
        return
    from tests.benchmarks.random_mllama import write_random_mllama

    memory = psutil.virtual_memory().total / 2**30
    click.echo(f"{platform.machine()}, {os.cpu_count()} cores, {memory:.0f} GiB, ONNX, fp32")
    first = 0.0
    for depth in (int(part) for part in layers.split(",")):
        folder = work / f"mllama-{depth}"
        if not (folder / "model.safetensors.index.json").exists():
            write_random_mllama(folder, layers=depth)
        whole: tuple[float, float] | None = None
        for way in ways.split(","):
            with tempfile.TemporaryDirectory(dir=work) as temporary:
                wall, peak, *_ = measure(command(way, folder, Path(temporary)))
            line = f"{depth} layers  {way:6}  {wall:7.1f} s  {peak / 1e9:6.2f} GB"
            if way == "whole":
                whole = wall, peak
            else:
                if whole is not None:
                    line += f"   wall {wall / whole[0]:.2f} x   peak {peak / whole[1]:.2f} x"
                if first:
                    line += f"   peak {peak / first:.2f} x of the first depth"
                first = first or peak
            click.echo(line)


if __name__ == "__main__":
    main()
