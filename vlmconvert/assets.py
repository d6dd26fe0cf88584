"""What goes with the graphs of an artifact: config, processor and tokenizer."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from manifests.files import file_record, write_atomically
from manifests.model import FileRecord
from vlmconvert.artifact import processor_files
from vlmconvert.families import family_module
from vlmconvert.genai import GENAI_FILES, write_genai_files

if TYPE_CHECKING:
    from vlmconvert.pipeline import Conversion

__all__ = ["write_assets"]


def write_assets(conversion: Conversion, folder: Path) -> list[FileRecord]:
    """Write them into a folder that holds the graphs, and describe them."""
    write_atomically(folder / "config.json", json.dumps(conversion.config, indent=2, sort_keys=True) + "\n")
    for path in processor_files(conversion.checkpoint.folder):
        shutil.copyfile(path, folder / path.name)
    if conversion.options.target == "openvino" and family_module(conversion.family).TOKENIZER_GRAPHS:
        conversion.helper.run(write_genai_files, folder)
        conversion.helper.close()
    names = ["config.json", *GENAI_FILES, *(path.name for path in processor_files(folder))]
    paths = [folder / name for name in dict.fromkeys(names)]
    return [file_record(path, folder) for path in paths if path.exists()]
