"""`vlmconvert recipe`."""

from __future__ import annotations

from pathlib import Path

import click

__all__ = ["recipe"]


@click.command(
    help="""Print the recipe of a finished artifact: the passes of each component, as TOML.

    Converting with this recipe, the same checkpoint and the same library versions gives the same bytes.

    \b
    Examples:
      vlmconvert recipe llama-int4 > recipe.toml
      vlmconvert convert ./checkpoint --recipe recipe.toml -o again
    """
)
@click.argument("folder", type=click.Path(path_type=Path))
def recipe(folder: Path) -> None:
    """See the help."""
    import vlmconvert
    from vlmconvert.recipes.recipe import recipe_of, recipe_text

    manifest = vlmconvert.read_manifest(folder)
    made = recipe_of(manifest)
    click.echo(recipe_text(made, manifest.settings is not None and manifest.settings.calibration is not None), nl=False)
