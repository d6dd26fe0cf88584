"""The files of a checkpoint that belong to its processor."""

from __future__ import annotations

from pathlib import Path

from manifests.errors import BadInputError
from passes.checkpoint import Checkpoint
from passes.checkpoint_files import check_file, check_text, read_object

__all__ = ["check_processor", "processor_files", "source_names", "template_file"]

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

_REFUSED = ("audio_tokenizer_config.json",)
_MEND = "copy the processor's files from the model's page"


def processor_files(folder: Path) -> list[Path]:
    """Processor, tokenizer, chat template and generation config files of a checkpoint."""
    return [path for path in sorted(folder.iterdir()) if path.name in _NAMES]


def source_names(checkpoint: Checkpoint) -> list[str]:
    """Names of the files of a checkpoint that a conversion reads."""
    names = ["config.json", *checkpoint.weight_files]
    names += [path.name for path in processor_files(checkpoint.folder)]
    return sorted(set(names))


def check_processor(folder: Path, required: tuple[tuple[str, ...], ...]) -> None:
    """Refuse a checkpoint whose processor's files are missing, cannot be read, or would make transformers read others.

    Args:
        folder: the checkpoint.
        required: names of the required files; of the names in one tuple, one file is enough.

    Raises:
        BadInputError: with the name of the file.
    """
    for alternatives in required:
        if not any((folder / name).exists() for name in alternatives):
            raise BadInputError(f"{folder} lacks {' or '.join(alternatives)}: {_MEND}")
    for path in processor_files(folder):
        if path.suffix == ".json":
            content = read_object(folder, path.name, _MEND)
            if "audio_tokenizer" in content:
                raise BadInputError(
                    f"{path} names an audio tokenizer, which transformers would load from another place: remove that entry"
                )
        elif path.suffix == ".jinja":
            check_text(folder, path.name, _MEND)
        else:
            check_file(folder, path.name, _MEND)
    for name in _REFUSED:
        if (folder / name).exists():
            raise BadInputError(f"{folder / name} makes transformers load other models: remove the file")


def template_file(folder: Path) -> Path:
    """The file in which transformers finds the chat template, or would look for it."""
    names = ("chat_template.jinja", "chat_template.json", "tokenizer_config.json")
    return next((folder / name for name in names if (folder / name).exists()), folder / names[-1])
