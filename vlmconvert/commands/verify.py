"""`vlmconvert verify`."""

from __future__ import annotations

import sys
from pathlib import Path

import click

__all__ = ["verify"]


@click.command(
    help="""Check a finished artifact against its manifest, and list every finding.

    The command checks the hash of every file, the weights of every block, the inputs, outputs and state of the graphs, and
    that the artifact runs. An artifact for Ascend has no graphs; it is checked against the rules by which MindIE and vllm-ascend load a
    folder. A folder in that format that another tool has written can be checked too, without a manifest. With --public-key it
    also checks who has signed the artifact, and that no file was added, removed or changed since.

    \b
    Examples:
      vlmconvert verify mllama-openvino-int4-gptq-int8-ptq
      vlmconvert verify mllama-openvino-int4-gptq-int8-ptq --json - | jq .passed
      vlmconvert verify mllama-openvino-int4-gptq-int8-ptq --public-key public.pem

    Exit codes: 0 intact, 1 a check failed, 2 the folder is not an artifact, or not signed.
    """
)
@click.argument("folder", type=click.Path(path_type=Path))
@click.option(
    "--json",
    "json_file",
    metavar="FILE",
    help="Also write the findings to this JSON file; - writes only JSON, to standard output.",
)
@click.option(
    "--run/--no-run",
    "run",
    default=True,
    show_default=True,
    help="Ask the artifact about an image; this takes as much memory as using it.",
)
@click.option("--device", default="CPU", show_default=True, help="OpenVINO device to run the artifact on.")
@click.option(
    "--public-key",
    type=click.Path(path_type=Path),
    help="PEM file of the key with which the artifact must be signed; see vlmconvert sign.",
)
def verify(folder: Path, json_file: str | None, run: bool, device: str, public_key: Path | None) -> None:
    """See the help."""
    import json

    from rich.table import Table

    import vlmconvert
    from manifests.files import write_atomically
    from vlmconvert.console import Reporter

    reporter = Reporter()
    with reporter.stage(f"verifying {folder}"):
        checks = vlmconvert.verify(folder, device=device, run=run, public_key=public_key)
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
