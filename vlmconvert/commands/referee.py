"""`vlmconvert referee`."""

from __future__ import annotations

from pathlib import Path

import click

from vlmconvert.commands import check_new_file

__all__ = ["referee"]


@click.command(
    help="""Let CLIP judge which of two models describes the same images better.

    A.json and B.json are written by vlmconvert describe with the same settings, for example from the float model and from the
    artifact. The score of a description is the cosine similarity of CLIP's embeddings of image and text; higher is better.

    \b
    Examples:
      vlmconvert referee float.json artifact.json --images coco --clip CLIP-ViT-H-14-laion2B-s32B-b79K
      vlmconvert referee float.json artifact.json --images coco --clip clip-vit-large-patch14 --json referee.json
    """
)
@click.argument("first", metavar="A.json", type=click.Path(path_type=Path))
@click.argument("second", metavar="B.json", type=click.Path(path_type=Path))
@click.option(
    "--images", type=click.Path(path_type=Path), required=True, help="Folder of the images that both files describe."
)
@click.option("--clip", type=click.Path(path_type=Path), required=True, help="Folder with a CLIP model.")
@click.option("--json", "json_file", type=click.Path(path_type=Path), help="Write all scores to this JSON file.")
def referee(first: Path, second: Path, images: Path, clip: Path, json_file: Path | None) -> None:
    """See the help."""
    from rich.table import Table

    from manifests.descriptions import read_descriptions
    from manifests.files import write_atomically
    from passes.validate.referee import open_clip_model
    from passes.validate.referee import referee as judge
    from vlmconvert.console import Reporter

    check_new_file("json", json_file)
    one, other = read_descriptions(first), read_descriptions(second)
    if one.model == other.model:
        # Two models of one name are told apart by their files.
        one = one.model_copy(update={"model": f"{one.model} ({first})"})
        other = other.model_copy(update={"model": f"{other.model} ({second})"})
    reporter = Reporter()
    with reporter.stage("opening the referee"):
        model = open_clip_model(clip)
    with reporter.stage("scoring", len(one.descriptions)) as step:
        report = judge(one, other, images, model, step)
    if json_file is not None:
        write_atomically(json_file, report.model_dump_json(indent=2) + "\n")
    table = Table(title=f"{report.clip} on {report.images} images", title_justify="left")
    table.add_column("model")
    table.add_column("mean similarity", justify="right")
    for name, value in zip(report.models, report.means, strict=True):
        table.add_row(name, f"{value:.4f}")
    reporter.table(table)
    outcome = "equal" if report.winner is None else f"{report.winner} is higher"
    reporter.say(f"{outcome} (p = {report.p_value:.3g}, paired bootstrap)")
