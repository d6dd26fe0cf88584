"""Converting all variants of a build file, one after the other, and comparing them in a table."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from manifests.errors import BadInputError, VlmConvertError
from vlmconvert.console import format_size
from vlmconvert.conversion.convert import Converted
from vlmconvert.recipes.build_file import Variant

__all__ = ["Outcome", "build_variants", "matrix_table"]

# Converts a variant into a folder, or only plans it if the last argument is true.
Make = Callable[[Variant, Path, bool], Converted]


@dataclass(frozen=True)
class Outcome:
    """The outcome of one variant: its result, or the error with which it failed."""

    variant: Variant
    result: Converted | None
    error: Exception | None

    @property
    def exit_code(self) -> int:
        """0: done; 1: a check failed; 2: bad input; 3: the conversion failed."""
        if self.error is not None:
            return self.error.exit_code if isinstance(self.error, VlmConvertError) else 3
        return 0 if self.result is not None and self.result.passed else 1


def build_variants(
    variants: Sequence[Variant], folder: Path, make: Make, say: Callable[[str], None], dry_run: bool
) -> list[Outcome]:
    """Plan all variants, and then convert them; if one fails, the others are converted nevertheless.

    Args:
        variants: the variants.
        folder: folder in which a folder is written for each variant.
        make: plans or converts one variant.
        say: shows a line of progress.
        dry_run: whether to stop after the plans.

    Raises:
        BadInputError: if something is wrong with any variant; raised before the first one is converted.
    """
    for variant in variants:
        say(f"{variant.name}: planning")
        try:
            make(variant, folder / variant.name, True)
        except BadInputError as error:
            raise BadInputError(f"variant {variant.name}: {error}") from error
    outcomes = []
    for variant in variants if not dry_run else ():
        say(f"{variant.name}: converting")
        try:
            outcomes.append(Outcome(variant, make(variant, folder / variant.name, False), None))
        except Exception as error:  # of any kind: the other variants are converted nevertheless
            kind = "" if isinstance(error, VlmConvertError) else f"{type(error).__name__}: "
            say(f"{variant.name}: {kind}{error}")
            outcomes.append(Outcome(variant, None, error))
    return outcomes


def matrix_table(outcomes: Sequence[Outcome]) -> Table:
    """Table with a row for each variant: precisions, size, figures and time."""
    table = Table(title="Variants", title_justify="left")
    for column in ("variant", "target", "language model", "vision encoder"):
        table.add_column(column)
    for column in ("size", "KL", "accuracy before", "after", "time"):
        table.add_column(column, justify="right")
    table.add_column("result")
    for outcome in outcomes:
        if outcome.result is None or outcome.result.manifest is None:
            table.add_row(outcome.variant.name, *[""] * 8, "failed")
            continue
        manifest = outcome.result.manifest
        figures = {(item.metric, item.component): item for item in manifest.validation}
        kl, accuracy = figures.get(("kl", "artifact")), figures.get(("exact_match", "artifact"))
        before = accuracy.reference if accuracy else None
        table.add_row(
            outcome.variant.name,
            manifest.target,
            manifest.components[-1].precision,
            manifest.components[0].precision if len(manifest.components) > 1 else "-",
            format_size(sum(file.size for component in manifest.components for file in component.files)),
            f"{kl.value:.2g}" if kl else "-",
            "-" if before is None else f"{before:.1%}",
            f"{accuracy.value:.1%}" if accuracy else "-",
            f"{outcome.result.seconds:.0f} s",
            "ok" if outcome.result.passed else "check failed",
        )
    return table
