"""`vlmconvert report`."""

from __future__ import annotations

from pathlib import Path

import click

from vlmconvert.commands import at_least

__all__ = ["report"]


@click.command(
    help="""Write one self-contained HTML page about one artifact or several.

    The page shows from which checkpoint and how each artifact was made, its size and accuracy, the error of every block, the
    latency, and samples on which artifact and checkpoint disagree. It leaves out what was not measured, and loads nothing from
    other hosts.

    \b
    Examples:
      vlmconvert report mllama-openvino-int4-gptq-int8-ptq
      vlmconvert report out-fp16 out-int8 out-int4-awq -o report.html
      vlmconvert report out-int4-awq out-int4-gptq --compare
    """
)
@click.argument("folders", nargs=-1, required=True, metavar="DIR...", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    default=Path("report.html"),
    show_default=True,
    help="File to write.",
)
@click.option(
    "--samples",
    default=24,
    show_default=True,
    help="Maximum number of samples on which artifact and checkpoint disagree.",
)
@click.option("--compare", is_flag=True, help="Also print the table of the artifacts: size, KL, perplexity and time.")
def report(folders: tuple[Path, ...], output: Path, samples: int, compare: bool) -> None:
    """See the help."""
    from manifests.errors import BadInputError
    from manifests.files import write_atomically
    from vlmconvert.console import Reporter, format_size
    from vlmconvert.report.page import render_report
    from vlmconvert.report.variants import comparison_table, read_variants

    at_least("samples", samples, 0)
    if output.is_dir():
        raise BadInputError(f"{output} is a folder: give the name of a file, such as {output / 'report.html'}")
    page = render_report(folders, samples)
    output.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(output, page)
    reporter = Reporter()
    if compare:
        reporter.table(comparison_table(read_variants(folders)))
    reporter.say(f"{output}  ({format_size(output.stat().st_size)})")
