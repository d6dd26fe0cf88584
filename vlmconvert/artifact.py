"""The files of an artifact."""

from __future__ import annotations

import shutil
from pathlib import Path

from manifests.model import Manifest
from passes.store import digest

__all__ = ["link_or_copy", "manifest_digest", "processor_files"]


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


def manifest_digest(manifest: Manifest) -> str:
    """SHA-256 of a manifest without its figures, which do not change what the artifact answers."""
    return digest(manifest.model_copy(update={"validation": []}).model_dump(mode="json"))


def link_or_copy(source: Path, target: Path) -> None:
    """Let a finished, read-only file stand in a second place, without its bytes if the file system can."""
    try:
        target.hardlink_to(source)
    except OSError:
        shutil.copyfile(source, target)
