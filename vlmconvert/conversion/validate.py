"""Validation: comparing a finished artifact with its checkpoint, before the artifact gets its name."""

from __future__ import annotations

import time
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from calibration.scenes import Split
from calibration.sources import held_out_texts, load_samples
from manifests.model import Manifest, Validation
from vlmconvert.console import Reporter
from vlmconvert.conversion.answered import answered_batch
from vlmconvert.conversion.plan import Plan
from vlmconvert.conversion.reference import fits_whole
from vlmconvert.families.opened import OpenedModel

if TYPE_CHECKING:
    from calibration.sources.samples import Sample
    from passes.chain import BlockModels
    from passes.validate.comparison import Comparison

__all__ = ["BATCH", "MINUTE", "Limits", "validate"]

# Samples that are compared at the same time.
BATCH = 25
# Bytes that the values of a batch may take which is computed block by block.
_VALUES = 1 << 28
# Seconds that validation may always take.
MINUTE = 60.0


@dataclass(frozen=True)
class Limits:
    """What a validation may take, and what it lets pass.

    Attributes:
        samples: maximum number of held-out scenes.
        share: maximum share of the conversion's time that validation takes, once it has taken a minute; 0 sets no limit.
        max_kl: maximum mean KL divergence from the checkpoint that passes, in nats.
        max_drop: maximum loss of accuracy that passes, in percentage points.
    """

    samples: int = 200
    share: float = 0.25
    max_kl: float = 1.0
    max_drop: float = 1.0


def validate(
    model: OpenedModel,
    plan: Plan,
    manifest: Manifest,
    folder: Path,
    limits: Limits,
    seconds: float,
    memory: int | None,
    reporter: Reporter,
) -> list[Validation]:
    """Compare an artifact with its checkpoint on held-out scenes and, if the checkpoint cannot answer these, along texts.

    For scenes, both are loaded as a whole if the checkpoint fits into the memory, otherwise block by block. Texts are so long
    that they are always compared block by block, since decoding them token by token would take much longer.

    Args:
        model: the checkpoint, with a completed config.
        plan: plan of the conversion.
        manifest: manifest of the artifact.
        folder: folder of the artifact.
        limits: see `Limits`.
        seconds: time that the conversion has taken.
        memory: limit for the memory in bytes; None if there is none.
        reporter: shows progress.

    Returns:
        The figures for the manifest.
    """
    from passes.validate.accuracy import ValidateAccuracyPass
    from passes.validate.parity import ValidateParityPass
    from passes.validate.texts import ValidateTextsPass

    samples = list(load_samples("scenes", limits.samples, split=Split.TEST).samples)
    blocks = plan.target.blocks(folder, manifest, model.family)
    compared = (
        _compare_whole(model, plan, manifest, folder, samples, reporter)
        if blocks is None or fits_whole(model, plan.size_after, memory)
        else _compare_in_blocks(model, blocks, folder, samples, reporter)
    )
    longest = max(MINUTE, limits.share * seconds) if limits.share else float("inf")
    comparisons = _in_time(compared, longest)
    done = sum(comparison.samples for comparison in comparisons)
    if done < len(samples):
        reporter.say(
            f"validated on {done} of {len(samples)} samples: --validation-time {limits.share:g} allows no more; use a larger "
            "share, or 0 for no limit"
        )
    (accuracy,) = ValidateAccuracyPass(limits.max_drop)(comparisons)
    figures = [*ValidateParityPass(limits.max_kl)(comparisons), accuracy]
    if accuracy.threshold is not None or blocks is None:
        return figures
    reporter.say(
        f"not judged by scenes, of which the checkpoint answers {accuracy.reference:.0%} as they are asked for: judged by texts"
    )
    texts = _in_time(_compare_in_blocks(model, blocks, folder, held_out_texts(), reporter), longest)
    return figures + ValidateTextsPass(limits.max_kl)(texts)


def _in_time(compared: Generator[Comparison], longest: float) -> list[Comparison]:
    """As many comparisons as are made in so many seconds, at least one."""
    start, made = time.monotonic(), []
    with closing(compared):  # a comparison that is left may hold two whole models
        for comparison in compared:
            made.append(comparison)
            # Another batch takes as long as those so far did on average.
            if (time.monotonic() - start) * (1 + 1 / len(made)) > longest:
                break
    return made


def _sides(model: OpenedModel) -> tuple[str, str]:
    """Names of the vision encoder and of the language model."""
    vision = next(component.name for component in model.components if component.side == "vision")
    return vision, model.components[-1].name


def _compare_whole(
    model: OpenedModel, plan: Plan, manifest: Manifest, folder: Path, samples: list[Sample], reporter: Reporter
) -> Generator[Comparison]:
    """Load checkpoint and artifact as their users do, and compare them batch by batch."""
    from passes.validate.comparison import compare
    from passes.validate.model import Batch
    from vlmconvert.conversion.reference import reference_model

    family = model.family
    with reporter.stage("loading checkpoint and artifact", 2) as step:
        processor = family.load_processor(folder)
        reference = reference_model(model, plan.size_after)
        step("checkpoint")
        artifact = plan.target.open_runner(folder, manifest, family, "CPU", {}, None)
        step("artifact")

    def decode(tokens: Any) -> list[str]:
        texts: list[str] = processor.tokenizer.batch_decode(tokens, skip_special_tokens=True)
        return texts

    with reporter.stage("validating", len(samples)) as step:
        for first in range(0, len(samples), BATCH):
            chosen = samples[first : first + BATCH]
            questions = [sample.turns[0][0] for sample in chosen]
            arrays = family.prompt_inputs(processor, [sample.images for sample in chosen], questions)
            batch = Batch(arrays, tuple(sample.turns[0][1] for sample in chosen))
            yield compare(reference, artifact, batch, artifact.ends, _sides(model), decode)
            for number in range(first, first + len(chosen)):
                step(f"sample {number + 1}")


def _compare_in_blocks(
    model: OpenedModel, blocks: BlockModels, folder: Path, samples: list[Sample], reporter: Reporter
) -> Generator[Comparison]:
    """Compare checkpoint and artifact, of which one block at a time is in memory.

    Samples that are computed at the same time have as many images; those that have are beside each other.
    """
    from passes.validate.comparison import compare_in_blocks
    from passes.validate.streamed import StreamedModel, TorchBlocks

    family = model.family
    processor, ends = family.load_processor(folder), family.end_tokens(folder)
    vision = sum(len(component.blocks) for component in model.components if component.side == "vision")
    total = 4 * sum(len(component.blocks) for component in model.components) - 2 * vision
    first, size = 0, 1
    while first < len(samples):
        images = len(samples[first].pictures)
        chosen = [sample for sample in samples[first : first + size] if len(sample.pictures) == images]
        title = f"validating block by block: sample {first + 1}"
        with reporter.stage(title + (f" to {first + len(chosen)}" if len(chosen) > 1 else ""), total) as step:
            options = (model.config, model.components, family.inputs, family.next_inputs, step)
            reference = StreamedModel(TorchBlocks(model.checkpoint, model.names, model.config), *options)
            artifact = StreamedModel(blocks, *options)
            batch = answered_batch(family, processor, chosen, ends)
            yield compare_in_blocks(reference, artifact, batch, _sides(model))
        first += len(chosen)
        values = sum(value.nbytes for value in (*reference.handed.values(), *artifact.handed.values()))
        size = max(1, min(BATCH, len(chosen) * _VALUES // max(1, values)))
