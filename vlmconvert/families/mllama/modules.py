"""mllama's blocks as torch modules: transformers' own layers behind the ports that the family declares.

Every function returns a module on the meta device; `Block.weights` maps its parameters to the checkpoint's tensors.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.mllama import modeling_mllama
from transformers.models.mllama.configuration_mllama import MllamaTextConfig, MllamaVisionConfig

from passes.compat.transformers import LayerCache, use_sdpa
from vlmconvert.families.parts.decoder_modules import MASKED, LmHead, Positions


def _text_config(config: dict[str, Any]) -> MllamaTextConfig:
    text = MllamaTextConfig.from_dict(config["text_config"])
    use_sdpa(text)
    return text


def _vision_config(config: dict[str, Any]) -> MllamaVisionConfig:
    vision = MllamaVisionConfig.from_dict(config["vision_config"])
    use_sdpa(vision)
    return vision


class VisionEmbeddings(nn.Module):
    """Patch, tile, class and position embeddings, and the attention mask that hides padding tiles and patches."""

    def __init__(self, config: MllamaVisionConfig) -> None:
        super().__init__()
        self.config = config
        self.num_patches = (config.image_size // config.patch_size) ** 2 + 1
        self.padding = -self.num_patches % 8
        self.class_embedding = nn.Parameter(torch.empty(config.hidden_size))
        self.patch_embedding = nn.Conv2d(
            config.num_channels, config.hidden_size, config.patch_size, config.patch_size, bias=False
        )
        self.gated_positional_embedding = modeling_mllama.MllamaPrecomputedPositionEmbedding(config)
        self.pre_tile_positional_embedding = modeling_mllama.MllamaPrecomputedAspectRatioEmbedding(config)
        self.layernorm_pre = nn.LayerNorm(config.hidden_size)

    def forward(
        self, pixel_values: Tensor, aspect_ratio_ids: Tensor, aspect_ratio_mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        config = self.config
        tiles, width = config.max_num_tiles, config.hidden_size
        pixels = pixel_values.reshape(-1, config.num_channels, config.image_size, config.image_size)
        hidden_states = self.patch_embedding(pixels).flatten(2).transpose(1, 2)
        aspect_ratio_ids = aspect_ratio_ids.reshape(-1, 1)
        hidden_states = hidden_states.reshape(-1, tiles, self.num_patches - 1, width)
        hidden_states = self.pre_tile_positional_embedding(hidden_states, aspect_ratio_ids)
        class_embedding = self.class_embedding.expand(hidden_states.shape[0], tiles, 1, width)
        hidden_states = torch.cat((class_embedding, hidden_states), dim=2)
        hidden_states = self.layernorm_pre(self.gated_positional_embedding(hidden_states, aspect_ratio_ids))
        hidden_states = F.pad(hidden_states, (0, 0, 0, self.padding))
        tile_mask = aspect_ratio_mask.reshape(-1, tiles, 1).to(hidden_states.dtype)
        patch_mask = (torch.arange(self.num_patches + self.padding) < self.num_patches).to(hidden_states.dtype)
        hidden = 1 - (tile_mask * patch_mask).reshape(-1, tiles * (self.num_patches + self.padding), 1)
        # As in transformers, only the attention of padding to padding is masked.
        attention_mask = (hidden @ hidden.transpose(1, 2) * MASKED).unsqueeze(1)
        return hidden_states.reshape(-1, tiles * (self.num_patches + self.padding), width), attention_mask


class VisionGlobalEmbeddings(nn.Module):
    """The norm after the local layers, and the tile embedding before the global layers."""

    def __init__(self, config: MllamaVisionConfig) -> None:
        super().__init__()
        self.config = config
        self.layernorm_post = nn.LayerNorm(config.hidden_size)
        self.post_tile_positional_embedding = modeling_mllama.MllamaPrecomputedAspectRatioEmbedding(config)

    def forward(self, hidden_states: Tensor, aspect_ratio_ids: Tensor) -> Tensor:
        tiles, width = self.config.max_num_tiles, self.config.hidden_size
        positions = hidden_states.shape[1]
        hidden_states = self.layernorm_post(hidden_states).reshape(-1, tiles, positions // tiles, width)
        hidden_states = self.post_tile_positional_embedding(hidden_states, aspect_ratio_ids.reshape(-1, 1))
        return hidden_states.reshape(-1, positions, width)


class MultiModalProjector(nn.Linear):
    """Projects the last and the intermediate hidden states, without padding, to the width of the language model."""

    def __init__(self, config: MllamaVisionConfig, width: int) -> None:
        super().__init__(config.vision_output_dim, width)
        self.config = config
        self.num_patches = (config.image_size // config.patch_size) ** 2 + 1

    def forward(self, hidden_states: Tensor, *intermediate: Tensor) -> Tensor:
        tiles, width = self.config.max_num_tiles, self.config.hidden_size
        padded = self.num_patches + -self.num_patches % 8

        def unpadded(states: Tensor, width: int) -> Tensor:
            return states.reshape(-1, padded, width)[:, : self.num_patches]

        stacked = torch.stack(intermediate, dim=-1).reshape(-1, tiles * padded, width * len(intermediate))
        states = torch.cat((unpadded(hidden_states, width), unpadded(stacked, width * len(intermediate))), dim=-1)
        return super().forward(states)


class CrossAttentionKeyValue(nn.Module):
    """Computes the keys and values of one cross-attention layer, for its key-value heads."""

    def __init__(self, config: MllamaTextConfig) -> None:
        super().__init__()
        self.heads = config.num_key_value_heads
        self.head_dim = config.hidden_size // config.num_attention_heads
        self.k_proj = nn.Linear(config.hidden_size, self.heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, self.heads * self.head_dim, bias=False)
        self.k_norm = modeling_mllama.MllamaTextRMSNorm(self.head_dim, config.rms_norm_eps)

    def forward(self, cross_attention_states: Tensor, aspect_ratio_ids: Tensor) -> tuple[Tensor, Tensor]:
        shape = (aspect_ratio_ids.shape[0], -1, self.heads, self.head_dim)
        key = self.k_norm(self.k_proj(cross_attention_states).reshape(shape).transpose(1, 2))
        return key, self.v_proj(cross_attention_states).reshape(shape).transpose(1, 2)


class TextEmbeddings(nn.Module):
    """Token embeddings."""

    def __init__(self, config: MllamaTextConfig) -> None:
        super().__init__()
        # The embedding table has eight rows more than the vocabulary; one of them is the image token's.
        self.embed_tokens = nn.Embedding(config.vocab_size + 8, config.hidden_size)

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.embed_tokens(input_ids)


class SelfAttentionLayer(modeling_mllama.MllamaSelfAttentionDecoderLayer):
    """transformers' decoder layer with the cache as plain tensors."""

    def forward(
        self, hidden_states: Tensor, causal_mask: Tensor, cos: Tensor, sin: Tensor, past_key: Tensor, past_value: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        cache = LayerCache(past_key, past_value)
        hidden_states = super().forward(
            hidden_states, attention_mask=causal_mask, position_embeddings=(cos, sin), past_key_values=cache
        )
        return hidden_states, cache.keys, cache.values


class CrossAttentionLayer(modeling_mllama.MllamaCrossAttentionDecoderLayer):
    """transformers' cross-attention layer, which takes the keys and values that the vision encoder has computed."""

    def __init__(self, config: MllamaTextConfig) -> None:
        super().__init__(config, layer_idx=0)
        del self.cross_attn.k_proj, self.cross_attn.v_proj, self.cross_attn.k_norm

    def forward(
        self,
        hidden_states: Tensor,
        cross_attention_mask: Tensor,
        full_text_row_masked_out_mask: Tensor,
        key: Tensor,
        value: Tensor,
    ) -> Tensor:
        return super().forward(
            hidden_states,
            cross_attention_states=None,
            cross_attention_mask=cross_attention_mask,
            attention_mask=None,
            full_text_row_masked_out_mask=full_text_row_masked_out_mask,
            past_key_values=LayerCache(key, value),
        )


def vision_embeddings(config: dict[str, Any]) -> nn.Module:
    with torch.device("meta"):
        return VisionEmbeddings(_vision_config(config))


def vision_layer(config: dict[str, Any], is_gated: bool) -> nn.Module:
    with torch.device("meta"):
        return modeling_mllama.MllamaVisionEncoderLayer(_vision_config(config), is_gated)


def vision_global_embeddings(config: dict[str, Any]) -> nn.Module:
    with torch.device("meta"):
        return VisionGlobalEmbeddings(_vision_config(config))


def multi_modal_projector(config: dict[str, Any]) -> nn.Module:
    with torch.device("meta"):
        return MultiModalProjector(_vision_config(config), config["text_config"]["hidden_size"])


def cross_attention_key_value(config: dict[str, Any]) -> nn.Module:
    with torch.device("meta"):
        return CrossAttentionKeyValue(_text_config(config))


def text_embeddings(config: dict[str, Any]) -> nn.Module:
    with torch.device("meta"):
        return TextEmbeddings(_text_config(config))


def positions(config: dict[str, Any]) -> nn.Module:
    # The module has no parameters, but its frequencies must have values, so it is made outside the meta device.
    return Positions(modeling_mllama.MllamaRotaryEmbedding(_text_config(config)))


def self_attention_layer(config: dict[str, Any]) -> nn.Module:
    with torch.device("meta"):
        return SelfAttentionLayer(_text_config(config), layer_idx=0)


def cross_attention_layer(config: dict[str, Any]) -> nn.Module:
    with torch.device("meta"):
        return CrossAttentionLayer(_text_config(config))


def lm_head(config: dict[str, Any]) -> nn.Module:
    with torch.device("meta"):
        text = _text_config(config)
        return LmHead(
            modeling_mllama.MllamaTextRMSNorm(text.hidden_size, text.rms_norm_eps), text.hidden_size, text.vocab_size
        )
