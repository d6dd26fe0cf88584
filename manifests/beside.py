"""Which files in a folder are vlmconvert's own: those in the manifest, and those that its commands write beside them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path, PurePath

from manifests.bench import BENCH_NAME
from manifests.evaluation import EVALUATION_FOLDER, is_result
from manifests.files import UNFINISHED
from manifests.io import CHECKSUM_NAME, MANIFEST_NAME
from manifests.model import Manifest

__all__ = [
    "MODEL_CARD_NAME",
    "REPORT_NAME",
    "RUN_LOG_NAME",
    "SIGNATURE_NAME",
    "entries",
    "foreign_files",
    "foreign_results",
]

MODEL_CARD_NAME = "README.md"
RUN_LOG_NAME = "run.json"
REPORT_NAME = "report.html"
SIGNATURE_NAME = "model.sig"

_BESIDE = {MANIFEST_NAME, CHECKSUM_NAME, MODEL_CARD_NAME, RUN_LOG_NAME, BENCH_NAME, REPORT_NAME, SIGNATURE_NAME}


def foreign_files(folder: Path, manifest: Manifest) -> list[PurePath]:
    """Files in an artifact's folder that are neither in its manifest nor named like the output of a vlmconvert command.

    Returns:
        Paths relative to the folder, sorted. A symbolic link counts as a file, wherever it points.
    """
    listed = {PurePath(record.path) for component in manifest.components for record in component.files}
    listed |= {PurePath(record.path) for record in manifest.assets}
    return [path for path in entries(folder) if path not in listed and not _written_beside(path)]


def foreign_results(folder: Path) -> list[PurePath]:
    """Files in a folder of evaluation results that are not named like the output of an evaluation, relative and sorted."""
    return [path for path in entries(folder) if not is_result(path)]


def entries(folder: Path) -> list[PurePath]:
    """All files below a folder, relative to it and sorted; a symbolic link counts as a file."""

    def below(parent: Path) -> Iterator[Path]:
        for path in parent.iterdir():
            if path.is_dir() and not path.is_symlink():
                yield from below(path)
            else:
                yield path.relative_to(folder)

    return sorted(below(folder))


def _written_beside(path: PurePath) -> bool:
    top, *rest = path.parts
    if top == EVALUATION_FOLDER:  # evaluations on other data may have subfolders of their own
        return any(is_result(PurePath(*rest[start:])) for start in range(len(rest)))
    return top.startswith(UNFINISHED) or (top in _BESIDE and not rest)
