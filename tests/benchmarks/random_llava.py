"""Write a random LLaVA checkpoint of any shape, shard by shard, without holding it in memory.

    python -m tests.benchmarks.random_llava build/random-1b --layers 20

Older transformers can read it too.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from passes.processor_files import processor_files
from tests.benchmarks.random_weights import command, write_random_weights
from vlmconvert.families import demo_checkpoint

# In-memory prefix -> prefix on the hub.
_ON_HUB = {
    "lm_head.": "language_model.lm_head.",
    "model.language_model.": "language_model.model.",
    "model.vision_tower.": "vision_tower.vision_model.",
    "model.multi_modal_projector.": "multi_modal_projector.",
}


def write_random_llava(
    folder: Path,
    layers: int = 20,
    hidden: int = 2048,
    intermediate: int = 5632,
    heads: int = 32,
    key_value_heads: int = 8,
    vocabulary: int = 32000,
    vision_layers: int = 8,
    vision_hidden: int = 512,
    seed: int = 0,
) -> None:
    """Write a random LLaVA checkpoint: config, processor (the demo's) and bf16 weights; the vision tower is a small CLIP for the demo's images."""
    folder.mkdir(parents=True, exist_ok=True)
    demo = demo_checkpoint("llava")
    image_size, patch_size = 112, 14
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=vision_hidden,
            intermediate_size=4 * vision_hidden,
            num_hidden_layers=vision_layers,
            num_attention_heads=8,
            image_size=image_size,
            patch_size=patch_size,
        ),
        text_config=LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=hidden,
            intermediate_size=intermediate,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=key_value_heads,
            max_position_embeddings=8192,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=2,
        ),
        image_token_index=LlavaConfig.from_pretrained(demo).image_token_index,
        image_seq_length=(image_size // patch_size) ** 2,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )
    config.architectures = ["LlavaForConditionalGeneration"]
    config.save_pretrained(folder)
    for path in processor_files(demo):
        shutil.copyfile(path, folder / path.name)
    images = json.loads((folder / "processor_config.json").read_text())["image_processor"]
    (folder / "preprocessor_config.json").write_text(json.dumps(images))
    settings = folder / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}))
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in LlavaForConditionalGeneration(config).state_dict().items()}
    write_random_weights(folder, shapes, _ON_HUB, seed)


main = command(write_random_llava)

if __name__ == "__main__":
    main()
