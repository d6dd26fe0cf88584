"""What Ascend runtimes make of a family of models, so that no pass has to know the family by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["AscendFamily", "VisionStack"]


@dataclass(frozen=True)
class VisionStack:
    """Transformer layers of a vision tower.

    Attributes:
        prefix: of the layers' names, before their number.
        count: key of the vision config that holds how many there are.
        output: the attention's last projection; those before it are q_proj, k_proj and v_proj.
        model_types: vision towers, by their config's model_type, that are built so; all if empty.
    """

    prefix: str
    count: str = "num_hidden_layers"
    output: str = "o_proj"
    model_types: tuple[str, ...] = ()


@dataclass(frozen=True)
class AscendFamily:
    """A family as MindIE-LLM's ATB models (as of April 2026) and vllm-ascend (as of August 2026) know it.

    Attributes:
        script: folder of MindIE's example that runs it.
        frames: of a video, an argument of that example's script; 0 if it takes none.
        dtypes: what MindIE computes it in; a checkpoint of another dtype, such as float32, is computed in the first.
        runtimes: those that open it.
        notes: what a person should know of the runtimes, for the run plan.
        name_prefixes: beginnings of its tensors' names.
        vision_stacks: its vision tower's layers.
        projector: the linear layers between vision tower and language model.
        names_text_model: whether MindIE chooses its chat template by `_name_or_path` of the text config.
    """

    script: str
    frames: int
    dtypes: tuple[str, ...]
    runtimes: tuple[Literal["mindie", "vllm-ascend"], ...]
    name_prefixes: tuple[str, ...]
    vision_stacks: tuple[VisionStack, ...]
    projector: tuple[str, ...]
    notes: tuple[str, ...] = ()
    names_text_model: bool = False
