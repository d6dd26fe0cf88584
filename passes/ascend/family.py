"""How Ascend runtimes load and run a family of models; the family provides it, so that no pass depends on a family's name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

__all__ = ["AscendFamily", "CrossAttention", "VisionStack"]


@dataclass(frozen=True)
class VisionStack:
    """Transformer layers of a vision tower.

    Attributes:
        prefix: prefix of the layers' names, before their number.
        count: key of the vision config that holds the number of layers.
        output: name of the attention's output projection; the other projections are q_proj, k_proj and v_proj.
        model_types: `model_type`s of vision configs with such layers; empty for all.
        linears: names of the linear layers, if there are others than those of the attention and of an MLP with fc1 and fc2.
    """

    prefix: str
    count: str = "num_hidden_layers"
    output: str = "o_proj"
    model_types: tuple[str, ...] = ()
    linears: tuple[str, ...] = ()


@dataclass(frozen=True)
class CrossAttention:
    """Decoder layers that attend to the features of images, so that their cache does not grow with the text.

    Attributes:
        layers: key of the text config that holds the numbers of these layers.
        name: name of their attention module, in the names of tensors.
        positions: takes the config, and returns the maximum number of features of an image.
    """

    layers: str
    name: str
    positions: Callable[[dict[str, Any]], int]

    def numbers(self, text_config: dict[str, Any]) -> list[int]:
        """The numbers of the cross-attention layers among the decoder layers, from 0."""
        return list(text_config.get(self.layers) or ())


@dataclass(frozen=True)
class AscendFamily:
    """A family as MindIE-LLM's ATB models (as of April 2026) and vllm-ascend (as of August 2026) know it.

    Attributes:
        dtypes: dtypes in which MindIE computes; a checkpoint in another dtype, such as float32, is computed in the first.
        runtimes: runtimes that open artifacts of the family.
        image_key: key of the config under which MindIE looks for the image token.
        name_prefixes: prefixes of the tensors' names, one of which each name must have.
        vision_stacks: the layers of the vision tower.
        projector: names of the linear layers between vision tower and language model.
        notes: what a user should know about the runtimes, for the run plan.
        cross_attention: the decoder layers with cross-attention, if there are any.
        text_prefix: prefix of the language model's names.
        head: name of the LM head.
        names_text_model: whether MindIE chooses the chat template by `_name_or_path` of the text config.
        script: folder of MindIE's example that runs the family; empty if it has none.
        frames: number of frames of a video, an argument of that example's script; 0 if the script does not take it.
    """

    dtypes: tuple[str, ...]
    runtimes: tuple[Literal["mindie", "vllm-ascend"], ...]
    image_key: str
    name_prefixes: tuple[str, ...]
    vision_stacks: tuple[VisionStack, ...]
    projector: tuple[str, ...]
    notes: tuple[str, ...] = ()
    cross_attention: CrossAttention | None = None
    text_prefix: str = "language_model.model."
    head: str = "language_model.lm_head"
    names_text_model: bool = False
    script: str = ""
    frames: int = 0
