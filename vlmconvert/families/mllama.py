"""mllama (Llama 3.2 Vision): how its checkpoint splits, and what its two graphs take and return.

The vision encoder returns the keys and values of every cross-attention layer, before `repeat_kv`; so the language model
holds no cross-attention k/v projection, and its state is the self-attention cache alone.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from manifests.model import Port
from passes.export.ascend_family import AscendFamily, VisionStack
from passes.split import Block, Component, Kind
from vlmconvert.families.mllama_inputs import inputs, next_inputs
from vlmconvert.families.ports import float_port, int_port, kinds_by_name, renamed

if TYPE_CHECKING:
    from passes.validate.protocol import Model

__all__ = [
    "ARCHITECTURE",
    "ASCEND",
    "CONFIG_TENSORS",
    "PROCESSOR_FILES",
    "PROCESSOR_OUTPUTS",
    "TOKENIZER_GRAPHS",
    "calibration_sizes",
    "components",
    "image_tokens",
    "inputs",
    "next_inputs",
    "reference",
]

ARCHITECTURE = "MllamaForConditionalGeneration"
# Alternatives in the order of preference; one of each must be there.
PROCESSOR_FILES = (
    ("preprocessor_config.json", "processor_config.json"),
    ("tokenizer.json",),
    ("tokenizer_config.json",),
)
PROCESSOR_OUTPUTS = (
    "input_ids",
    "attention_mask",
    "cross_attention_mask",
    "pixel_values",
    "aspect_ratio_ids",
    "aspect_ratio_mask",
)
# Entries of the config -> the tensors that runtimes expect there.
CONFIG_TENSORS: dict[str, str] = {}
# Whether OpenVINO's runtimes expect the tokenizer as graphs.
TOKENIZER_GRAPHS = False
# What Ascend runtimes make of it.
ASCEND = AscendFamily(
    script="mllama",
    frames=0,
    dtypes=("bfloat16",),
    runtimes=("mindie",),
    notes=(
        "mindie: it loads these weights, and its own table of models lists mllama in bfloat16 only",
        "vllm-ascend: vLLM has dropped mllama (vllm-project/vllm#24907)",
    ),
    name_prefixes=("vision_model.", "multi_modal_projector.", "language_model.model.", "language_model.lm_head."),
    vision_stacks=(
        VisionStack("vision_model.transformer.layers"),
        VisionStack("vision_model.global_transformer.layers", "num_global_layers"),
    ),
    projector=("multi_modal_projector",),
)
_MODULES = "vlmconvert.families.mllama_modules"


def components(config: dict[str, Any]) -> tuple[Component, ...]:
    """The vision encoder and the language model that a config (as transformers completes it) implies."""
    return (_vision_encoder(config), _language_model(config))


def _vision_encoder(config: dict[str, Any]) -> Component:
    vision, text = config["vision_config"], config["text_config"]
    tiles, size, channels = vision["max_num_tiles"], vision["image_size"], vision["num_channels"]
    intermediate: list[int] = vision["intermediate_layers_indices"]
    width = vision["hidden_size"]
    hidden_states = float_port("hidden_states", "images", "positions", width)
    mask = float_port("attention_mask", "images", 1, "positions", "positions")
    states = float_port("cross_attention_states", "tiles", "patches", text["hidden_size"])
    pixel_values = float_port("pixel_values", "batch", "num_images", tiles, channels, size, size)
    aspect_ratio_ids = int_port("aspect_ratio_ids", "batch", "num_images")
    aspect_ratio_mask = int_port("aspect_ratio_mask", "batch", "num_images", tiles)
    kinds = kinds_by_name(
        Kind(
            "vision_embeddings",
            f"{_MODULES}:vision_embeddings",
            (pixel_values, aspect_ratio_ids, aspect_ratio_mask),
            (hidden_states, mask),
            {"batch": 2, "num_images": 3},
        ),
        *(
            Kind(name, f"{_MODULES}:vision_layer", (hidden_states, mask), (hidden_states,), dims, {"is_gated": gated})
            for name, gated, dims in (
                ("vision_layer", False, {"images": 2, "positions": 24}),
                ("vision_global_layer", True, {"images": 2, "positions": 24}),
            )
        ),
        Kind(
            "vision_global_embeddings",
            f"{_MODULES}:vision_global_embeddings",
            (hidden_states, aspect_ratio_ids),
            (hidden_states,),
            {"images": 6, "positions": tiles * _padded_patches(vision), "batch": 2, "num_images": 3},
        ),
        Kind(
            "multi_modal_projector",
            f"{_MODULES}:multi_modal_projector",
            (hidden_states, *(renamed(hidden_states, f"intermediate.{index}") for index in intermediate)),
            (states,),
            {"images": 6, "positions": tiles * _padded_patches(vision)},
        ),
        Kind(
            "cross_attention_key_value",
            f"{_MODULES}:cross_attention_key_value",
            (states, aspect_ratio_ids),
            (_cross_key_value("key", text), _cross_key_value("value", text)),
            {"tiles": 6, "patches": 5, "batch": 2, "num_images": 3},
        ),
    )

    def parameters(prefix: str, *names: str) -> dict[str, str]:
        return {name: f"{prefix}{name}" for name in names}

    vision_prefix = "model.vision_model."
    blocks = [
        Block(
            "embeddings",
            "vision_embeddings",
            parameters(
                vision_prefix,
                "class_embedding",
                "patch_embedding.weight",
                "gated_positional_embedding.gate",
                "gated_positional_embedding.embedding",
                "gated_positional_embedding.tile_embedding.weight",
                "pre_tile_positional_embedding.gate",
                "pre_tile_positional_embedding.embedding.weight",
                "layernorm_pre.weight",
                "layernorm_pre.bias",
            ),
            {
                "pixel_values": "pixel_values",
                "aspect_ratio_ids": "aspect_ratio_ids",
                "aspect_ratio_mask": "aspect_ratio_mask",
            },
            {"hidden_states": "hidden_states", "attention_mask": "attention_mask"},
            role="embeddings",
        )
    ]
    layer_parameters = (
        *(f"self_attn.{name}_proj.weight" for name in "qkvo"),
        *(f"{name}.{part}" for name in ("mlp.fc1", "mlp.fc2") for part in ("weight", "bias")),
        *(f"{name}.{part}" for name in ("input_layernorm", "post_attention_layernorm") for part in ("weight", "bias")),
    )
    for stack, count, kind, gates in (
        ("transformer", vision["num_hidden_layers"], "vision_layer", ()),
        ("global_transformer", vision["num_global_layers"], "vision_global_layer", ("gate_attn", "gate_ffn")),
    ):
        for index in range(count):
            outputs = {"hidden_states": "hidden_states"}
            block_name = f"{stack}.layers.{index}"
            if stack == "transformer" and index in intermediate:
                outputs = {"hidden_states": f"intermediate.{index}"}
            source = "hidden_states"
            if stack == "transformer" and index - 1 in intermediate:
                source = f"intermediate.{index - 1}"
            blocks.append(
                Block(
                    block_name,
                    kind,
                    parameters(f"{vision_prefix}{block_name}.", *layer_parameters, *gates),
                    {"hidden_states": source, "attention_mask": "attention_mask"},
                    outputs,
                )
            )
        if stack == "transformer":
            last = f"intermediate.{count - 1}" if count - 1 in intermediate else "hidden_states"
            blocks.append(
                Block(
                    "global_embeddings",
                    "vision_global_embeddings",
                    parameters(
                        vision_prefix,
                        "layernorm_post.weight",
                        "layernorm_post.bias",
                        "post_tile_positional_embedding.gate",
                        "post_tile_positional_embedding.embedding.weight",
                    ),
                    {"hidden_states": last, "aspect_ratio_ids": "aspect_ratio_ids"},
                    {"hidden_states": "hidden_states"},
                    role="embeddings",
                )
            )
    blocks.append(
        Block(
            "multi_modal_projector",
            "multi_modal_projector",
            parameters("model.multi_modal_projector.", "weight", "bias"),
            {"hidden_states": "hidden_states", **{f"intermediate.{i}": f"intermediate.{i}" for i in intermediate}},
            {"cross_attention_states": "cross_attention_states"},
        )
    )
    for index in text["cross_attention_layers"]:
        blocks.append(
            Block(
                f"cross_attention.{index}",
                "cross_attention_key_value",
                parameters(
                    f"model.language_model.layers.{index}.cross_attn.",
                    "k_proj.weight",
                    "v_proj.weight",
                    "k_norm.weight",
                ),
                {"cross_attention_states": "cross_attention_states", "aspect_ratio_ids": "aspect_ratio_ids"},
                {part: f"cross_attn_key_values.{index}.{part}" for part in ("key", "value")},
            )
        )
    return Component(
        name="vision_encoder",
        side="vision",
        role="vision encoder with the cross-attention keys and values",
        stems={"openvino": "openvino_vision_encoder", "onnx": "vision_encoder"},
        kinds=kinds,
        blocks=tuple(blocks),
        inputs=(pixel_values, aspect_ratio_ids, aspect_ratio_mask),
        outputs=(states, *_cross_key_values(text)),
    )


def _language_model(config: dict[str, Any]) -> Component:
    text = config["text_config"]
    heads, width = text["num_key_value_heads"], text["hidden_size"]
    head_dim = width // text["num_attention_heads"]
    input_ids = int_port("input_ids", "batch", "sequence")
    attention_mask = int_port("attention_mask", "batch", "total_sequence")
    position_ids = int_port("position_ids", "batch", "sequence")
    hidden_states = float_port("hidden_states", "batch", "sequence", width)
    causal_mask = float_port("causal_mask", "batch", 1, "sequence", "total_sequence")
    cos, sin = (float_port(name, "batch", "sequence", head_dim) for name in ("cos", "sin"))
    cross_attention_mask = float_port("cross_attention_mask", "batch", 1, "sequence", "vision_sequence")
    row_mask = float_port("full_text_row_masked_out_mask", "batch", 1, "sequence", 1)
    past = tuple(float_port(f"past_{part}", "batch", heads, "past_sequence", head_dim) for part in ("key", "value"))
    present = tuple(
        float_port(f"present_{part}", "batch", heads, "total_sequence", head_dim) for part in ("key", "value")
    )
    logits = float_port("logits", "batch", "sequence", text["vocab_size"])
    dims = {"batch": 2, "sequence": 3, "past_sequence": 4, "total_sequence": 7, "vision_sequence": 5}
    kinds = kinds_by_name(
        Kind("text_embeddings", f"{_MODULES}:text_embeddings", (input_ids,), (hidden_states,), dims),
        Kind("positions", f"{_MODULES}:positions", (attention_mask, position_ids), (causal_mask, cos, sin), dims),
        Kind(
            "self_attention_layer",
            f"{_MODULES}:self_attention_layer",
            (hidden_states, causal_mask, cos, sin, *past),
            (hidden_states, *present),
            dims,
        ),
        Kind(
            "cross_attention_layer",
            f"{_MODULES}:cross_attention_layer",
            (
                hidden_states,
                cross_attention_mask,
                row_mask,
                _cross_key_value("key", text),
                _cross_key_value("value", text),
            ),
            (hidden_states,),
            dims,
        ),
        Kind("lm_head", f"{_MODULES}:lm_head", (hidden_states,), (logits,), dims),
    )
    prefix = "model.language_model."
    same = {name: name for name in ("causal_mask", "cos", "sin", "hidden_states")}
    blocks = [
        Block(
            "embed_tokens",
            "text_embeddings",
            {"embed_tokens.weight": f"{prefix}embed_tokens.weight"},
            {"input_ids": "input_ids"},
            {"hidden_states": "hidden_states"},
            role="embeddings",
        ),
        Block(
            "positions",
            "positions",
            {},
            {"attention_mask": "attention_mask", "position_ids": "position_ids"},
            {name: name for name in ("causal_mask", "cos", "sin")},
            role="glue",
        ),
    ]
    state: dict[str, str] = {}
    shared = (
        *(f"mlp.{name}_proj.weight" for name in ("gate", "up", "down")),
        "input_layernorm.weight",
        "post_attention_layernorm.weight",
    )
    for index in range(text["num_hidden_layers"]):
        name = f"layers.{index}"
        if index in text["cross_attention_layers"]:
            names = (
                *(f"cross_attn.{part}.weight" for part in ("q_proj", "o_proj", "q_norm")),
                "cross_attn_attn_gate",
                "cross_attn_mlp_gate",
                *shared,
            )
            ports = {
                "hidden_states": "hidden_states",
                "cross_attention_mask": "cross_attention_mask",
                "full_text_row_masked_out_mask": "full_text_row_masked_out_mask",
                "key": f"cross_attn_key_values.{index}.key",
                "value": f"cross_attn_key_values.{index}.value",
            }
            outputs = {"hidden_states": "hidden_states"}
            kind = "cross_attention_layer"
        else:
            names = (*(f"self_attn.{part}_proj.weight" for part in "qkvo"), *shared)
            ports, outputs = dict(same), {"hidden_states": "hidden_states"}
            for part in ("key", "value"):
                ports[f"past_{part}"] = f"past_key_values.{index}.{part}"
                outputs[f"present_{part}"] = f"present.{index}.{part}"
                state[f"past_key_values.{index}.{part}"] = f"present.{index}.{part}"
            kind = "self_attention_layer"
        blocks.append(Block(name, kind, {p: f"{prefix}{name}.{p}" for p in names}, ports, outputs))
    blocks.append(
        Block(
            "lm_head",
            "lm_head",
            {"norm.weight": f"{prefix}norm.weight", "lm_head.weight": "lm_head.weight"},
            {"hidden_states": "hidden_states"},
            {"logits": "logits"},
            role="head",
        )
    )
    return Component(
        name="language_model",
        side="language",
        role="language model",
        stems={"openvino": "openvino_language_model", "onnx": "language_model"},
        kinds=kinds,
        blocks=tuple(blocks),
        inputs=(
            input_ids,
            attention_mask,
            position_ids,
            cross_attention_mask,
            row_mask,
            int_port("beam_idx", "batch", dtype="i32"),
            *_cross_key_values(text),
        ),
        outputs=(logits,),
        state=state,
        logits=True,
    )


def _cross_key_value(name: str, text: dict[str, Any]) -> Port:
    head_dim = text["hidden_size"] // text["num_attention_heads"]
    return float_port(name, "batch", text["num_key_value_heads"], "vision_sequence", head_dim)


def _cross_key_values(text: dict[str, Any]) -> list[Port]:
    return [
        renamed(_cross_key_value(part, text), f"cross_attn_key_values.{index}.{part}")
        for index in text["cross_attention_layers"]
        for part in ("key", "value")
    ]


def _padded_patches(vision: dict[str, Any]) -> int:
    """Patches of one tile with the class token, rounded up to a multiple of 8 as the model does."""
    patches = (vision["image_size"] // vision["patch_size"]) ** 2 + 1
    return (patches + 7) // 8 * 8


def calibration_sizes(config: dict[str, Any]) -> list[tuple[int, int]]:
    """Image sizes that the processor cuts into one tile, two, and so on; quantization must have seen them all."""
    vision = config["vision_config"]
    size: int = vision["image_size"]
    return [(size * count, size) for count in range(1, vision["max_num_tiles"] + 1)]


def image_tokens(_config: dict[str, Any]) -> int:
    """Tokens of an image in a prompt: its features come in through cross-attention."""
    return 1


def reference(folder: Path) -> Model:
    """The checkpoint in torch."""
    from vlmconvert.families.mllama_reference import Reference

    return Reference(folder)
