"""LLaVA, LLaVA-NeXT and LLaVA-NeXT-Video, over text models and vision towers."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import processors
from transformers import AutoConfig, PreTrainedTokenizerFast
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from tests.checkpoints.common import PATCH, SIZE, random_model, save, text_values, vision_values
from vlmconvert.demo.training import build_bpe

IMAGE, VIDEO = "<image>", "<video>"
GRID = [[28, 56], [56, 28], [56, 56], [28, 84], [84, 28]]
# As llava-hf's templates: no token that begins a text, which the tokenizer adds itself.
TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>\n"
    "{% elif part['type'] == 'video' %}<video>\n{% else %}{{ part['text'] + ' ' }}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
CLASSES = {"llava": "Llava", "llava-next": "LlavaNext", "llava-next-video": "LlavaNextVideo"}


@cache
def tokenizer() -> PreTrainedTokenizerFast:
    """Adds its first token to every text, as Llama's does."""
    bpe = build_bpe(480, ("<s>", "</s>", "<unk>", "<pad>", IMAGE, VIDEO), "USER: ASSISTANT:")
    start = ("<s>", bpe.token_to_id("<s>"))
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B", special_tokens=[start])
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        extra_special_tokens={"image_token": IMAGE, "video_token": VIDEO},
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
    )


def write_processor(folder: Path, family: str, vision: str, strategy: str) -> None:
    """Write the family's processor."""
    options = {"size": {"shortest_edge": SIZE}, "crop_size": {"height": SIZE, "width": SIZE}}
    extra = {
        "patch_size": PATCH,
        "vision_feature_select_strategy": strategy,
        "num_additional_image_tokens": int(vision == "clip"),
        "chat_template": TEMPLATE,
    }
    if family == "llava":
        transformers.LlavaProcessor(CLIPImageProcessorPil(**options), tokenizer(), **extra).save_pretrained(folder)
        return
    images = LlavaNextImageProcessorPil(**options, image_grid_pinpoints=GRID)
    transformers.LlavaNextProcessor(images, tokenizer(), **extra).save_pretrained(folder)
    if family == "llava-next-video":
        # transformers cannot make this processor without torchvision.
        path = folder / "processor_config.json"
        config = json.loads(path.read_text()) | {"processor_class": "LlavaNextVideoProcessor"}
        path.write_text(json.dumps(config))
        (folder / "video_preprocessor_config.json").write_text(json.dumps(options))


def write_llava(
    folder: Path,
    family: str,
    text: str,
    vision: str,
    *,
    layer: int | list[int],
    strategy: str,
    dtype: torch.dtype,
    tied: bool,
    text_options: dict[str, Any],
    **options: Any,
) -> Path:
    """Write a random checkpoint of the LLaVA line; for the arguments see `write_checkpoint`."""
    tokens = tokenizer()
    if tied:
        text_options, options = ({"tie_word_embeddings": True} | own for own in (text_options, options))
    if family != "llava":
        options["image_grid_pinpoints"] = GRID
    if family == "llava-next-video":
        options["video_token_index"] = tokens.convert_tokens_to_ids(VIDEO)
    config = getattr(transformers, f"{CLASSES[family]}Config")(
        vision_config=AutoConfig.for_model(f"{vision}_vision_model", **vision_values()),
        text_config=AutoConfig.for_model(text, **text_values(tokens, initializer_range=0.1, **text_options)),
        image_token_index=tokens.convert_tokens_to_ids(IMAGE),
        vision_feature_layer=layer,
        vision_feature_select_strategy=strategy,
        **options,
    )
    save(random_model(CLASSES[family], config, "language_model", None, {"bias": 0.1}), tokens, dtype, folder)
    write_processor(folder, family, vision, strategy)
    return folder


def as_transformers_4(folder: Path) -> Path:
    """Lay a checkpoint's processor out as checkpoints of transformers 4 have it, without what the config says too."""
    path = folder / "processor_config.json"
    config = json.loads(path.read_text())
    images = config.pop("image_processor")
    images["processor_class"] = config["processor_class"]
    # Once the class had a name of its own.
    images["image_processor_type"] = (
        config["processor_class"].replace("Processor", "ImageProcessor").replace("LlavaImage", "CLIPImage")
    )
    (folder / "preprocessor_config.json").write_text(json.dumps(images))
    path.write_text(json.dumps({"processor_class": config["processor_class"]}))
    template = folder / "chat_template.jinja"
    (folder / "chat_template.json").write_text(json.dumps({"chat_template": template.read_text()}))
    template.unlink()
    (folder / "video_preprocessor_config.json").unlink(missing_ok=True)
    return folder
