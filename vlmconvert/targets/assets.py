"""The assets of an artifact: config, processor and tokenizer."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from manifests.files import file_record, write_atomically
from passes.processor_files import processor_files
from vlmconvert.families.opened import OpenedModel

if TYPE_CHECKING:
    from manifests.model import FileRecord

__all__ = ["asset_records", "copy_assets"]


def copy_assets(model: OpenedModel, folder: Path) -> None:
    """Write the completed config, and copy the files of processor and tokenizer unchanged."""
    write_atomically(folder / "config.json", json.dumps(model.config, indent=2, sort_keys=True) + "\n")
    for path in processor_files(model.checkpoint.folder):
        shutil.copyfile(path, folder / path.name)


def asset_records(folder: Path, more: Iterable[str] = ()) -> list[FileRecord]:
    """Records of config, `more` files, processor and tokenizer; files that do not exist are left out."""
    first = ("preprocessor_config.json", "processor_config.json")
    names = ["config.json", *more, *first, *(path.name for path in processor_files(folder))]
    paths = [folder / name for name in dict.fromkeys(names)]
    return [file_record(path, folder) for path in paths if path.exists()]
