"""The families of vision-language models: each has one folder, and one line in the registry."""

from __future__ import annotations

from difflib import SequenceMatcher
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from manifests.errors import BadInputError
from passes.registry import Registry

if TYPE_CHECKING:
    from passes.checkpoint import Checkpoint
    from vlmconvert.families.base import Family

__all__ = [
    "FAMILIES",
    "check_family",
    "check_tied",
    "complete_config",
    "demo_checkpoint",
    "family_of",
    "load_family",
]

FAMILIES = Registry(
    "family",
    "vlmconvert.families",
    "vlmconvert.families.base:Family",
    {
        "mllama": "vlmconvert.families.mllama.family:FAMILY",
        "llava": "vlmconvert.families.llava.family:FAMILY",
        "llava-next": "vlmconvert.families.llava_next.family:FAMILY",
        "llava-next-video": "vlmconvert.families.llava_next_video.family:FAMILY",
        "qwen2-vl": "vlmconvert.families.qwen2_vl.family:FAMILY",
        "qwen2.5-vl": "vlmconvert.families.qwen2_5_vl.family:FAMILY",
        "qwen3-vl": "vlmconvert.families.qwen3_vl.family:FAMILY",
        "internvl": "vlmconvert.families.internvl.family:FAMILY",
        "idefics3": "vlmconvert.families.idefics3.family:FAMILY",
        "smolvlm": "vlmconvert.families.smolvlm.family:FAMILY",
        "gemma3": "vlmconvert.families.gemma3.family:FAMILY",
    },
)


@cache
def load_family(name: str) -> Family:
    """Load the family of that name.

    Raises:
        BadInputError: if no family has that name, or an installed package registers something else under it.
    """
    family: Family = FAMILIES.load(name)
    return family


def family_of(config: dict[str, Any], where: str) -> Family:
    """Find the family of a checkpoint.

    Args:
        config: content of the checkpoint's config.json.
        where: folder or hub id of the checkpoint, for the error.

    Raises:
        BadInputError: if vlmconvert has no family for the `model_type` in the config.
    """
    name = _family_name(config)
    if name not in FAMILIES:
        raise BadInputError(f"{where} is a {name} checkpoint{_obstacle(config)}")
    return load_family(name)


def check_family(family: Family, config: dict[str, Any], where: str) -> None:
    """Refuse a checkpoint that is not of the family that the user has chosen.

    Args:
        family: the chosen family.
        config: content of the checkpoint's config.json.
        where: folder or hub id of the checkpoint, for the error.

    Raises:
        BadInputError: if the checkpoint is of another family; the error names the command that converts it.
    """
    name = _family_name(config)
    if name == family.name:
        return
    mend = f", not {family.name}: use vlmconvert {name}" if name in FAMILIES else _obstacle(config)
    raise BadInputError(f"{where} is a {name} checkpoint{mend}")


def _obstacle(config: dict[str, Any]) -> str:
    """The end of a sentence about a checkpoint of no family: what stands in the way, and the nearest family."""
    types = {
        side: (config.get(f"{side}_config") or {}).get("model_type")
        if isinstance(config.get(f"{side}_config"), dict)
        else None
        for side in ("text", "vision")
    }
    model_type = str(config.get("model_type"))
    if not any(key in config for key in ("vision_config", "visual", "vision_tower", "mm_vision_tower")):
        return ", which has no vision side (no vision_config in its config.json): vlmconvert families lists what can be converted"

    def likeness(family: Family) -> float:
        shared = (types["text"] in family.text_models) + (types["vision"] in family.vision_models)
        return shared + SequenceMatcher(None, model_type, family.name.replace("-", "_")).ratio()

    nearest = max((load_family(name) for name in FAMILIES.names), key=likeness)
    known = {"text": nearest.text_models, "vision": nearest.vision_models}
    words = {"text": "text model", "vision": "vision tower"}
    different = [
        f"whose {words[side]} is a {' or '.join(own)} and not a {types[side]}"
        for side, own in known.items()
        if types[side] not in own
    ]
    why = " and ".join(different) or "which joins the same text model and vision tower in another way"
    return f": the nearest family is {nearest.name}, {why}; vlmconvert families lists what can be converted"


def _family_name(config: dict[str, Any]) -> str:
    """The family of a config's `model_type`, which GenAI may call otherwise; or what its name would be."""
    model_type = str(config.get("model_type"))
    known = {name.replace("-", "_").replace(".", "_"): name for name in FAMILIES.names}
    if model_type not in known:
        known |= {str(load_family(name).genai_config.get("model_type")): name for name in FAMILIES.names}
    return known.get(model_type, model_type.replace("_", "-"))


def complete_config(
    family: Family, config: dict[str, Any], names: dict[str, str], checkpoint: Checkpoint
) -> dict[str, Any]:
    """Add to a config the small tensors that runtimes read from it.

    Args:
        family: family of the checkpoint.
        config: the config with all defaults filled in.
        names: in-memory tensor name -> name in the checkpoint's files.
        checkpoint: the checkpoint, whose tensors are read.

    Raises:
        BadInputError: if the checkpoint lacks one of these tensors, or holds no floating-point numbers in it.
    """
    tensors = family.config_tensors
    missing = [tensor for tensor in tensors.values() if tensor not in names]
    if missing:
        raise BadInputError(f"{checkpoint.folder} lacks tensor {missing[0]}: fetch the checkpoint again")
    for tensor in tensors.values():
        checkpoint.weight(names[tensor])
    return config | {key: checkpoint.read(names[tensor]).tolist() for key, tensor in tensors.items()}


def check_tied(family: Family, config: dict[str, Any], names: dict[str, str], checkpoint: Checkpoint) -> None:
    """Refuse a checkpoint in which two tensors have different values although the config ties them.

    transformers would use both tensors, but artifacts hold only one of them. Both are read whole, in small pieces.

    Args:
        family: family of the checkpoint.
        config: the config with all defaults filled in.
        names: in-memory tensor name -> name in the checkpoint's files.
        checkpoint: the checkpoint, whose tensors are read.

    Raises:
        BadInputError: if the two tensors differ; the error names them.
    """
    from passes.export.safetensors import CHUNK, raw_chunks, ring

    for tied, shared in family.ties(config).items():
        if tied not in names or shared not in names:
            continue
        one, other = (checkpoint.tensors[names[name]] for name in (tied, shared))
        chunks = (raw_chunks(checkpoint.folder, info, ring(CHUNK)) for info in (one, other))
        alike = (one.dtype, one.shape) == (other.dtype, other.shape)
        if not alike or not all((first == second).all() for first, second in zip(*chunks, strict=True)):
            raise BadInputError(
                f"{checkpoint.folder}: config.json ties tensor {names[tied]} to {names[shared]}, and their values differ: set "
                "tie_word_embeddings to false in config.json"
            )


def demo_checkpoint(family: str) -> Path | None:
    """Folder of the small trained checkpoint that is embedded for a family; None if the family has none."""
    return load_family(family).demo
