"""The files of a W8A16 artifact beside its weights: `quant_model_description.json` and `config.json`.

The format is msmodelslim's ascendV1, as found in its sources and in those of its readers, MindIE-LLM (ATB models, as of
April 2026) and vllm-ascend (as of August 2026). A quantized linear layer X has the tensors `X.weight` (int8),
`X.weight_scale` and `X.weight_offset` (both [rows, groups]); every other tensor keeps its name and dtype; the description
holds a type for every tensor.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from passes.architecture import Architecture
from passes.ascend.family import AscendFamily
from passes.ascend.w8a16 import W8A16
from passes.checkpoint import Checkpoint
from passes.tensor_pass import MadeTensor

__all__ = ["DESCRIPTION_NAME", "WEIGHTS_STEM", "artifact_config", "description"]

DESCRIPTION_NAME = "quant_model_description.json"
WEIGHTS_STEM = "quant_model_weight_w8a16"
_VERSION = "1.0.0"


def description(tensors: Iterable[MadeTensor], group_size: int) -> dict[str, Any]:
    """Content of `quant_model_description.json`.

    Args:
        tensors: all tensors of the artifact, in order.
        group_size: number of input channels that share a scale, 0 for one scale per row.
    """
    head: dict[str, Any] = {"model_quant_type": W8A16, "version": _VERSION}
    if group_size:
        head["group_size"] = group_size
    return head | {tensor.entry.name: tensor.kind for tensor in tensors}


def artifact_config(checkpoint: Checkpoint, architecture: Architecture, family: AscendFamily) -> dict[str, Any]:
    """Content of the artifact's config.json: the checkpoint's config with every default, and the keys that MindIE reads.

    MindIE reads the config by an older transformers and by classes of its own, whose defaults differ from the checkpoint's.
    Keys that transformers has renamed are written under both names. vllm-ascend needs no further keys.
    """
    config = _with_own_keys(architecture.config, checkpoint.config)
    text = config["text_config"]
    dtype = {"BF16": "bfloat16", "F16": "float16"}.get(checkpoint.main_dtype)
    if dtype not in family.dtypes:
        dtype = family.dtypes[0]
    for part in (config, text):
        part |= {"dtype": dtype, "torch_dtype": dtype, "quantize": W8A16.lower()}
        # The artifact always holds the LM head; if the config says that it is tied, MindIE looks for it under another name.
        part["tie_word_embeddings"] = False
    rope = dict(text.get("rope_parameters") or {})
    if "rope_theta" in rope:
        text["rope_theta"] = rope.pop("rope_theta")
        text["rope_scaling"] = _rope_scaling(rope)
    # MindIE chooses some families' chat template by this name.
    text["_name_or_path"] = text.get("_name_or_path") or ("mistral" if text["model_type"] == "mistral" else "")
    return config


def _rope_scaling(rope: dict[str, Any]) -> dict[str, Any] | None:
    """`rope_parameters` without `rope_theta`, as transformers 4 spells them in `rope_scaling`; None for plain RoPE."""
    kind = rope.pop("rope_type", "default")
    if kind == "default":  # with several positions for each token, or plain
        return {"rope_type": kind, **rope} if rope else None
    # MindIE reads linear scaling only from `type`, the older of the two keys.
    return {"type" if kind == "linear" else "rope_type": kind, **rope}


def _with_own_keys(completed: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """The completed config together with the keys that only the checkpoint's own file has."""
    merged = dict(completed)
    for key, value in own.items():
        if key not in merged:
            merged[key] = value
        elif isinstance(value, dict) and isinstance(merged[key], dict):
            merged[key] = _with_own_keys(merged[key], value)
    return merged
