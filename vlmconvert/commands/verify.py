"""`vlmconvert verify`."""

from __future__ import annotations

import sys
from pathlib import Path

import click

__all__ = ["verify"]


@click.command(
    help="""Check a finished artifact against its manifest: every file's hash, the weights of every block, the graphs'
    inputs, outputs and state, and that it runs; for Ascend, instead of graphs, the rules by which MindIE and vllm-ascend load a
    folder, also of one without a manifest that another tool has written. Every finding is listed.

    \b
    Examples:
      vlmconvert verify mllama-openvino-int4-awq-int8-ptq
      vlmconvert verify mllama-openvino-int4-awq-int8-ptq --json - | jq .passed

    Exit codes: 0 intact, 1 something was found, 2 the folder is no artifact.
    """
)
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--json", "json_file", metavar="FILE", help="Write the checks as JSON too; - for standard output alone.")
@click.option(
    "--run/--no-run",
    "run",
    default=True,
    show_default=True,
    help="Ask it about an image; takes the memory of using it.",
)
@click.option("--device", default="CPU", show_default=True, help="OpenVINO device to run it on.")
def verify(folder: Path, json_file: str | None, run: bool, device: str) -> None:
    """See the help."""
    import json

    from rich.table import Table

    from manifests.files import write_atomically
    from vlmconvert.console import Reporter
    from vlmconvert.verify import verify as run_checks

    reporter = Reporter()
    with reporter.stage(f"verifying {folder}"):
        checks = list(run_checks(folder, device, run))
    findings = [check for check in checks if check.outcome == "failed"]
    if json_file is not None:
        content = {"folder": str(folder), "passed": not findings, "checks": [check.model_dump() for check in checks]}
        text = json.dumps(content, indent=2) + "\n"
        if json_file == "-":
            click.echo(text, nl=False)
        else:
            write_atomically(Path(json_file), text)
    if json_file != "-":
        table = Table()
        for column in ("check", "place", "result", ""):
            table.add_column(column, overflow="fold")
        for check in checks:
            table.add_row(check.check, check.place, check.outcome, check.detail)
        reporter.table(table)
        reporter.say(f"{folder}: {len(findings) or 'no'} finding{'' if len(findings) == 1 else 's'}")
    if findings:
        sys.exit(1)
