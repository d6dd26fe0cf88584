"""The files of an artifact, and of the checkpoint that it is made from."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from manifests.errors import BadInputError
from manifests.model import Component, FileRecord, Manifest
from manifests.run_plan import RunPlan
from passes.checkpoint import Checkpoint
from passes.store import digest

__all__ = [
    "Contents",
    "check_disk",
    "check_processor",
    "link_or_copy",
    "manifest_digest",
    "processor_files",
    "source_names",
]


@dataclass(frozen=True)
class Contents:
    """What a conversion has written.

    Attributes:
        components: the manifest's records.
        assets: records of config, processor and tokenizer.
        seconds: how long each component took, by name.
        run_plan: how the artifact is started, where a target has more to say of it than its manifest.
    """

    components: list[Component]
    assets: list[FileRecord]
    seconds: dict[str, float]
    run_plan: RunPlan | None = None


def processor_files(folder: Path) -> list[Path]:
    """Processor, tokenizer, chat template and generation config files of a checkpoint."""
    names = {
        "added_tokens.json",
        "chat_template.jinja",
        "chat_template.json",
        "generation_config.json",
        "merges.txt",
        "preprocessor_config.json",
        "processor_config.json",
        "special_tokens_map.json",
        "tokenizer.json",
        "tokenizer.model",
        "tokenizer_config.json",
        "video_preprocessor_config.json",
        "vocab.json",
    }
    return [path for path in sorted(folder.iterdir()) if path.name in names]


def source_names(checkpoint: Checkpoint) -> list[str]:
    """The files of a checkpoint that a conversion reads."""
    names = ["config.json", *checkpoint.weight_files]
    names += [path.name for path in processor_files(checkpoint.folder)]
    return sorted(set(names))


def check_processor(folder: Path, required: tuple[tuple[str, ...], ...]) -> None:
    """Refuse a checkpoint without the processor's files.

    Args:
        folder: the checkpoint.
        required: files that must be there; of those in one tuple, one is enough.

    Raises:
        BadInputError: naming what is missing.
    """
    for alternatives in required:
        if not any((folder / name).is_file() for name in alternatives):
            raise BadInputError(
                f"{folder} lacks {' or '.join(alternatives)}: copy the processor's files from the model's page"
            )


def check_disk(needed: int, places: Mapping[str, Path]) -> None:
    """Refuse to start if the plan will not fit.

    Args:
        needed: bytes in each place.
        places: option of the command line -> the folder that it chooses.

    Raises:
        BadInputError: with the bytes that are missing.
    """
    for place in dict.fromkeys(places.values()):
        existing = next(path for path in (place, *place.resolve().parents) if path.exists())
        free = shutil.disk_usage(existing).free
        if free < needed:
            raise BadInputError(
                f"{place} has {free / 1e9:.1f} GB free, and the plan needs about {needed / 1e9:.1f} GB: free some space, or "
                f"choose another place with {' and '.join(places)}"
            )


def manifest_digest(manifest: Manifest) -> str:
    """SHA-256 of a manifest without its figures, which do not change what the artifact answers."""
    return digest(manifest.model_copy(update={"validation": []}).model_dump(mode="json"))


def link_or_copy(source: Path, target: Path) -> None:
    """Let a finished, read-only file stand in a second place, without its bytes if the file system can."""
    try:
        target.hardlink_to(source)
    except OSError:
        shutil.copyfile(source, target)
