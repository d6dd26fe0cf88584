"""Files for OpenVINO GenAI and optimum-intel: the tokenizer as graphs, and settings of the image processor."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import passes  # noqa: F401  keeps telemetry off before openvino is imported
from manifests.errors import ConversionError
from manifests.files import read_json
from passes.export.ir import finish

if TYPE_CHECKING:
    from vlmconvert.families.base import Family

__all__ = ["GENAI_FILES", "write_genai_files"]

_TOKENIZER, _DETOKENIZER = "openvino_tokenizer.xml", "openvino_detokenizer.xml"
_CONFIG, _PROCESSOR, _SETTINGS = "config.json", "processor_config.json", "preprocessor_config.json"
_VIDEOS = "video_preprocessor_config.json"
# Names of the files that `write_genai_files` may write.
GENAI_FILES = tuple(
    sorted(
        {
            _PROCESSOR,
            _SETTINGS,
            *(
                str(Path(name).with_suffix(suffix))
                for name in (_TOKENIZER, _DETOKENIZER)
                for suffix in (".xml", ".bin")
            ),
        }
    )
)


def write_genai_files(folder: Path, family: Family) -> None:
    """Write the tokenizer and detokenizer graphs, and settings of the model and the image processor that GenAI can read.

    Args:
        folder: folder of the artifact, which already has the checkpoint's config and processor files.
        family: family of the checkpoint.

    Raises:
        ConversionError: if openvino-tokenizers cannot convert the tokenizer.
    """
    import openvino as ov
    from openvino_tokenizers import convert_tokenizer
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    try:
        models = convert_tokenizer(tokenizer, with_detokenizer=True)
    except Exception as error:
        reason = " ".join(str(error).split())
        raise ConversionError(
            f"openvino-tokenizers cannot convert the tokenizer in {folder.name} to a graph: {reason}"
        ) from error
    for name, model in zip((_TOKENIZER, _DETOKENIZER), models, strict=True):
        ov.save_model(model, folder / name, compress_to_fp16=False)
        finish(folder / name)
    _write_settings(folder, family.crops_for_genai)
    if family.genai_config:
        _write(folder / _CONFIG, _merged(_read(folder / _CONFIG), family.genai_config))


def _merged(values: dict[str, Any], others: Mapping[str, Any]) -> dict[str, Any]:
    """Values with others in their place, and in the dictionaries among them."""
    found = dict(values)
    for name, value in others.items():
        found[name] = _merged(found.get(name) or {}, value) if isinstance(value, Mapping) else value
    return found


def _write_settings(folder: Path, crops: bool) -> None:
    """Write the image processor's settings as GenAI reads them; transformers reads the same settings as before.

    Settings that GenAI can read already are not changed.
    """
    nested, flat = _read(folder / _PROCESSOR), _read(folder / _SETTINGS)
    if flat and (not crops or _as_genai_reads(flat) == flat):
        return
    # transformers reads processor_config.json before preprocessor_config.json. The original settings are copied to the
    # former, so that transformers does not read those that are written for GenAI.
    own = nested.get("image_processor") or flat
    added = {"image_processor": own}
    takes_videos = not {"video_token_index", "video_token_id"}.isdisjoint(_read(folder / _CONFIG))
    if flat and takes_videos and not (folder / _VIDEOS).exists():
        added["video_processor"] = flat
    if not added.keys() <= nested.keys():
        _write(folder / _PROCESSOR, added | nested)
    _write(folder / _SETTINGS, _as_genai_reads(own) if crops else own)


def _as_genai_reads(settings: dict[str, Any]) -> dict[str, Any]:
    """Write settings in the only form that GenAI supports: resize the shorter edge, then crop."""
    size, crop = (_lengths(settings.get(name)) for name in ("size", "crop_size"))
    if "height" in size and not (crop and settings.get("do_center_crop")):
        crop = size
    if not size or "height" not in crop:
        return settings  # without a crop, the image keeps its aspect ratio; GenAI cannot do this
    edge = size["shortest_edge"] if "shortest_edge" in size else min(size["height"], size["width"])
    wanted = {"crop_size": {name: crop[name] for name in ("height", "width")}, "size": {"shortest_edge": edge}}
    return settings | wanted


def _lengths(size: Any) -> dict[str, int]:
    """A size as a dict; older files have one number for height and width."""
    return {"height": size, "width": size} if isinstance(size, int) else size or {}


def _read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = read_json(path) if path.exists() else {}
    return content


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
