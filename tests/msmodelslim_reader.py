"""msmodelslim's reader, for a process of its own: to import it changes pydantic for the whole process."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForImageTextToText


class OnHub(nn.Module):
    """A model under on-hub names, which are those of the artifact; its layers are the model's own."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.config, self.device, self.dtype = model.config, model.device, model.dtype
        inner = model.model
        if hasattr(inner, "visual"):
            self.visual, self.lm_head, self.model = inner.visual, model.lm_head, nn.Module()
            self.model.language_model = inner.language_model
            return
        self.language_model = nn.Module()
        self.language_model.model, self.language_model.lm_head = inner.language_model, model.lm_head
        self.multi_modal_projector = inner.multi_modal_projector
        if hasattr(inner, "vision_tower"):
            self.vision_tower = nn.Module()
            self.vision_tower.vision_model = inner.vision_tower
        else:
            self.vision_model = inner.vision_model


def logits_by_reader(source: Path, artifact: Path, inputs: dict[str, np.ndarray]) -> tuple[np.ndarray, list[str]]:
    """Let FakeQuantizeCalibrator replace the linear layers of a checkpoint's model by those of an artifact.

    Returns:
        The model's logits then, and the names of the layers that were replaced.
    """
    from msmodelslim.pytorch.llm_ptq.llm_ptq_tools import FakeQuantizeCalibrator

    torch.set_num_threads(1)
    model = AutoModelForImageTextToText.from_pretrained(source, dtype=torch.float32).eval()
    tensors = {}
    for file in artifact.glob("*.safetensors"):
        tensors |= load_file(file)
    description = json.loads((artifact / "quant_model_description.json").read_text())
    FakeQuantizeCalibrator(OnHub(model), None, "cpu", description, tensors)
    replaced = [name for name, part in model.named_modules() if type(part).__name__.startswith("FakeLinear")]
    with torch.no_grad():
        logits = model(**{name: torch.from_numpy(value) for name, value in inputs.items()}).logits
    return logits.numpy(), replaced
