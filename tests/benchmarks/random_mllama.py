"""Write a random mllama checkpoint of any shape, shard by shard, without holding it in memory.

python -m tests.benchmarks.random_mllama build/random-1b --layers 20
"""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from transformers import MllamaForConditionalGeneration
from transformers.models.mllama.configuration_mllama import MllamaConfig, MllamaTextConfig, MllamaVisionConfig

from tests.benchmarks.random_weights import command, write_random_weights
from vlmconvert.artifact import processor_files
from vlmconvert.families import demo_checkpoint

# In-memory prefix -> prefix on the hub.
_ON_HUB = {
    "lm_head.": "language_model.lm_head.",
    "model.language_model.": "language_model.model.",
    "model.vision_model.": "vision_model.",
    "model.multi_modal_projector.": "multi_modal_projector.",
}


def write_random_mllama(
    folder: Path,
    layers: int = 20,
    hidden: int = 2048,
    intermediate: int = 5632,
    heads: int = 32,
    key_value_heads: int = 8,
    vocabulary: int = 32000,
    seed: int = 0,
) -> None:
    """Write a random mllama checkpoint: config, processor (the demo's) and bf16 weights; every fifth layer from the fourth is a cross-attention layer."""
    folder.mkdir(parents=True, exist_ok=True)
    demo = demo_checkpoint("mllama")
    vision = MllamaConfig.from_pretrained(demo).vision_config.to_dict()
    text = MllamaTextConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        cross_attention_layers=list(range(3, layers, 5)),
        max_position_embeddings=8192,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    config = MllamaConfig(text_config=text, vision_config=MllamaVisionConfig(**vision), image_token_index=vocabulary)
    config.architectures = ["MllamaForConditionalGeneration"]
    config.save_pretrained(folder)
    for path in processor_files(demo):
        shutil.copyfile(path, folder / path.name)
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in MllamaForConditionalGeneration(config).state_dict().items()}
    write_random_weights(folder, shapes, _ON_HUB, seed)


main = command(write_random_mllama)

if __name__ == "__main__":
    main()
