"""Write a random mllama checkpoint of any shape, shard by shard, without holding it in memory.

python -m tests.benchmarks.random_mllama build/random-1b --layers 20
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from transformers import MllamaForConditionalGeneration
from transformers.models.mllama.configuration_mllama import MllamaConfig, MllamaTextConfig, MllamaVisionConfig

from passes.processor_files import processor_files
from tests.benchmarks.random_weights import command, write_random_weights
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
    """Write a random mllama checkpoint with the demo's vision encoder: config, processor (the demo's) and bf16 weights."""
    vision = MllamaConfig.from_pretrained(demo_checkpoint("mllama")).vision_config.to_dict()
    text = _text_config(layers, hidden, intermediate, heads, key_value_heads, vocabulary, tuple(range(3, layers, 5)))
    _write(folder, text, MllamaVisionConfig(**vision), seed)


def write_real_mllama(
    folder: Path,
    layers: int = 40,
    hidden: int = 4096,
    intermediate: int = 14336,
    heads: int = 32,
    vocabulary: int = 128256,
    seed: int = 0,
) -> None:
    """Write a random checkpoint with the config of Llama-3.2-11B-Vision, or with another text model behind its vision encoder."""
    text = _text_config(layers, hidden, intermediate, heads, 8, vocabulary, tuple(range(3, layers, 5)))
    # The defaults of transformers are those of the real vision encoder, with four tiles of 448 x 448.
    _write(folder, text, MllamaVisionConfig(), seed)


def _text_config(
    layers: int,
    hidden: int,
    intermediate: int,
    heads: int,
    key_value_heads: int,
    vocabulary: int,
    cross_attention_layers: tuple[int, ...],
) -> MllamaTextConfig:
    return MllamaTextConfig(
        vocab_size=vocabulary,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=key_value_heads,
        cross_attention_layers=list(cross_attention_layers),
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


def _write(folder: Path, text: MllamaTextConfig, vision: MllamaVisionConfig, seed: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    config = MllamaConfig(text_config=text, vision_config=vision, image_token_index=text.vocab_size)
    config.architectures = ["MllamaForConditionalGeneration"]
    config.save_pretrained(folder)
    demo = demo_checkpoint("mllama")
    for path in processor_files(demo):
        shutil.copyfile(path, folder / path.name)
    processor = folder / "processor_config.json"
    settings = json.loads(processor.read_text())
    settings["image_processor"] |= {"size": {"height": vision.image_size, "width": vision.image_size}}
    processor.write_text(json.dumps(settings, indent=2))
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in MllamaForConditionalGeneration(config).state_dict().items()}
    write_random_weights(folder, shapes, _ON_HUB, seed)


main = command(write_random_mllama)

if __name__ == "__main__":
    main()
