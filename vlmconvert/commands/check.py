"""`vlmconvert check`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from manifests.errors import BadInputError
from vlmconvert.commands import at_least, check_new_file, device_options, parse_ov_config

__all__ = ["check"]


class _Samples(click.ParamType[Any]):
    """A number of samples, or `auto`."""

    name = "number|auto"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        if value == "auto":
            return value
        try:
            count = int(value)
        except ValueError:
            raise BadInputError(f"--samples {value} is neither a number nor auto: use 200, for example") from None
        at_least("samples", count, 1)
        return count


@click.command(
    help="""Compare an artifact with a baseline on the same samples; the exit code is 1 if a limit is broken.

    If both were evaluated on the same data, the two evaluations are compared; otherwise both answer the questions now. A drop
    is tested for chance with McNemar's exact test or, for graded scores, with a paired bootstrap. If the baseline is only a
    manifest.json, its one accuracy figure is compared without such a test.

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
@click.option(
    "--data", help="Source of samples, as in evaluate.  [default: the data that both were evaluated on, or scenes]"
)
@click.option(
    "--samples",
    type=_Samples(),
    default=200,
    show_default=True,
    help="Number of samples, if both answer now; auto takes as many as a drop of --max-drop needs to be larger than chance.",
)
@click.option("--max-drop", default=1.0, show_default=True, help="Maximum loss of a score, in percentage points.")
@click.option(
    "--max-kl",
    type=float,
    help="Maximum mean KL divergence from the baseline, in nats.  [default: that of the artifact's precisions]",
)
@click.option(
    "--max-block-error", type=float, help="Maximum relative error of a block, compared with the baseline's block."
)
@click.option("--max-size-ratio", type=float, help="Maximum size, as a multiple of the baseline's size.")
@click.option("--max-latency-ratio", type=float, help="Maximum time for a token, as a multiple of the baseline's time.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write all figures to this JSON file.")
@click.option("--junit", "junit_file", type=click.Path(path_type=Path), help="Write JUnit XML to this file.")
@device_options
def check(folder: Path, baseline: Path, json_file: Path | None, junit_file: Path | None, **values: Any) -> None:
    """See the help."""
    import vlmconvert
    from manifests.files import write_atomically
    from vlmconvert.console import Reporter
    from vlmconvert.judging.check import check_table
    from vlmconvert.judging.junit import junit_xml

    for option, path in (("json", json_file), ("junit", junit_file)):
        check_new_file(option, path)
    reporter = Reporter()
    ov_config = parse_ov_config(values.pop("ov_config"))
    report = vlmconvert.check(folder, baseline, ov_config=ov_config, reporter=reporter, **values)
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
