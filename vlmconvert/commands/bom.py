"""`vlmconvert bom`."""

from __future__ import annotations

from pathlib import Path

import click

from vlmconvert.commands import check_new_file

__all__ = ["bom"]


@click.command(
    help="""Describe an artifact as a bill of materials: a CycloneDX 1.6 ML-BOM in JSON.

    It lists the files with their hashes, the checkpoint, the calibration samples, the compression, the measured figures, and
    the libraries that did the work. Equal artifacts have equal BOMs. It needs cyclonedx-python-lib:
    pip install "vlmconvert[bom]"

    \b
    Examples:
      vlmconvert bom mllama-openvino-int4-gptq-int8-ptq
      vlmconvert bom mllama-openvino-int4-gptq-int8-ptq -o bom.cdx.json
    """
)
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), help="File to write.  [default: standard output]")
def bom(folder: Path, output: Path | None) -> None:
    """See the help."""
    import vlmconvert
    from manifests.files import write_atomically

    check_new_file("output", output)
    text = vlmconvert.bom(folder)
    if output is None:
        click.echo(text, nl=False)
    else:
        write_atomically(output, text)
