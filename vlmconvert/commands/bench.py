"""`vlmconvert bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from vlmconvert.commands import at_least, check_new_file, device_options, parse_counts, parse_ov_config, refuse_options

__all__ = ["bench"]

# What a protocol fixes.
_PLAIN = ("images", "repeats", "baseline", "dtype", "json_file")


@click.command(
    help="""Measure how fast an artifact answers: vision encoder, first token, each further token, memory.

    Drawn images that fill every tile and one fixed question; each answer has exactly --new-tokens tokens. The median, the
    lowest and the highest repeat are shown. Each side has a process of its own, and the sides take turns, one repeat each.

    With --protocol mindie, batches of 1 to 10 are measured once each and written as MindIE's own script writes them; with
    --endpoint, the artifact is the one that a server such as vllm-ascend runs.

    \b
    Examples:
      vlmconvert bench llama-int4
      vlmconvert bench llama-int4 --batch 1,2,4 --new-tokens 64 --csv bench.csv
      vlmconvert bench llama-int4 --baseline ./checkpoint --dtype bf16
      vlmconvert bench llama-int4 --baseline llama-fp16 --ov-config INFERENCE_PRECISION_HINT=bf16
      vlmconvert bench llava-w8a16 --protocol mindie --endpoint http://localhost:8000/v1 --csv mindie.csv
    """
)
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--batch", help="Prompts at once, separated by commas.  [default: 1, or 1 to 10 with --protocol mindie]")
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
@click.option("--protocol", type=click.Choice(("mindie",)), help="Measure as a runtime's own benchmark does.")
@click.option("--endpoint", help="With a protocol: address of an OpenAI-compatible server that runs the artifact.")
@device_options
def bench(
    folder: Path,
    batch: str | None,
    csv_file: Path | None,
    json_file: Path | None,
    protocol: str | None,
    endpoint: str | None,
    **values: Any,
) -> None:
    """See the help."""
    from manifests.errors import BadInputError

    for name, least in (("new_tokens", 2), ("images", 0), ("repeats", 1), ("warmup", 0)):
        at_least(name, values[name], least)
    values["ov_config"] = parse_ov_config(values["ov_config"])
    for option, path in (("csv", csv_file), ("json", json_file)):
        check_new_file(option, path)
    if protocol is None:
        if endpoint is not None:
            raise BadInputError("--endpoint goes with --protocol mindie: add that")
        _bench(folder, parse_counts("batch", batch or "1"), csv_file, json_file, **values)
        return
    refuse_options(_PLAIN, "--protocol mindie")
    if endpoint is not None:
        refuse_options(("device", "ov_config", "cache_dir"), "--endpoint")
    batches = {"batches": parse_counts("batch", batch)} if batch else {}
    rest = {name: value for name, value in values.items() if name not in _PLAIN}
    _bench_protocol(folder, csv_file, endpoint=endpoint, **batches, **rest)


def _bench_protocol(folder: Path, csv_file: Path | None, **values: Any) -> None:
    from manifests.files import write_atomically
    from vlmconvert.console import Reporter
    from vlmconvert.protocol import ProtocolRequest, ProtocolRow, bench_protocol, protocol_csv, protocol_table

    reporter = Reporter()

    def keep(rows: list[ProtocolRow]) -> None:
        if csv_file is not None:
            write_atomically(csv_file, protocol_csv(rows))

    rows = bench_protocol(ProtocolRequest(folder, **values), reporter, keep)
    reporter.table(protocol_table(rows, f"{folder.resolve().name}, MindIE's protocol"))
    if csv_file is not None:
        reporter.say(str(csv_file))


def _bench(
    folder: Path, batches: tuple[int, ...], csv_file: Path | None, json_file: Path | None, **values: Any
) -> None:
    from manifests.bench import BENCH_NAME
    from manifests.files import write_atomically
    from vlmconvert.bench import BenchRequest, bench_csv, bench_notes, bench_table
    from vlmconvert.bench import bench as measure
    from vlmconvert.console import Reporter

    reporter = Reporter()
    result = measure(BenchRequest(folder, batches, **values), reporter)
    write_atomically(json_file or folder / BENCH_NAME, result.model_dump_json(indent=2) + "\n")
    if csv_file is not None:
        write_atomically(csv_file, bench_csv(result))
    reporter.table(bench_table(result))
    for line in bench_notes(result):
        reporter.say(line)
    reporter.say(str(json_file or folder / BENCH_NAME))
