"""Tensors of a checkpoint that the model of its config does not have: what they tell about the checkpoint."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

from manifests.errors import BadInputError

__all__ = ["refuse_adapters"]

_CONFIG = "adapter_config.json"
# Parts of the names under which PEFT's methods keep their weights beside those of the base model.
_ADAPTER = re.compile(
    r"(?:^|\.)(?:lora_\w+|base_layer|base_model|modules_to_save|original_module|ia3_l|prompt_encoder|prompt_embeddings|"
    r"prefix_encoder|adaption_\w+|token_adapter|trainable_tokens_\w+|(?:hada|lokr|oft|boft|vera|vblora|randlora|road|bone|fourierft|"
    r"c3a|shira|miss|hra)_\w+)(?:\.|$)"
)
# Parts of the names that GPTQ, AWQ, bitsandbytes, compressed-tensors and FP8 checkpoints have beside, or in place of, weights.
_QUANTIZED = re.compile(
    r"(?:^|\.)(?:qweight|qzeros|scales|g_idx|SCB|weight_format|(?:nested_)?absmax|(?:nested_)?quant_map|quant_state\w*|"
    r"weight_(?:scale|zero_point|offset|packed|shape|g_idx)\w*|(?:input|output|activation|k|v)_scale\w*)(?:\.|$)"
)


def refuse_adapters(folder: Path, names: Iterable[str]) -> None:
    """Refuse a checkpoint that holds more than a model: adapters that are not merged, or what quantization has left.

    Args:
        folder: the checkpoint.
        names: names of the tensors that the model of its config does not have.

    Raises:
        BadInputError: with the name of the tensor or the file.
    """
    leave = "or leave them out with --ignore-unused"
    if (folder / _CONFIG).exists():
        raise BadInputError(
            f"{folder / _CONFIG} describes an adapter, which would be left out: merge it first (merge_and_unload), and convert the "
            f"result, {leave.replace('them', 'it')}"
        )
    for name in names:
        if _ADAPTER.search(name):
            raise BadInputError(
                f"{folder} holds adapter weights that are not merged ({name}): merge them first (merge_and_unload), and convert the "
                f"result, {leave}"
            )
        if _QUANTIZED.search(name):
            raise BadInputError(
                f"{folder} holds what a quantization has left ({name}), so its weights may be quantized: give the float checkpoint, "
                f"{leave}"
            )
