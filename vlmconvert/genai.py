"""What OpenVINO GenAI and optimum-intel read beside the graphs of a model: the tokenizer as graphs, and flat settings."""

from __future__ import annotations

import json
from pathlib import Path

import passes  # noqa: F401  keeps telemetry off before openvino is imported
from manifests.errors import ConversionError
from passes.export.ir import number_names

__all__ = ["GENAI_FILES", "write_genai_files"]

_TOKENIZER, _DETOKENIZER = "openvino_tokenizer.xml", "openvino_detokenizer.xml"
_SETTINGS = "preprocessor_config.json"
# What `write_genai_files` can write.
GENAI_FILES = tuple(
    sorted(
        {
            _SETTINGS,
            *(
                str(Path(name).with_suffix(suffix))
                for name in (_TOKENIZER, _DETOKENIZER)
                for suffix in (".xml", ".bin")
            ),
        }
    )
)


def write_genai_files(folder: Path) -> None:
    """Write the tokenizer and detokenizer graphs, and the image processor's settings where transformers' own file lacks.

    Args:
        folder: with the checkpoint's processor files, to which these are added.

    Raises:
        ConversionError: if openvino-tokenizers does not know the tokenizer.
    """
    import openvino as ov
    from openvino_tokenizers import convert_tokenizer
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    try:
        models = convert_tokenizer(tokenizer, with_detokenizer=True)
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ConversionError(f"the tokenizer in {folder.name} cannot become a graph: {reason}") from error
    for name, model in zip((_TOKENIZER, _DETOKENIZER), models, strict=True):
        ov.save_model(model, folder / name, compress_to_fp16=False)
        number_names(folder / name)
    settings = folder / _SETTINGS
    if not settings.exists():
        config = json.loads((folder / "processor_config.json").read_text(encoding="utf-8"))["image_processor"]
        # GenAI knows one way to bring an image to its size: the shorter edge, then a crop.
        if "shortest_edge" not in config["size"]:
            config |= {"crop_size": config["size"], "size": {"shortest_edge": min(config["size"].values())}}
        settings.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
