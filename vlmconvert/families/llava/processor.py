"""Settings that LLaVA's processors need to count image tokens, and that older checkpoints lack."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

__all__ = ["complete_processor"]


def complete_processor(processor: Any, folder: Path) -> None:
    """Set on a processor, from the model's config, the settings that processor_config.json leaves out."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    path = folder / "processor_config.json"
    stored = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    for name, value in (
        ("patch_size", config.vision_config.patch_size),
        ("vision_feature_select_strategy", config.vision_feature_select_strategy),
        # CLIP has a token for the whole image before those of the patches.
        ("num_additional_image_tokens", int(config.vision_config.model_type.startswith("clip"))),
    ):
        if stored.get(name) is None:
            setattr(processor, name, value)
