"""Files of processor and tokenizer that both transformers 5 and transformers 4 can read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from manifests.errors import BadInputError
from manifests.files import file_record, write_json
from manifests.model import FileRecord
from passes.processor_files import processor_files

__all__ = ["write_sidecars"]

_PROCESSOR, _TOKENIZER = "processor_config.json", "tokenizer_config.json"
# Entry of the processor_config.json that transformers 5 writes -> the file in which transformers 4 looks for it.
_PROCESSOR_PARTS = {"image_processor": "preprocessor_config.json", "video_processor": "video_preprocessor_config.json"}
_CHAT_TEMPLATE, _OLD_CHAT_TEMPLATE = "chat_template.jinja", "chat_template.json"


def write_sidecars(source: Path, folder: Path) -> list[FileRecord]:
    """Copy every file of processor and tokenizer, changed so that transformers 4 can read them, which MindIE uses.

    transformers 4 wants the settings of image and video processor in separate files and refuses them elsewhere, wants
    the chat template in a JSON file, does not have the class `TokenizersBackend`, and has another key for a list of
    special tokens. transformers 5 reads the changed files with the same result as the originals.

    Args:
        source: folder of the checkpoint.
        folder: folder of the artifact.

    Returns:
        Records of the written files.

    Raises:
        BadInputError: if a file is not JSON.
    """
    for path in processor_files(source):
        shutil.copyfile(path, folder / path.name)
    if (folder / _CHAT_TEMPLATE).is_file() and not (folder / _OLD_CHAT_TEMPLATE).is_file():
        template = (folder / _CHAT_TEMPLATE).read_text(encoding="utf-8")
        write_json(folder / _OLD_CHAT_TEMPLATE, {"chat_template": template})
    processor = _read(folder / _PROCESSOR) if (folder / _PROCESSOR).is_file() else {}
    parts = {key: value for key in _PROCESSOR_PARTS if isinstance(value := processor.get(key), dict)}
    for key, part in parts.items():
        # If the checkpoint has such a file too, it is overwritten: transformers 5 ignores it.
        own = {name: processor[name] for name in ("processor_class",) if name in processor}
        write_json(folder / _PROCESSOR_PARTS[key], {**part, **own})
    if parts:
        write_json(folder / _PROCESSOR, {key: value for key, value in processor.items() if key not in parts})
    if (folder / _TOKENIZER).is_file():
        tokenizer = _read(folder / _TOKENIZER)
        before = dict(tokenizer)
        if tokenizer.get("tokenizer_class") == "TokenizersBackend":
            tokenizer["tokenizer_class"] = "PreTrainedTokenizerFast"
        if isinstance(tokenizer.get("extra_special_tokens"), list):
            tokenizer["additional_special_tokens"] = tokenizer.pop("extra_special_tokens")
        if tokenizer != before:
            write_json(folder / _TOKENIZER, tokenizer)
    return [file_record(path, folder) for path in processor_files(folder)]


def _read(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BadInputError(f"{path.name} is not JSON ({error}): fetch the file again") from error
    return content if isinstance(content, dict) else {}
