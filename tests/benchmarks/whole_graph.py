"""The way everybody else converts: the whole model in memory, one trace, one NNCF call.

It is the peer of the benchmarks, and the independent result that streamed compression is compared with.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nncf
import openvino as ov
import torch
from openvino import opset13
from openvino.frontend.pytorch import patch_model
from torch import nn
from transformers import MllamaForConditionalGeneration
from transformers.models.mllama.modeling_mllama import MllamaForConditionalGeneration as Model

from passes.base import Intermediate
from passes.export.make_stateful import MakeStatefulPass
from passes.graph_pass import Graph
from vlmconvert.families import load_family


class PlainCache:
    """The cache that transformers' layers use, over given tensors."""

    class Layer:
        """Keys and values of one layer."""

        is_initialized = True

        def __init__(self, keys: torch.Tensor, values: torch.Tensor) -> None:
            self.keys, self.values = keys, values

    def __init__(self, pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
        self.layers = [self.Layer(*pair) for pair in pairs]

    def update(self, keys: torch.Tensor, values: torch.Tensor, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Append to one layer."""
        layer = self.layers[index]
        layer.keys, layer.values = torch.cat((layer.keys, keys), 2), torch.cat((layer.values, values), 2)
        return layer.keys, layer.values


class WholeLanguageModel(nn.Module):
    """transformers' text model and LM head behind the inputs of our language model, its cache as plain tensors."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.text_model, self.lm_head = model.model.language_model, model.lm_head
        self.text_config = model.config.text_config

    def input_names(self) -> list[str]:
        """Names of forward's arguments."""
        names = ["input_ids", "attention_mask", "position_ids", "cross_attention_mask", "full_text_row_masked_out_mask"]
        for index in range(self.text_config.num_hidden_layers):
            prefix = "cross_attn_key_values" if index in self.text_config.cross_attention_layers else "past_key_values"
            names += [f"{prefix}.{index}.key", f"{prefix}.{index}.value"]
        return names

    def forward(self, input_ids, attention_mask, position_ids, cross_attention_mask, row_mask, *key_values):  # noqa: ANN
        total, sequence = attention_mask.shape[1], input_ids.shape[1]
        visible = torch.arange(total)[None, :] <= (torch.arange(sequence) + (total - sequence))[:, None]
        visible = visible[None, None] & attention_mask[:, None, None, :].bool()
        # A mask of four dimensions is taken as it is.
        mask = (~visible).float() * torch.finfo(torch.float16).min
        pairs = list(zip(key_values[::2], key_values[1::2], strict=True))
        cache = PlainCache(pairs)
        hidden_states = self.text_model(
            input_ids=input_ids,
            attention_mask=mask,
            position_ids=position_ids,
            cross_attention_mask=cross_attention_mask,
            full_text_row_masked_out_mask=row_mask,
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state
        present = [
            part
            for index, layer in enumerate(cache.layers)
            if index not in self.text_config.cross_attention_layers
            for part in (layer.keys, layer.values)
        ]
        return self.lm_head(hidden_states), *present


class WholeVisionEncoder(nn.Module):
    """transformers' vision model, projector and cross-attention projections."""

    def __init__(self, model: Model) -> None:
        super().__init__()
        self.model = model.model
        self.layers = model.config.text_config.cross_attention_layers

    def forward(self, pixel_values, aspect_ratio_ids, aspect_ratio_mask):  # noqa: ANN
        states = self.model.vision_model(pixel_values, aspect_ratio_ids, aspect_ratio_mask).last_hidden_state
        states = self.model.multi_modal_projector(states).reshape(-1, states.shape[-2], self.model.hidden_size)
        outputs = [states]
        for index in self.layers:
            attention = self.model.language_model.layers[index].cross_attn
            shape = (pixel_values.shape[0], -1, attention.num_key_value_heads, attention.head_dim)
            outputs.append(attention.k_norm(attention.k_proj(states).view(shape).transpose(1, 2)))
            outputs.append(attention.v_proj(states).view(shape).transpose(1, 2))
        return tuple(outputs)


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Model:
    """The checkpoint; in bfloat16 its weights stay 16 bit and it computes in float32, as optimum-intel does it."""
    model = MllamaForConditionalGeneration.from_pretrained(folder, dtype=dtype).eval()
    if dtype != torch.float32:
        patch_model.__make_16bit_traceable(model)
    return model


def language_model(model: Model) -> ov.Model:
    """One trace of the whole language model, stateless, every length dynamic."""
    whole = WholeLanguageModel(model)
    text = model.config.text_config
    head_dim = text.hidden_size // text.num_attention_heads
    batch, sequence, past, vision = 2, 3, 4, 5
    examples: list[torch.Tensor] = [
        torch.zeros(batch, sequence, dtype=torch.long),
        torch.ones(batch, past + sequence, dtype=torch.long),
        torch.zeros(batch, sequence, dtype=torch.long),
        torch.zeros(batch, 1, sequence, vision),
        torch.ones(batch, 1, sequence, 1),
    ]
    for index in range(text.num_hidden_layers):
        length = vision if index in text.cross_attention_layers else past
        examples += [torch.zeros(batch, text.num_key_value_heads, length, head_dim)] * 2
    with torch.no_grad():
        converted = ov.convert_model(
            torch.jit.trace(whole, tuple(examples), check_trace=False), example_input=tuple(examples)
        )
    for port, name, example in zip(converted.inputs, whole.input_names(), examples, strict=True):
        port.get_tensor().set_names({name})
        port.get_node().set_friendly_name(name)
        shape = [
            -1 if axis == 0 or (axis >= example.ndim - 2 and example.ndim < 4) else size
            for axis, size in enumerate(example.shape)
        ]
        if example.ndim == 4:
            shape[2] = -1
            if name == "cross_attention_mask":
                shape[3] = -1
        port.get_node().set_partial_shape(ov.PartialShape(shape))
    converted.outputs[0].get_tensor().set_names({"logits"})
    converted.validate_nodes_and_infer_types()
    return converted


def stateful_language_model(model: Model) -> ov.Model:
    """The same with its cache as state, by OpenVINO's own transformation, as optimum-intel does it."""
    converted = language_model(model)
    text = model.config.text_config
    names = [
        f"present.{index}.{part}"
        for index in range(text.num_hidden_layers)
        if index not in text.cross_attention_layers
        for part in ("key", "value")
    ]
    for port, name in zip(converted.outputs[1:], names, strict=True):
        port.get_tensor().set_names({name})
    component = load_family("mllama").components(model.config.to_dict())[-1]
    exact = model.dtype == torch.float32
    graph = Graph(component, "", Intermediate(), lambda: (converted, {}), exact, ())
    return graph.followed_by(MakeStatefulPass()).build()[0]


def slice_lm_head(model: ov.Model) -> ov.Model:
    """Let a language model compute the logits of the last position alone, in place."""
    node = model.output("logits").get_node()
    while node.get_type_name() != "MatMul":
        node = node.input_value(0).get_node()
    last = opset13.gather(node.input_value(0), opset13.constant([-1], ov.Type.i64), opset13.constant(1, ov.Type.i64))
    node.input(0).replace_source_output(last.output(0))
    model.validate_nodes_and_infer_types()
    return model


def vision_encoder(model: Model) -> ov.Model:
    """One trace of the whole vision encoder."""
    vision = model.config.vision_config
    shape = (1, 1, vision.max_num_tiles)
    examples = (
        torch.zeros(*shape, vision.num_channels, vision.image_size, vision.image_size),
        torch.ones(shape[:2], dtype=torch.long),
        torch.ones(shape, dtype=torch.long),
    )
    with torch.no_grad():
        return ov.convert_model(
            torch.jit.trace(WholeVisionEncoder(model), examples, check_trace=False), example_input=examples
        )


def compress_int4_awq(model: ov.Model, samples: list[Any], read: Any, ratio: float = 1.0) -> ov.Model:
    """What the streamed pass does block by block, in one call of NNCF."""
    return nncf.compress_weights(
        model,
        mode=nncf.CompressWeightsMode.INT4_ASYM,
        group_size=64,
        ratio=ratio,
        all_layers=False,
        awq=True,
        scale_estimation=True,
        dataset=nncf.Dataset(samples, read),
        subset_size=len(samples),
    )
