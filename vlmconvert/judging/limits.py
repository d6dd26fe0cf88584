"""Limits that hold for `check` if none are given, and the number of samples that a limit needs."""

from __future__ import annotations

from math import ceil
from pathlib import Path

from manifests.errors import BadInputError
from manifests.model import Manifest
from passes.checkpoint import read_config
from passes.validate.paired import fewest_lost
from vlmconvert.families import load_family
from vlmconvert.precisions import max_kl

__all__ = ["enough_samples", "usual_kl"]

# KL divergence in nats of two artifacts that were made of the same in the same way; processors round near-ties differently.
_SAME_KL = 1e-5


def enough_samples(drop: float) -> int:
    """Number of samples with which a drop, in percentage points, is larger than chance."""
    if drop <= 0:
        raise BadInputError(
            f"--samples auto needs a drop that samples can show, and --max-drop is {drop:g}: use 0.1 or more"
        )
    return ceil(100 * fewest_lost() / drop)


def usual_kl(folder: Path, manifest: Manifest, baseline: Manifest) -> float:
    """The default of `--max-kl` for an artifact: that of its precisions, or almost none if it is the baseline made again."""
    if _made_of(manifest) == _made_of(baseline):
        return _SAME_KL
    side = {part.name: part.side for part in load_family(manifest.family).components(read_config(folder))}
    sides: dict[str, list[str]] = {"language": [], "vision": []}
    for component in manifest.components:
        # What is no component of the family holds the whole model.
        sides[side.get(component.name, "language")].append(component.precision)
    return max_kl(sides["language"], sides["vision"])


def _made_of(manifest: Manifest) -> tuple[object, ...]:
    """All that determines what an artifact computes."""
    passes = [(component.name, component.passes, component.layers) for component in manifest.components]
    return manifest.source, manifest.target, passes, manifest.settings, manifest.calibration, manifest.environment
