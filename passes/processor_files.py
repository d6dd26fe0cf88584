"""The files of a checkpoint that belong to its processor."""

from __future__ import annotations

from pathlib import Path

from manifests.errors import BadInputError
from passes.checkpoint import Checkpoint

__all__ = ["check_processor", "processor_files", "source_names"]

_NAMES = {
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


def processor_files(folder: Path) -> list[Path]:
    """Processor, tokenizer, chat template and generation config files of a checkpoint."""
    return [path for path in sorted(folder.iterdir()) if path.name in _NAMES]


def source_names(checkpoint: Checkpoint) -> list[str]:
    """Names of the files of a checkpoint that a conversion reads."""
    names = ["config.json", *checkpoint.weight_files]
    names += [path.name for path in processor_files(checkpoint.folder)]
    return sorted(set(names))


def check_processor(folder: Path, required: tuple[tuple[str, ...], ...]) -> None:
    """Refuse a checkpoint without the processor's files.

    Args:
        folder: the checkpoint.
        required: names of the required files; of the names in one tuple, one file is enough.

    Raises:
        BadInputError: with the names of the missing files.
    """
    for alternatives in required:
        if not any((folder / name).is_file() for name in alternatives):
            raise BadInputError(
                f"{folder} lacks {' or '.join(alternatives)}: copy the processor's files from the model's page"
            )
