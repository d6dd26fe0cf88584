"""The model card of an artifact: what it is, how well it does, how to load it."""

from __future__ import annotations

from huggingface_hub import ModelCard, ModelCardData

from manifests.model import Manifest
from vlmconvert.console import format_size

__all__ = ["model_card"]


def model_card(manifest: Manifest) -> ModelCard:
    """Write the card from the manifest alone."""
    data = ModelCardData(
        base_model=manifest.source.model,
        base_model_relation="quantized",
        library_name=manifest.target,
        pipeline_tag="image-text-to-text",
        tags=[manifest.target, "vlmconvert", manifest.family],
    )
    kind = {"openvino": "OpenVINO IR", "onnx": "ONNX"}[manifest.target]
    components = "\n".join(
        f"| {item.name} | {item.precision} | {format_size(sum(file.size for file in item.files))} | "
        f"{', '.join(f'{count:,} {dtype}' for dtype, count in item.weights.items())} |"
        for item in manifest.components
    )
    figures = "\n".join(
        f"| {item.metric} | {item.component} | {'' if item.reference is None else f'{item.reference:g}'} | {item.value:g} | "
        f"{'' if item.threshold is None else f'{item.threshold:g}'} | {'yes' if item.passed else 'no'} | {item.samples} |"
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

{manifest.source.architecture} from `{manifest.source.model}`, converted to {kind} by vlmconvert.

| component | precision | size | weights |
|---|---|---|---|
{components}{notes}

## How well it does

{validation}

## How to load it

```bash
pip install vlmconvert
vlmconvert run FOLDER --image photo.jpg --prompt "What is in the image?"
```

The graphs are ordinary {kind}; `manifest.json` lists their inputs, outputs and state, the passes that made them and
the versions of the libraries that did the work.
"""
    )
