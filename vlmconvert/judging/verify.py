"""Verifying a finished artifact: manifest, files, blocks, graphs, the rules of its runtimes, and that it runs."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from manifests.io import MANIFEST_NAME
from manifests.signing import verify_signature
from manifests.verify import Finding, failed, passed, skipped, verify_files, verify_manifest
from passes.checkpoint import read_config
from vlmconvert.families import family_of, load_family
from vlmconvert.targets import load_target, recognize

__all__ = ["verify"]


def verify(folder: Path, device: str = "CPU", run: bool = True, public_key: Path | None = None) -> Iterator[Finding]:
    """Verify an artifact, and yield the finding of each check.

    Args:
        folder: the artifact.
        device: device of the artifact's runtime.
        run: whether to run the artifact; this takes as much memory as using it, while the other checks read files in
            small pieces.
        public_key: key with which the artifact must be signed; None checks no signature.

    Raises:
        BadInputError: if the folder has no manifest and no target recognizes its format, or if it has no signature although
            a key is given.
    """
    signature = list(verify_signature(folder, public_key)) if public_key is not None else []
    yield from signature
    foreign = None if (folder / MANIFEST_NAME).is_file() else recognize(folder)
    if foreign is not None:
        yield skipped("file", ".", "no manifest to compare with")
        yield from foreign.verify_foreign(folder, family_of(read_config(folder), str(folder)))
        return
    manifest, checks = verify_manifest(folder)
    yield from checks
    if manifest is None:
        yield skipped("file", ".", "no manifest to compare with")
        return
    family, target = load_family(manifest.family), load_target(manifest.target)
    contradictions = [failed("target", MANIFEST_NAME, text) for text in target.contradictions(manifest)]
    yield from contradictions or [passed("target", MANIFEST_NAME, target.title)]
    damaged: set[str] = set()
    for check in verify_files(folder, manifest):
        if check.check == "file" and check.outcome == "failed":
            damaged.add(check.place)
        yield check
    if contradictions:
        yield skipped("graph", ".", "not checked, because the manifest contradicts itself")
        return
    if any(check.outcome == "failed" for check in signature):
        yield skipped("graph", ".", "not opened, because the artifact is not as it was signed")
        return
    yield from target.verify(folder, manifest, family, damaged)
    if not run:
        yield skipped("run", ".", "not run, because of --no-run")
    elif not target.runnable:
        yield skipped("run", ".", f"vlmconvert cannot run {target.title}")
    elif damaged:
        yield skipped("run", ".", "not run, because files are damaged")
    else:
        yield _run(folder, device)


def _run(folder: Path, device: str) -> Finding:
    """Open the artifact in its runtime and ask about an image; this runs every component except those for videos."""
    import numpy as np
    from PIL import Image

    from vlmconvert.running.open import open_runner

    try:
        runner = open_runner(folder, device)
        family = runner.family
        inputs = family.prompt_inputs(
            family.load_processor(folder), [[Image.new("RGB", (64, 64), "grey")]], ["What is it?"]
        )
        logits = runner.prefill(inputs)
    except Exception as error:
        return failed("run", ".", " ".join(str(error).split()))
    if not np.isfinite(logits).all():
        return failed("run", ".", f"{np.count_nonzero(~np.isfinite(logits))} of {logits.size} logits are not finite")
    return passed("run", ".", f"logits {list(logits.shape)} on {device}")
