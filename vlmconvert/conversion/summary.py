"""Tables of a conversion on the terminal: the plan before the work, the result after it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from rich.table import Table

from manifests.model import Manifest
from vlmconvert.console import format_size, format_time
from vlmconvert.conversion.forecast import Forecast, Resources
from vlmconvert.conversion.plan import Plan

__all__ = ["folder_size", "forecast_text", "layers_table", "plan_notes", "plan_table", "result_table"]

# Names of unread tensors or files that the plan lists.
_FEW = 8
# The number of a block in the name of a layer.
_NUMBER = re.compile(r"\.(\d+)\.")


def plan_table(plan: Plan, dtype: str) -> Table:
    """Table of the plan: passes and sizes of every component.

    Args:
        plan: the plan.
        dtype: dtype of the checkpoint's weights.
    """
    table = Table(title=f"Plan ({dtype} checkpoint)", title_justify="left")
    for column in ("component", "precision", "blocks", "passes"):
        table.add_column(column, overflow="fold")
    for column in ("size before", "after (about)"):
        table.add_column(column, justify="right")
    for item in plan.components:
        sizes = (format_size(item.size_before), format_size(item.size_after))
        blocks = str(len(item.component.blocks))
        table.add_row(item.component.name, item.precision, blocks, "\n".join(item.lines), *sizes)
    return table


def plan_notes(plan: Plan, unread_files: Sequence[str]) -> Iterator[str]:
    """Yield notes on the plan: layers with other precisions, fallbacks, and what is not read of the checkpoint.

    Args:
        plan: the plan.
        unread_files: names of files with weights that transformers would not load either.
    """
    for item in plan.components:
        if len(item.layers) <= _FEW:
            for layer, precision in item.layers.items():
                yield f"layer {layer}: {precision}"
        for fallback in item.fallbacks:
            yield f"fallback: {fallback}"
    if plan.unused_tensors:
        yield f"not read, since no component needs them: {_listed(plan.unused_tensors, 'tensors')}"
    if unread_files:
        yield f"not read, since transformers loads other files of the checkpoint: {_listed(unread_files, 'files')}"


def layers_table(plan: Plan) -> Table | None:
    """Table of the layers with other precisions than their component's; None if these are few, which `plan_notes` lists.

    A row has all layers whose names differ in the number of the block only; the numbers stand under the precisions.
    """
    listed = [item for item in plan.components if len(item.layers) > _FEW]
    if not listed:
        return None
    precisions = list(dict.fromkeys(sorted(found for item in listed for found in item.layers.values())))
    table = Table(title="Layers", title_justify="left")
    for column in ("component", "layer", *precisions):
        table.add_column(column, overflow="fold")
    for item in listed:
        rows: dict[str, dict[str, list[int]]] = {}
        for tensor, precision in item.layers.items():
            layer, number = _without_number(tensor.removesuffix(".weight"))
            rows.setdefault(layer, {}).setdefault(precision, []).append(number)
        for layer, found in rows.items():
            name = layer.removeprefix("model.")
            table.add_row(item.component.name, name, *(_ranges(found.get(precision, [])) for precision in precisions))
        table.add_section()
    return table


def _without_number(layer: str) -> tuple[str, int]:
    """The name of a layer with a star for the number of its block, and that number; -1 if there is none."""
    match = _NUMBER.search(layer)
    return (f"{layer[: match.start()]}.*.{layer[match.end() :]}", int(match[1])) if match else (layer, -1)


def _ranges(numbers: Sequence[int]) -> str:
    """Numbers as `0-3, 7`; a dot for the number -1."""
    if -1 in numbers:
        return "."
    parts: list[list[int]] = []
    for number in sorted(numbers):
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    return ", ".join(f"{part[0]}-{part[-1]}" if len(part) > 1 else f"{part[0]}" for part in parts)


def _listed(names: Sequence[str], what: str) -> str:
    """Some names, and how many more there are."""
    some = ", ".join(names[:_FEW])
    return some if len(names) <= _FEW else f"{some} and {len(names) - _FEW} more {what}"


def forecast_text(expected: Forecast, resources: Resources) -> str:
    """What a conversion is expected to take, if it finds nothing in the store."""
    workers = f"{resources.workers} worker{'s' if resources.workers > 1 else ''}"
    return (
        f"expected with {workers}: up to {expected.memory / 2**30:.1f} GiB of memory and {format_size(expected.disk)} of disk "
        f"space, about {format_time(expected.seconds)}; less for what the store has"
    )


def result_table(manifest: Manifest, plan: Plan, seconds: Mapping[str, float]) -> Table:
    """Table of the result: sizes, figures and time of every component."""
    table = Table(title=manifest.name, title_justify="left")
    table.add_column("component")
    table.add_column("precision")
    for column in ("size before", "after", "KL", "accuracy before", "after", "time"):
        table.add_column(column, justify="right")

    def kl(component: str) -> str:
        values = [item.value for item in manifest.validation if item.metric == "kl" and item.component == component]
        return f"{values[0]:.2g}" if values else "-"

    for record, item in zip(manifest.components, plan.components, strict=True):
        table.add_row(
            record.name,
            record.precision,
            format_size(item.size_before),
            format_size(sum(file.size for file in record.files)),
            kl(record.name),
            "",
            "",
            f"{seconds[record.name]:.1f} s",
        )
    accuracy = next((item for item in manifest.validation if item.metric == "exact_match"), None)
    table.add_section()
    table.add_row(
        "artifact",
        "",
        format_size(sum(item.size_before for item in plan.components)),
        format_size(sum(file.size for record in manifest.components for file in record.files)),
        kl("artifact"),
        f"{accuracy.reference:.1%}" if accuracy and accuracy.reference is not None else "-",
        f"{accuracy.value:.1%}" if accuracy else "-",
        f"{sum(seconds.values()):.1f} s",
    )
    return table


def folder_size(folder: Path) -> int:
    """Bytes of all files in a folder and its subfolders."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
