"""Blocks of a CLIP or SigLIP vision tower as torch modules: transformers' own layers behind the ports of the families.

Every function returns a module on the meta device; `Block.weights` maps its parameters to the checkpoint's tensors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel
from transformers.activations import ACT2FN

from passes.compat.transformers import use_sdpa


class VisionEmbeddings(nn.Module):
    """Patch and position embeddings; CLIP's have the class embedding in front and are followed by a norm.

    Args:
        tower: transformers' vision tower.
        patches: number of patches of an image.
    """

    def __init__(self, tower: Any, patches: int) -> None:
        super().__init__()
        embeddings = tower.embeddings
        self.patch_embedding = embeddings.patch_embedding
        has_class = hasattr(embeddings, "class_embedding")
        self.class_embedding = embeddings.class_embedding if has_class else None
        self.position_embedding = nn.Embedding(patches + has_class, tower.config.hidden_size)
        self.pre_layrnorm = getattr(tower, "pre_layrnorm", None)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Hidden states [images, positions, width] of pixel values [images, channels, height, width]."""
        hidden_states = self.patch_embedding(pixel_values).flatten(2).transpose(1, 2)
        if self.class_embedding is not None:
            first = self.class_embedding.expand(hidden_states.shape[0], 1, hidden_states.shape[2])
            hidden_states = torch.cat((first, hidden_states), dim=1)
        hidden_states = hidden_states + self.position_embedding.weight
        return hidden_states if self.pre_layrnorm is None else self.pre_layrnorm(hidden_states)


class VisionLayer(nn.Module):
    """transformers' encoder layer; every position attends to all positions."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Hidden states [images, positions, width]."""
        return self.layer(hidden_states, attention_mask=None)


class SelectFeatures(nn.Module):
    """Concatenates the hidden states of the chosen layers; the strategy `default` drops the first position."""

    def __init__(self, strategy: str) -> None:
        super().__init__()
        self.first = {"default": 1, "full": 0}[strategy]

    def forward(self, *hidden_states: Tensor) -> Tensor:
        """Features [images, tokens, width * layers] of hidden states [images, positions, width]."""
        return torch.cat(hidden_states, dim=-1)[:, self.first :]


class Projector(nn.Module):
    """The two linear layers that project image features to the width of the language model."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        layers = config["vision_feature_layer"]
        count = len(layers) if isinstance(layers, list) else 1
        width, bias = config["text_config"]["hidden_size"], config["multimodal_projector_bias"]
        self.linear_1 = nn.Linear(config["vision_config"]["hidden_size"] * count, width, bias=bias)
        self.act = ACT2FN[config["projector_hidden_act"]]
        self.linear_2 = nn.Linear(width, width, bias=bias)

    def forward(self, image_features: Tensor) -> Tensor:
        """Projected features [images, tokens, width]."""
        return self.linear_2(self.act(self.linear_1(image_features)))


class SelectAndProject(Projector):
    """`SelectFeatures`, then `Projector`."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config)
        self.select = SelectFeatures(config["vision_feature_select_strategy"])

    def forward(self, *hidden_states: Tensor) -> Tensor:
        """Projected features [images, tokens, width]."""
        return super().forward(self.select(*hidden_states))


class VisionResampler(nn.Module):
    """LLaVA-NeXT-Video's pooling over the patch grid of each video frame."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__()
        mode, stride = config["spatial_pool_mode"], config["spatial_pool_stride"]
        width = config["vision_config"]["hidden_size"]
        pools = {
            "average": lambda: nn.AvgPool2d(stride),
            "max": lambda: nn.MaxPool2d(stride),
            "conv": lambda: nn.Conv2d(width, config.get("spatial_pool_out_channels", width), stride, stride),
        }
        self.pool = pools[mode]()

    def forward(self, video_hidden_states: Tensor) -> Tensor:
        """Pooled features [frames, tokens, width]."""
        frames, tokens, width = video_hidden_states.shape
        side = int(int(tokens) ** 0.5)
        grid = video_hidden_states.reshape(frames, side, side, width).permute(0, 3, 1, 2)
        return self.pool(grid).flatten(2).transpose(1, 2)


def _tower(config: dict[str, Any]) -> Any:
    """The vision tower with a single layer."""
    vision = dict(config["vision_config"])
    vision_config = AutoConfig.for_model(vision.pop("model_type"), **{**vision, "num_hidden_layers": 1})
    use_sdpa(vision_config)
    return AutoModel.from_config(vision_config)


def vision_embeddings(config: dict[str, Any]) -> nn.Module:
    """See `VisionEmbeddings`."""
    vision = config["vision_config"]
    with torch.device("meta"):
        return VisionEmbeddings(_tower(config), (vision["image_size"] // vision["patch_size"]) ** 2)


def vision_layer(config: dict[str, Any]) -> nn.Module:
    """See `VisionLayer`."""
    with torch.device("meta"):
        return VisionLayer(_tower(config).encoder.layers[0])


def select_features(config: dict[str, Any]) -> nn.Module:
    """See `SelectFeatures`."""
    return SelectFeatures(config["vision_feature_select_strategy"])


def select_and_project(config: dict[str, Any]) -> nn.Module:
    """See `SelectAndProject`."""
    with torch.device("meta"):
        return SelectAndProject(config)


def multi_modal_projector(config: dict[str, Any]) -> nn.Module:
    """See `Projector`."""
    with torch.device("meta"):
        return Projector(config)


def vision_resampler(config: dict[str, Any]) -> nn.Module:
    """See `VisionResampler`."""
    with torch.device("meta"):
        return VisionResampler(config)
