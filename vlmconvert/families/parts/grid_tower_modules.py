"""Blocks of vision towers that take grids of any size, as torch modules: the layers of Qwen-VL's towers with explicit masks.

Every function returns a module on the meta device; `Block.weights` maps its parameters to the checkpoint's tensors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel

from passes.compat.transformers import sdpa, use_sdpa
from vlmconvert.families.parts.decoder_modules import additive_mask, positions


class PatchEmbeddings(nn.Module):
    """The embedding of each patch: a convolution as large as a patch."""

    def __init__(self, patch_embed: nn.Module) -> None:
        super().__init__()
        self.patch_embed = patch_embed

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Embeddings [patches, width] of pixel values [patches, channels * time * height * width]."""
        return self.patch_embed(pixel_values)


class GridPositions(nn.Module):
    """The rotary position embedding of the patches, which are first put in the order of their windows if there are any.

    Args:
        unit: number of patches that become one feature.
    """

    def __init__(self, unit: int) -> None:
        super().__init__()
        self.unit = unit

    def forward(
        self, patch_embeds: Tensor, rotary_pos_emb: Tensor, window_index: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states [1, patches, width], and cosine and sine [patches, head_dim].

        Args:
            patch_embeds: [patches, width].
            rotary_pos_emb: angles [patches, head_dim / 2].
            window_index: see `vlmconvert.families.parts.grids.window_index`.
        """
        hidden_states, angles = patch_embeds, torch.cat((rotary_pos_emb, rotary_pos_emb), dim=-1)
        if window_index is not None:
            hidden_states, angles = (
                value.reshape(-1, self.unit, value.shape[1])[window_index].reshape(-1, value.shape[1])
                for value in (hidden_states, angles)
            )
        return hidden_states[None], angles.cos(), angles.sin()


class GridLayer(nn.Module):
    """transformers' block of a tower over grids; the mask says which patches attend to each other."""

    def __init__(self, layer: Any) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, hidden_states: Tensor, vision_attention_mask: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Hidden states [1, patches, width].

        Args:
            hidden_states: [1, patches, width].
            vision_attention_mask: added to the scores, [1, patches, patches].
            cos: [patches, head_dim].
            sin: [patches, head_dim].
        """
        attention = self.layer.attn
        patches = hidden_states.shape[1]
        joined = attention.qkv(self.layer.norm1(hidden_states))
        parts = joined.reshape(1, patches, 3, attention.num_heads, -1).permute(2, 0, 3, 1, 4)
        query, key = (part * cos + _half_turned(part) * sin for part in (parts[0], parts[1]))
        attended = sdpa(attention, query, key, parts[2], vision_attention_mask[:, None], attention.scaling)
        hidden_states = hidden_states + attention.proj(attended.reshape(1, patches, -1))
        return hidden_states + self.layer.mlp(self.layer.norm2(hidden_states))


def _half_turned(values: Tensor) -> Tensor:
    half = values.shape[-1] // 2
    return torch.cat((-values[..., half:], values[..., :half]), dim=-1)


class GridMerger(nn.Module):
    """transformers' merger: squares of patches become features, which leave the order of the windows if there are any."""

    def __init__(self, merger: nn.Module) -> None:
        super().__init__()
        self.merger = merger

    def forward(self, hidden_states: Tensor, window_index: Tensor | None = None) -> Tensor:
        """Features [features, width of the language model] of hidden states [1, patches, width]."""
        features = self.merger(hidden_states[0])
        return features if window_index is None else features[torch.argsort(window_index)]


class AxisPositions(nn.Module):
    """The causal mask, and the rotary position embedding of tokens with several positions: each frequency turns with one.

    Args:
        rotary_emb: transformers' rotary embedding of the model, without its choice of axes.
        axes: for each frequency, the axis of the positions that it turns with.
        sliding_window: number of positions that a token attends to, itself included; None for all positions.
    """

    def __init__(self, rotary_emb: Any, axes: list[int], sliding_window: int | None) -> None:
        super().__init__()
        self.sliding_window = sliding_window
        self.scaling = rotary_emb.attention_scaling
        chosen = nn.functional.one_hot(torch.tensor(axes), 3).T.float()
        self.frequencies = nn.Buffer(chosen * rotary_emb.inv_freq.float(), persistent=False)

    def forward(self, attention_mask: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Additive mask [batch, 1, sequence, total] of 0 and -65504; cosine and sine [batch, sequence, head_dim].

        Args:
            attention_mask: [batch, total].
            position_ids: [3, batch, sequence].
        """
        mask = additive_mask(attention_mask, position_ids.shape[-1], self.sliding_window)
        # Only one axis counts for each frequency, so that the sum is exact.
        angles = (position_ids[..., None].float() * self.frequencies[:, None, None]).sum(0)
        angles = torch.cat((angles, angles), dim=-1)
        return mask, angles.cos() * self.scaling, angles.sin() * self.scaling


def _tower(config: dict[str, Any]) -> Any:
    """The vision tower with a single layer; some towers can be made with their whole model only."""
    values = {**config, "vision_config": {**config["vision_config"], "depth": 1}}
    whole = AutoConfig.for_model(values.pop("model_type"), **values)
    use_sdpa(whole.vision_config)
    whole.text_config.num_hidden_layers = 1
    return AutoModel.from_config(whole, dtype=torch.float32).visual


def patch_embeddings(config: dict[str, Any]) -> nn.Module:
    """See `PatchEmbeddings`."""
    with torch.device("meta"):
        return PatchEmbeddings(_tower(config).patch_embed)


def grid_positions(config: dict[str, Any]) -> nn.Module:
    """See `GridPositions`."""
    return GridPositions(config["vision_config"]["spatial_merge_size"] ** 2)


def grid_layer(config: dict[str, Any]) -> nn.Module:
    """See `GridLayer`."""
    with torch.device("meta"):
        return GridLayer(_tower(config).blocks[0])


def grid_merger(config: dict[str, Any]) -> nn.Module:
    """See `GridMerger`."""
    with torch.device("meta"):
        return GridMerger(_tower(config).merger)


def axis_positions(
    config: dict[str, Any], layer_type: str, sliding_window: int | None, interleaved: bool = False
) -> nn.Module:
    """See `AxisPositions` and `frequency_axes`."""
    rotary_emb: Any = positions(config, layer_type, sliding_window).rotary_emb
    axes = frequency_axes(rotary_emb.mrope_section, len(rotary_emb.inv_freq), interleaved)
    return AxisPositions(rotary_emb, axes, sliding_window)


def frequency_axes(sections: list[int], count: int, interleaved: bool) -> list[int]:
    """For each frequency, whether it turns with time (0), height (1) or width (2).

    Args:
        sections: number of frequencies of each axis.
        count: number of frequencies.
        interleaved: whether the axes take turns; the frequencies that are left over turn with time.
    """
    if not interleaved:
        return [axis % 3 for axis, size in enumerate(sections) for _ in range(size)]
    return [number % 3 if number < 3 * sections[number % 3] else 0 for number in range(count)]
