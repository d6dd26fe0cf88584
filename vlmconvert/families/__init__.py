"""The families of vision-language models: one file each, one line each in the registry."""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from manifests.errors import BadInputError

if TYPE_CHECKING:
    from passes.checkpoint import Checkpoint

__all__ = ["FAMILIES", "check_family", "complete_config", "demo_checkpoint", "family_module"]

# Name of the family, which is the checkpoint's model_type with hyphens -> module that describes it.
FAMILIES = {
    "mllama": "vlmconvert.families.mllama",
    "llava": "vlmconvert.families.llava",
    "llava-next": "vlmconvert.families.llava_next",
    "llava-next-video": "vlmconvert.families.llava_next_video",
}


def family_module(name: str) -> ModuleType:
    """The module of a family; `vlmconvert.families.llava` shows what one holds."""
    return importlib.import_module(FAMILIES[name])


def demo_checkpoint(family: str) -> Path | None:
    """The folder of the embedded checkpoint of a family, small and trained, if it has one."""
    folder = Path(__file__).parents[1] / "demo" / family
    return folder if folder.is_dir() else None


def check_family(name: str, config: dict[str, object], where: str) -> None:
    """Refuse a checkpoint of another family, naming the command that converts it."""
    model_type = str(config["model_type"]).replace("_", "-")
    if model_type == name:
        return
    mend = (
        f"use vlmconvert {model_type}"
        if model_type in FAMILIES
        else f"vlmconvert converts {', '.join(FAMILIES)} models"
    )
    raise BadInputError(f"{where} is a {model_type} checkpoint, not {name}: {mend}")


def complete_config(name: str, config: dict[str, Any], names: dict[str, str], checkpoint: Checkpoint) -> dict[str, Any]:
    """A config with those tensors that runtimes look for in it.

    Args:
        name: of the family.
        config: with every default.
        names: in-memory tensor name -> name in the checkpoint's files.
        checkpoint: holds the tensors.

    Raises:
        BadInputError: if the checkpoint lacks one, or has an LM head of its own although the config ties it.
    """
    tensors: dict[str, str] = family_module(name).CONFIG_TENSORS
    missing = [tensor for tensor in tensors.values() if tensor not in names]
    if missing:
        raise BadInputError(f"{checkpoint.folder} lacks tensor {missing[0]}: fetch the checkpoint again")
    _check_tied(config, names, checkpoint)
    return config | {key: checkpoint.read(names[tensor]).tolist() for key, tensor in tensors.items()}


def _check_tied(config: dict[str, Any], names: dict[str, str], checkpoint: Checkpoint) -> None:
    """Refuse a head that the config ties to embeddings with other values: transformers would use it, and no artifact would."""
    ties = any(part.get("tie_word_embeddings") for part in (config, config["text_config"]))
    pair = [names.get(name) for name in ("lm_head.weight", "model.language_model.embed_tokens.weight")]
    if not ties or None in pair:
        return
    from passes.export.safetensors import CHUNK, raw_chunks, ring

    head, embeddings = (checkpoint.tensors[name] for name in pair if name)
    chunks = (raw_chunks(checkpoint.folder, info, ring(CHUNK)) for info in (head, embeddings))
    alike = (head.dtype, head.shape) == (embeddings.dtype, embeddings.shape)
    if not alike or not all((one == other).all() for one, other in zip(*chunks, strict=True)):
        raise BadInputError(
            f"{checkpoint.folder}: config.json ties the LM head to the embeddings, and tensor {pair[0]} has other values: set "
            "tie_word_embeddings to false in config.json"
        )
