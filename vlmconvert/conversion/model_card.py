"""The model card of an artifact: its content, its figures, and how to load it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import ModelCard, ModelCardData, metadata_load

from manifests.beside import MODEL_CARD_NAME
from manifests.model import Manifest, Validation
from manifests.run_plan import RunPlan
from vlmconvert.console import format_size

if TYPE_CHECKING:
    from vlmconvert.targets.base import Target

__all__ = ["model_card", "read_license"]

_LICENSE = ("license", "license_name", "license_link")
_CARD_LIMIT = 1_000_000  # bytes that a model card may have to be read

_HOW_TO_RUN = """## How to load it

```bash
pip install vlmconvert
vlmconvert run FOLDER --image photo.jpg --prompt "What is in the image?"
```"""


def read_license(folder: Path) -> dict[str, Any]:
    """What the front matter of a folder's model card says about the license, under the hub's own keys.

    It is empty if there is no model card, or none that can be read: the license is then not known.
    """
    card = folder / MODEL_CARD_NAME
    try:
        front = (metadata_load(card) if card.stat().st_size <= _CARD_LIMIT else None) or {}
    except Exception:  # of YAML, of the hub's library, and of the file
        return {}
    return {key: front[key] for key in _LICENSE if isinstance(front.get(key), str)}


def model_card(manifest: Manifest, target: Target, license: Mapping[str, Any]) -> ModelCard:
    """Make the model card of an artifact.

    Args:
        manifest: manifest of the artifact.
        target: target of the artifact.
        license: license of the checkpoint, as `read_license` returns it.
    """
    data = ModelCardData(
        base_model=manifest.source.model,
        base_model_relation="quantized",
        library_name=manifest.target,
        pipeline_tag="image-text-to-text",
        tags=[manifest.target, "vlmconvert", manifest.family],
        **license,
    )
    components = "\n".join(
        f"| {item.name} | {item.precision} | {format_size(sum(file.size for file in item.files))} | "
        f"{', '.join(f'{count:,} {dtype}' for dtype, count in item.weights.items())} |"
        for item in manifest.components
    )
    figures = "\n".join(
        f"| {item.metric} | {item.component} | {'' if item.reference is None else f'{item.reference:g}'} | {item.value:g} | "
        f"{_limit(item)} | {'yes' if item.passed else 'no'} | {item.samples} |"
        for item in manifest.validation
    )
    validation = (
        "| metric | component | checkpoint | artifact | limit | passed | samples |\n|---|---|---|---|---|---|---|\n"
        + figures
        if figures
        else "This artifact was not validated."
    )
    fallbacks = [line for item in manifest.components for line in item.fallbacks]
    notes = (
        "\n\nLayers compressed otherwise than asked:\n\n" + "\n".join(f"- {line}" for line in fallbacks)
        if fallbacks
        else ""
    )
    return ModelCard(
        f"""---
{data.to_yaml()}
---

# {manifest.name}

{manifest.source.architecture} from `{manifest.source.model}`, converted to {target.title} by vlmconvert.

| component | precision | size | weights |
|---|---|---|---|
{components}{notes}

## How well it does

{validation}

{_HOW_TO_RUN if target.runnable else "## How it was made"}

{_runtimes(manifest.run_plan) if manifest.run_plan else _content(manifest, target)}
"""
    )


def _content(manifest: Manifest, target: Target) -> str:
    passes = "the passes that made them and\nthe versions of the libraries that did the work"
    if not any(item.outputs for item in manifest.components):
        return f"`manifest.json` lists its files, {passes}."
    return f"The graphs are ordinary {target.title}; `manifest.json` lists their inputs, outputs and state, {passes}."


def _runtimes(plan: RunPlan) -> str:
    """For each runtime the command for the smallest number of cards; the manifest has the others."""
    parts = ["That computes the artifact without an NPU. On NPUs:"]
    for runtime in plan.runtimes:
        least = min(runtime.world_sizes, key=lambda size: size.cards)
        memory = f"{format_size(least.weights)} of weights and {format_size(least.cache)} of cache on each"
        parts.append(f"{runtime.runtime}, {least.cards} card{'s' if least.cards > 1 else ''}, {memory}:")
        parts.append(f"```bash\n{least.command}\n```")
    parts += [f"- {note}" for note in plan.notes]
    parts.append("`manifest.json` has the lines and the memory for every number of cards that the model divides over.")
    return "\n\n".join(parts)


def _limit(figure: Validation) -> str:
    if figure.threshold is not None:
        return f"{figure.threshold:g}"
    return "not judged by scenes" if figure.metric == "exact_match" else ""
