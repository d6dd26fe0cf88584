"""What one sample takes on its way through the model, found before the work by processing a few samples."""

from __future__ import annotations

import json
import tempfile
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from calibration.activations import read_file
from calibration.inputs import Prompts, write_inputs
from calibration.sources import SampleSet, load_samples
from manifests.files import file_record, read_json
from passes.export.template import Templates
from passes.processor_files import processor_files
from passes.sketch import BlockSketch, Sketch, sketch
from passes.store import Store, digest
from passes.vocabulary import Component, TensorShapes
from vlmconvert.console import Reporter
from vlmconvert.conversion.helper import Helper
from vlmconvert.conversion.open import source_digest
from vlmconvert.conversion.plan import Plan
from vlmconvert.conversion.progress import files_made
from vlmconvert.families import complete_config
from vlmconvert.families.opened import OpenedModel

__all__ = ["calibration_samples", "scarce_layers", "sketch_sample"]

_VERSION = 2
_FILE = "sketch.json"
# Samples that are looked at.
_FEW = 3


def calibration_samples(plan: Plan, model: OpenedModel) -> SampleSet:
    """The calibration samples of a plan, or a few scenes if no pass needs any; images are read when they are used.

    Scenes have all sizes that matter already; other images are made to have them.

    Raises:
        BadInputError: if the source does not exist, or has too few samples.
    """
    settings = plan.calibration
    if not plan.calibrates:
        return load_samples("scenes", _FEW, settings.seed)
    samples = load_samples(settings.source, max(plan.sample_counts.values(), default=1), settings.seed)
    return samples if settings.source == "scenes" else samples.with_sizes(model.family.image_sizes(model.config))


def sketch_sample(
    model: OpenedModel, samples: SampleSet, sequence_length: int, helper: Helper, store: Store, reporter: Reporter
) -> Sketch:
    """What one sample takes, as a mean over a few.

    Args:
        model: the checkpoint, whose blocks have been traced.
        samples: the samples that will be used.
        sequence_length: see `calibration.inputs.write_inputs`.
        helper: process that has transformers.
        store: keeps the result.
        reporter: shows progress.
    """
    few = samples.first(_FEW)
    processor = [file_record(path, model.checkpoint.folder).sha256 for path in processor_files(model.checkpoint.folder)]
    family = source_digest(model.family)
    key = digest("sketch", _VERSION, model.templates.folder.name, family, processor, few.digest, sequence_length)
    if key not in store:
        config = complete_config(model.family, model.config, model.names, model.checkpoint)
        arguments = (model.checkpoint.folder, few, model.family, config, sequence_length)
        with reporter.stage("looking at a few samples", len(few.samples)) as step:

            def make(output: Path) -> None:
                every = (*arguments, model.components, model.templates, output)
                helper.run(_sketch, *every, meanwhile=files_made(output, "*/*.safetensors", step))

            store.get_or_make(key, make, "sizes of a sample's activations")
    made = read_json(store.path(key) / _FILE, f"delete {store.path(key)}")
    return Sketch(made["inputs"], made["tokens"], tuple(BlockSketch(**block) for block in made["blocks"]))


def scarce_layers(plan: Plan, sketch: Sketch, shapes: Mapping[str, TensorShapes]) -> Iterator[str]:
    """Yield sentences on the layers that too few tokens reach for what a pass would do with them.

    Args:
        plan: the plan.
        sketch: what one sample takes.
        shapes: kind -> parameter -> shape.
    """
    tokens = sketch.tokens * plan.calibration.samples
    for part in plan.components:
        for step in part.steps:
            found: dict[str, str] = {}
            for block in part.component.blocks:
                if not step.needs_activations(block.role):
                    continue
                for parameter, shape in shapes[block.kind].items():
                    what = step.scarce(tokens, shape[1]) if len(shape) == 2 else None
                    if what is not None:
                        layer = ".".join(parameter.split(".")[-2:-1])
                        found[layer] = f"the {shape[1]} channels of {layer}, which is {what}"
            if found:
                yield (
                    f"{part.component.name}: about {tokens} tokens are few for {'; '.join(found.values())}: more samples, or "
                    "longer ones, are better"
                )


def _sketch(
    folder: Path,
    samples: SampleSet,
    prompts: Prompts,
    config: dict[str, Any],
    sequence_length: int,
    components: tuple[Component, ...],
    templates: Templates,
    output: Path,
) -> None:
    """Write the sketch of a sample into a folder; meant for a process of its own, since it imports transformers."""
    with tempfile.TemporaryDirectory(dir=output) as temporary:
        write_inputs(folder, samples, prompts, config, sequence_length, Path(temporary))
        found = [sketch(components, config, templates, read_file(path)) for path in sorted(Path(temporary).iterdir())]
    (output / _FILE).write_text(json.dumps(asdict(_mean(found))), encoding="utf-8")


def _mean(sketches: Sequence[Sketch]) -> Sketch:
    """The mean of several samples; that of a block is over the samples that reach it."""
    blocks: dict[tuple[str, str], list[BlockSketch]] = defaultdict(list)
    for made in sketches:
        for block in made.blocks:
            blocks[block.component, block.block].append(block)
    means = (
        BlockSketch(*name, *(sum(values) // len(values) for values in zip(*map(_figures, found), strict=True)))
        for name, found in blocks.items()
    )
    inputs, tokens = (
        sum(values) // len(sketches) for values in zip(*((made.inputs, made.tokens) for made in sketches), strict=True)
    )
    return Sketch(inputs, tokens, tuple(means))


def _figures(block: BlockSketch) -> tuple[int, int, int]:
    return block.operations, block.kept, block.inside
