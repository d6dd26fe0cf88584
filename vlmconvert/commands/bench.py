"""`vlmconvert bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from vlmconvert.commands import at_least, check_new_file, device_options, parse_counts, parse_ov_config

__all__ = ["bench"]


@click.command(
    help="""Measure how fast an artifact answers: vision encoder, first token, each further token, memory.

    Drawn images that fill every tile and one fixed question; each answer has exactly --new-tokens tokens. The median, the
    lowest and the highest repeat are shown. Each side has a process of its own, and the sides take turns, one repeat each.

    \b
    Examples:
      vlmconvert bench llama-int4
      vlmconvert bench llama-int4 --batch 1,2,4 --new-tokens 64 --csv bench.csv
      vlmconvert bench llama-int4 --baseline ./checkpoint --dtype bf16
      vlmconvert bench llama-int4 --baseline llama-fp16 --ov-config INFERENCE_PRECISION_HINT=bf16
    """
)
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--batch", default="1", show_default=True, help="Prompts at once, separated by commas.")
@click.option("--new-tokens", default=256, show_default=True, help="Tokens of every answer.")
@click.option("--images", default=1, show_default=True, help="Images of every prompt; 0 for text alone.")
@click.option("--repeats", default=5, show_default=True, help="Measurements that count.")
@click.option("--warmup", default=1, show_default=True, help="Measurements before them.")
@click.option(
    "--baseline",
    type=click.Path(path_type=Path),
    help="Another artifact, or the folder of a checkpoint, which PyTorch runs.",
)
@click.option(
    "--dtype",
    type=click.Choice(("bf16", "f32")),
    default="bf16",
    show_default=True,
    help="What a PyTorch baseline computes in.",
)
@click.option("--csv", "csv_file", type=click.Path(path_type=Path), help="Write the rows to this file too.")
@click.option(
    "--json", "json_file", type=click.Path(path_type=Path), help="Where the record goes.  [default: FOLDER/bench.json]"
)
@device_options
def bench(folder: Path, csv_file: Path | None, json_file: Path | None, **values: Any) -> None:
    """See the help."""
    from manifests.bench import BENCH_NAME
    from manifests.files import write_atomically
    from vlmconvert.bench import BenchRequest, bench_csv, bench_notes, bench_table
    from vlmconvert.bench import bench as measure
    from vlmconvert.console import Reporter

    for name, least in (("new_tokens", 2), ("images", 0), ("repeats", 1), ("warmup", 0)):
        at_least(name, values[name], least)
    batches = parse_counts("batch", values.pop("batch"))
    ov_config = parse_ov_config(values.pop("ov_config"))
    for option, path in (("csv", csv_file), ("json", json_file)):
        check_new_file(option, path)
    reporter = Reporter()
    result = measure(BenchRequest(folder, batches, ov_config=ov_config, **values), reporter)
    write_atomically(json_file or folder / BENCH_NAME, result.model_dump_json(indent=2) + "\n")
    if csv_file is not None:
        write_atomically(csv_file, bench_csv(result))
    reporter.table(bench_table(result))
    for line in bench_notes(result):
        reporter.say(line)
    reporter.say(str(json_file or folder / BENCH_NAME))
