"""`vlmconvert families`: what can be converted, and to which targets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

__all__ = ["families"]


@click.command(
    help="""List the families of models that can be converted, those of installed packages too.

    A family is the model_type in a checkpoint's config.json. Its text models and vision towers are the model_types in text_config and
    vision_config.

    \b
    Examples:
      vlmconvert families --json families.json
    """
)
@click.option(
    "--json",
    "json_file",
    type=click.Path(path_type=Path, dir_okay=False),
    help="Write the list to this file as JSON, beside the table.",
)
def families(json_file: Path | None) -> None:
    """See the help."""
    import json

    from rich.table import Table

    from manifests.files import write_atomically
    from vlmconvert.commands import check_new_file
    from vlmconvert.console import Reporter
    from vlmconvert.families import FAMILIES, load_family
    from vlmconvert.targets import TARGETS, load_target

    check_new_file("json", json_file)
    table = Table()
    for column in ("family", "transformers' class", "text models", "vision towers", "videos", "targets", "demo"):
        table.add_column(column)
    entries: list[dict[str, Any]] = []
    for name in FAMILIES.names:
        family = load_family(name)
        targets = [target for target in TARGETS.names if load_target(target).takes(family)]
        entries.append(
            {
                "family": name,
                "architecture": family.architecture,
                "text_models": list(family.text_models),
                "vision_models": list(family.vision_models),
                "videos": family.takes_videos,
                "targets": targets,
                "demo": family.demo is not None,
            }
        )
        table.add_row(*map(_cell, entries[-1].values()))
    if json_file is not None:
        write_atomically(json_file, json.dumps(entries, indent=2) + "\n")
    Reporter().table(table)


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else ""
    return ", ".join(value) if isinstance(value, list) else str(value)
