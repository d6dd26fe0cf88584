"""Train the embedded demo checkpoint: a small mllama that answers questions about scenes.

    python -m vlmconvert.demo.train_mllama --work build/demo-mllama

See `vlmconvert.demo.training`.
"""

from __future__ import annotations

from pathlib import Path

import click
import torch
from transformers import (
    GenerationConfig,
    MllamaConfig,
    MllamaForConditionalGeneration,
    MllamaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.mllama.configuration_mllama import MllamaTextConfig, MllamaVisionConfig
from transformers.models.mllama.image_processing_pil_mllama import MllamaImageProcessorPil

from vlmconvert.demo.training import Phase, Recipe, build_bpe, train

VOCAB_SIZE = 512
IMAGE_TOKEN = "<|image|>"
SPECIAL_TOKENS = (
    "<|begin_of_text|>",
    "<|end_of_text|>",
    "<|finetune_right_pad_id|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "<|python_tag|>",
)
CHAT_TEMPLATE = """{{- bos_token }}
{%- for message in messages %}
{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}
{%- if message['content'] is string %}
{{- message['content'] | trim }}
{%- else %}
{%- for part in message['content'] %}
{{- '<|image|>' if part['type'] == 'image' else part['text'] | trim }}
{%- endfor %}
{%- endif %}
{{- '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}"""


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Make a byte-level BPE tokenizer of `VOCAB_SIZE` tokens, followed by the image token as in Llama 3.2."""
    tokenizer = build_bpe(VOCAB_SIZE, SPECIAL_TOKENS, "yes no user assistant system the image shows")
    tokenizer.add_special_tokens([IMAGE_TOKEN])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|begin_of_text|>",
        eos_token="<|eot_id|>",
        pad_token="<|finetune_right_pad_id|>",
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
        model_max_length=2048,
    )


def build_processor() -> MllamaProcessor:
    """Make the processor of the demo: it cuts an image into at most four tiles of 56 x 56 pixels."""
    image_processor = MllamaImageProcessorPil(size={"height": 56, "width": 56}, max_image_tiles=4)
    return MllamaProcessor(image_processor, build_tokenizer(), chat_template=CHAT_TEMPLATE)


def build_model(processor: MllamaProcessor) -> MllamaForConditionalGeneration:
    """Make the untrained model: the structure of Llama 3.2 11B Vision, with a width of 128."""
    tokenizer = processor.tokenizer
    text_config = MllamaTextConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        cross_attention_layers=[1, 3, 5, 7],
        max_position_embeddings=2048,
        initializer_range=0.07,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 256,
        },
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    vision_config = MllamaVisionConfig(
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_global_layers=2,
        attention_heads=4,
        image_size=56,
        patch_size=14,
        max_num_tiles=4,
        intermediate_layers_indices=[0, 2],
        vision_output_dim=384,
        initializer_range=0.07,
    )
    config = MllamaConfig(
        vision_config=vision_config, text_config=text_config, image_token_index=processor.image_token_id
    )
    model = MllamaForConditionalGeneration(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # transformers initializes the gates with zero, so that the attention to the image gets no gradient, and the
            # position embeddings much smaller than the patch embeddings. A model of this width would then need long to
            # learn where things are.
            if name.endswith(("gate", "gate_attn", "gate_ffn")):
                parameter.fill_(0.7)
            elif "positional_embedding" in name or name.endswith("class_embedding"):
                parameter.normal_(std=0.4)
            elif name.endswith("patch_embedding.weight"):
                parameter.normal_(std=0.02)
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        do_sample=False,
    )
    return model


RECIPE = Recipe(
    build_processor,
    build_model,
    # Long conversations about few images teach the language first; many images follow, which the vision encoder needs.
    (Phase(3750, 24, 9, 1e-3, 5000), Phase(6950, 48, 2, 8e-4, 3200)),
)


@click.command()
@click.option("--work", type=click.Path(path_type=Path), default=Path("build/demo-mllama"), show_default=True)
@click.option("--output", type=click.Path(path_type=Path), default=Path(__file__).parent / "mllama")
@click.option("--seed", default=0, show_default=True)
def main(work: Path, output: Path, seed: int) -> None:
    """Train the embedded demo mllama and write its Hugging Face folder."""
    train(RECIPE, work, output, seed)


if __name__ == "__main__":
    main()
