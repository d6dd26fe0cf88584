"""`vlmconvert cache`: looking at the store, and making it smaller."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from passes.store import Store

__all__ = ["cache"]

_STORE = click.option(
    "--store",
    type=click.Path(path_type=Path, file_okay=False),
    help="Folder of the store.  [default: ~/.cache/vlmconvert]",
)


def _opened(folder: Path | None) -> Store:
    from passes.store import Store, default_store

    return Store(folder or default_store())


@click.group(
    help="""Look at the store, in which conversions and evaluations keep finished steps, or make it smaller.

    A conversion removes what has not been used for the longest time when it has finished, if the store is larger than its limit:
    100 GB, or the size in the environment variable VLMCONVERT_STORE_LIMIT.

    \b
    Examples:
      vlmconvert cache size
      vlmconvert cache list
      vlmconvert cache prune --limit 20GB
      vlmconvert cache prune --limit 0
    """
)
def cache() -> None:
    """See the help."""


@cache.command("list", help="List the entries of the store; the one that was used last comes last.")
@_STORE
def list_entries(store: Path | None) -> None:
    """See the help."""
    import time

    from rich.table import Table

    from vlmconvert.console import Reporter, format_size
    from vlmconvert.conversion.disk import entries_text

    opened = _opened(store)
    entries = opened.entries()
    table = Table()
    for column in ("last use", "key", "what"):
        table.add_column(column, overflow="fold")
    table.add_column("size", justify="right")
    for entry in entries:
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.used))
        table.add_row(used, entry.key[:12], entry.what or "-", format_size(entry.size))
    reporter = Reporter()
    reporter.table(table)
    reporter.say(f"{opened.root}: {entries_text(entries)}")


@cache.command(help="Print the number of bytes of all entries.")
@_STORE
def size(store: Path | None) -> None:
    """See the help."""
    click.echo(sum(entry.size for entry in _opened(store).entries()))


@cache.command(help="Remove entries that have not been used for the longest time, and what killed runs have left.")
@_STORE
@click.option(
    "--limit", required=True, help="Size that the store may have afterwards, such as 20GB; 0 removes everything."
)
def prune(store: Path | None, limit: str) -> None:
    """See the help."""
    from manifests.errors import BadInputError
    from vlmconvert.console import Reporter
    from vlmconvert.conversion.disk import entries_text
    from vlmconvert.conversion.lock import alone_in_store
    from vlmconvert.options import parse_size

    most = parse_size("limit", limit)
    opened = _opened(store)
    with alone_in_store(opened) as alone:
        if not alone:
            raise BadInputError(f"another vlmconvert is using {opened.root}: prune it when that one has ended")
        left = opened.remove_leftovers()
        removed = opened.prune(most)
    Reporter().say(f"{opened.root}: removed {entries_text(removed)}" + (f", and {left} unfinished" if left else ""))
