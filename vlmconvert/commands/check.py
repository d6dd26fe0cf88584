"""`vlmconvert check`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from vlmconvert.commands import at_least, check_new_file, device_options, parse_ov_config

__all__ = ["check"]


@click.command(
    help="""Compare an artifact with a baseline on the same samples; exit code 1 if a limit is broken.

    Where both sides have been evaluated on the same data, their evaluations are compared; else both answer now. A drop is
    tested for chance: McNemar's exact test or, for graded scores, a paired bootstrap. A manifest.json alone has one figure,
    which is compared unpaired.

    \b
    Examples:
      vlmconvert check llama-int4 --baseline llama-int4-released
      vlmconvert check llama-int4 --baseline released/manifest.json --max-drop 0.5 --max-size-ratio 1.02
      vlmconvert check llama-int4 --baseline llama-fp16 --max-kl 0.05 --max-latency-ratio 0.7 --junit check.xml
    """
)
@click.argument("folder", type=click.Path(path_type=Path))
@click.option(
    "--baseline", type=click.Path(path_type=Path), required=True, help="Another artifact, or its manifest.json."
)
@click.option("--data", help="Samples, as in evaluate.  [default: what both were evaluated on, or scenes]")
@click.option("--samples", default=200, show_default=True, help="Samples, where both sides answer now.")
@click.option("--max-drop", default=1.0, show_default=True, help="Greatest loss of a score, in percentage points.")
@click.option("--max-kl", type=float, help="Greatest mean KL divergence from the baseline, in nats.")
@click.option("--max-block-error", type=float, help="Greatest relative error of a block beside the baseline's block.")
@click.option("--max-size-ratio", type=float, help="Greatest size, as a multiple of the baseline's.")
@click.option("--max-latency-ratio", type=float, help="Greatest time for a token, as a multiple of the baseline's.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write all figures to this file.")
@click.option("--junit", "junit_file", type=click.Path(path_type=Path), help="Write JUnit XML to this file.")
@device_options
def check(folder: Path, baseline: Path, json_file: Path | None, junit_file: Path | None, **values: Any) -> None:
    """See the help."""
    from manifests.files import write_atomically
    from vlmconvert.check import CheckRequest, check_table
    from vlmconvert.check import check as compare
    from vlmconvert.console import Reporter
    from vlmconvert.junit import junit_xml

    at_least("samples", values["samples"], 1)
    for option, path in (("json", json_file), ("junit", junit_file)):
        check_new_file(option, path)
    reporter = Reporter()
    ov_config = parse_ov_config(values.pop("ov_config"))
    report = compare(CheckRequest(folder, baseline, ov_config=ov_config, **values), reporter)
    if json_file is not None:
        write_atomically(json_file, report.model_dump_json(indent=2) + "\n")
    if junit_file is not None:
        write_atomically(junit_file, junit_xml(report, "vlmconvert check"))
    reporter.table(check_table(report))
    reporter.say(f"data: {report.data}")
    for item in report.checks:
        if not item.passed:
            reporter.say(f"check failed: {item.name} is {item.value:.4g} {item.unit}, the limit is {item.limit:g}")
    if report.worst_block is not None:
        reporter.say(f"worst block: {report.worst_block}")
    if not report.passed:
        sys.exit(1)
