"""Train the embedded demo checkpoint: a small LLaVA that answers questions about scenes.

    python -m vlmconvert.demo.train_llava --work build/demo-llava

See `vlmconvert.demo.training`.
"""

from __future__ import annotations

from pathlib import Path

import click
import torch
from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from vlmconvert.demo.training import Phase, Recipe, build_bpe, train

VOCAB_SIZE = 512
IMAGE_SIZE, PATCH_SIZE = 112, 14
CHAT_TEMPLATE = """{{- bos_token }}
{%- for message in messages %}
{{- 'ASSISTANT: ' if message['role'] == 'assistant' else 'USER: ' }}
{%- if message['content'] is string %}
{{- message['content'] }}
{%- else %}
{%- for part in message['content'] %}
{{- '<image>\\n' if part['type'] == 'image' else part['text'] }}
{%- endfor %}
{%- endif %}
{{- '</s>' if message['role'] == 'assistant' else ' ' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- 'ASSISTANT:' }}
{%- endif %}"""


def build_processor() -> LlavaProcessor:
    """Make the processor: an image has 64 patches, and the image token has the first id after the vocabulary."""
    tokenizer = build_bpe(VOCAB_SIZE, ("<s>", "</s>", "<unk>", "<pad>"), "USER: ASSISTANT: yes no the image shows")
    tokenizer.add_special_tokens(["<image>"])
    size = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    half = [0.5, 0.5, 0.5]
    return LlavaProcessor(
        CLIPImageProcessorPil(size=size, do_center_crop=False, crop_size=size, image_mean=half, image_std=half),
        PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            bos_token="<s>",
            eos_token="</s>",
            unk_token="<unk>",
            pad_token="<pad>",
            extra_special_tokens={"image_token": "<image>"},
            padding_side="left",
            model_input_names=["input_ids", "attention_mask"],
            model_max_length=2048,
        ),
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )


def build_model(processor: LlavaProcessor) -> LlavaForConditionalGeneration:
    """Make the untrained model: CLIP and Llama as in LLaVA 1.5, with a width of 128."""
    tokenizer = processor.tokenizer
    tokens = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=5,
            num_attention_heads=4,
            image_size=IMAGE_SIZE,
            patch_size=PATCH_SIZE,
            projection_dim=128,
        ),
        text_config=LlamaConfig(
            vocab_size=VOCAB_SIZE + 64,
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=6,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=2048,
            initializer_range=0.07,
            **tokens,
        ),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=(IMAGE_SIZE // PATCH_SIZE) ** 2,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    model = LlavaForConditionalGeneration(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # CLIP initializes the position embeddings much smaller than the patch embeddings. A model of this width would
            # then need long to learn where things are.
            if "position_embedding" in name or "class_embedding" in name:
                parameter.normal_(std=0.4)
            elif "patch_embedding" in name:
                parameter.normal_(std=0.02)
            elif parameter.ndim == 2:
                parameter.normal_(std=0.07)
    model.generation_config = GenerationConfig(do_sample=False, **tokens)
    return model


def _patch_features(model: LlavaForConditionalGeneration, pixel_values: torch.Tensor) -> torch.Tensor:
    """The features of the vision tower that the projector takes."""
    hidden_states = model.model.vision_tower(pixel_values, output_hidden_states=True).hidden_states
    return hidden_states[model.config.vision_feature_layer][:, 1:]


RECIPE = Recipe(
    build_processor,
    build_model,
    # Long conversations about few images teach the language first; many images follow.
    (
        Phase(1500, 24, 9, 1e-3, 2500),
        Phase(2500, 48, 2, 8e-4, 2500),
        Phase(3250, 48, 2, 5e-4, 750),
    ),
    _patch_features,
    vision_steps=1500,
)


@click.command()
@click.option("--work", type=click.Path(path_type=Path), default=Path("build/demo-llava"), show_default=True)
@click.option("--output", type=click.Path(path_type=Path), default=Path(__file__).parent / "llava")
@click.option("--seed", default=0, show_default=True)
def main(work: Path, output: Path, seed: int) -> None:
    """Train the embedded demo LLaVA and write its Hugging Face folder."""
    train(RECIPE, work, output, seed)


if __name__ == "__main__":
    main()
