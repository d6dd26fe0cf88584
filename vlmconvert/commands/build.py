"""`vlmconvert build`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from vlmconvert.commands import machine_options

if TYPE_CHECKING:
    from vlmconvert.conversion.convert import Converted
    from vlmconvert.recipes.build_file import Variant

__all__ = ["build"]


@click.command(
    help="""Convert a checkpoint into all variants of a build file, and compare them in one table.

    FILE is a TOML file. Its top-level keys are options of `vlmconvert convert`, with underscores in place of hyphens, and are
    the defaults of all variants. A table [variants.NAME] for each variant overrides the defaults, or names a recipe. The
    variants share the store, so a step that several of them need runs once.

    \b
    Example of such a file:
      checkpoint = "./checkpoint"
      vision = "int8-ptq"
      [variants.int4]
      llm = "int4-awq"
      [variants.int8-onnx]
      llm = "int8"
      target = "onnx"

    \b
    Examples:
      vlmconvert build variants.toml -o artifacts
      vlmconvert build variants.toml --only int4 --dry-run

    Exit codes: 0 done, 1 a check failed, 2 bad input, 3 a conversion failed; of several variants, the highest code.
    """
)
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    default=Path(),
    help="Folder in which a folder is written for each variant.  [default: the working directory]",
)
@click.option("--only", multiple=True, metavar="NAME", help="Convert only this variant; may be repeated.")
@click.option("--token", envvar="HF_TOKEN", help="Access token for a gated hub id.")
@click.option(
    "--store",
    type=click.Path(path_type=Path),
    help="Folder where finished steps are kept.  [default: ~/.cache/vlmconvert]",
)
@click.option("--force", is_flag=True, help="Replace different artifacts of vlmconvert at the output.")
@click.option("--dry-run", is_flag=True, help="Stop after the plans.")
def build(
    file: Path,
    output: Path,
    only: tuple[str, ...],
    token: str | None,
    workers: int | None,
    max_memory: str | None,
    cluster: str | None,
    store: Path | None,
    force: bool,
    dry_run: bool,
) -> None:
    """See the help."""
    import inspect
    import traceback

    import vlmconvert
    from manifests.errors import BadInputError
    from vlmconvert.console import Reporter
    from vlmconvert.conversion.matrix import build_variants, matrix_table
    from vlmconvert.recipes.build_file import read_build_file

    arguments = inspect.signature(vlmconvert.convert).parameters
    variants = read_build_file(file, {name: parameter.default for name, parameter in arguments.items()})
    names = [variant.name for variant in variants]
    if unknown := [name for name in only if name not in names]:
        raise BadInputError(f"{file} has no variant {unknown[0]}: its variants are {', '.join(names)}")
    chosen = [variant for variant in variants if not only or variant.name in only]
    reporter, silent = Reporter(), Reporter(quiet=True)

    def make(variant: Variant, folder: Path, planning: bool) -> Converted:
        return vlmconvert.convert(
            **variant.arguments,
            output=folder,
            token=token,
            workers=workers,
            max_memory=max_memory,
            cluster=cluster,
            store=store,
            force=force,
            dry_run=planning,
            reporter=silent if planning and not dry_run else reporter,
        )

    outcomes = build_variants(chosen, output, make, reporter.log, dry_run)
    if click.get_current_context().find_root().params["debug"]:
        for outcome in outcomes:
            traceback.print_exception(outcome.error)
    if outcomes:
        reporter.table(matrix_table(outcomes))
    sys.exit(max((outcome.exit_code for outcome in outcomes), default=0))


build.params += machine_options()
