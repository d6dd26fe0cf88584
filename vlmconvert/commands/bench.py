"""`vlmconvert bench`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from vlmconvert.commands import at_least, check_new_file, device_options, parse_counts, parse_ov_config, refuse_options

__all__ = ["bench"]

# Options that --protocol mindie does not have, because the protocol fixes them.
_PLAIN = ("images", "repeats", "baseline", "dtype", "json_file")


@click.command(
    help="""Measure how fast an artifact answers: vision encoder, first token, each further token, memory.

    Every prompt has drawn images that fill every tile, and one fixed question; every answer has exactly --new-tokens tokens.
    The tables show the median, the lowest and the highest repeat. Artifact and baseline run in separate processes and take
    turns, one repeat each.

    With --protocol mindie, each batch size from 1 to 10 is measured once, and the results have the format of MindIE's own
    script. With --endpoint, a server such as vllm-ascend runs the artifact.

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
@click.option("--batch", help="Batch sizes, separated by commas.  [default: 1, or 1 to 10 with --protocol mindie]")
@click.option("--new-tokens", default=256, show_default=True, help="Number of tokens of every answer.")
@click.option("--images", default=1, show_default=True, help="Number of images in every prompt; 0 for text alone.")
@click.option("--repeats", default=5, show_default=True, help="Number of measurements that count.")
@click.option("--warmup", default=1, show_default=True, help="Number of measurements before those that count.")
@click.option(
    "--baseline",
    type=click.Path(path_type=Path),
    help="Another artifact, or the folder of a checkpoint, which is run with PyTorch.",
)
@click.option(
    "--dtype",
    type=click.Choice(("bf16", "f32")),
    default="bf16",
    show_default=True,
    help="Data type in which a PyTorch baseline computes.",
)
@click.option("--csv", "csv_file", type=click.Path(path_type=Path), help="Also write the results to this CSV file.")
@click.option(
    "--json",
    "json_file",
    type=click.Path(path_type=Path),
    help="File for the full record.  [default: FOLDER/bench.json]",
)
@click.option(
    "--protocol", type=click.Choice(("mindie",)), help="Measure in the same way as a runtime's own benchmark."
)
@click.option("--endpoint", help="With --protocol: address of an OpenAI-compatible server that runs the artifact.")
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
            raise BadInputError("--endpoint needs --protocol mindie: add that option")
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
    from vlmconvert.measuring.mindie import ProtocolRequest, ProtocolRow, bench_protocol, protocol_csv, protocol_table

    reporter = Reporter()

    def keep(rows: list[ProtocolRow]) -> None:
        if csv_file is not None:
            write_atomically(csv_file, protocol_csv(rows))

    rows = bench_protocol(ProtocolRequest(folder, **values), reporter, keep)
    reporter.table(protocol_table(rows, f"{folder.resolve().name}, measured by MindIE's protocol"))
    if csv_file is not None:
        reporter.say(str(csv_file))


def _bench(
    folder: Path, batches: tuple[int, ...], csv_file: Path | None, json_file: Path | None, **values: Any
) -> None:
    import os

    from manifests.bench import BENCH_NAME
    from manifests.errors import BadInputError
    from manifests.files import write_atomically
    from vlmconvert.console import Reporter
    from vlmconvert.measuring.bench import BenchRequest, bench_csv, bench_notes, bench_table
    from vlmconvert.measuring.bench import bench as measure

    if json_file is None and folder.is_dir() and not os.access(folder, os.W_OK):
        raise BadInputError(f"{folder} is not writable: give a file for the record with --json")
    reporter = Reporter()
    result = measure(BenchRequest(folder, batches, **values), reporter)
    write_atomically(json_file or folder / BENCH_NAME, result.model_dump_json(indent=2) + "\n")
    if csv_file is not None:
        write_atomically(csv_file, bench_csv(result))
    reporter.table(bench_table(result))
    for line in bench_notes(result):
        reporter.say(line)
    reporter.say(str(json_file or folder / BENCH_NAME))
