"""Small random checkpoints of the LLaVA line, written as a user would find them."""

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

from passes.ascend.family import AscendFamily
from passes.checkpoint import read_config
from vlmconvert.demo.training import build_bpe
from vlmconvert.families import family_of

SIZE, PATCH, WIDTH = 28, 7, 64
IMAGE, VIDEO = "<image>", "<video>"
GRID = [[28, 56], [56, 28], [56, 56], [28, 84], [84, 28]]
# As llava-hf's templates: no token that begins a text, which the tokenizer adds itself.
TEMPLATE = (
    "{% for message in messages %}{{ message['role'].upper() + ': ' }}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>\n"
    "{% elif part['type'] == 'video' %}<video>\n{% else %}{{ part['text'] + ' ' }}{% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
# Of the families that `write_checkpoint` writes; Gemma 3 has no vision side to choose.
FAMILIES = (
    "llava",
    "llava-next",
    "llava-next-video",
    "qwen2-vl",
    "qwen2.5-vl",
    "qwen3-vl",
    "internvl",
    "idefics3",
    "smolvlm",
    "gemma3",
)
CLASSES = {"llava": "Llava", "llava-next": "LlavaNext", "llava-next-video": "LlavaNextVideo"}


def ascend_family(folder: Path) -> AscendFamily:
    """What Ascend runtimes make of the family of a checkpoint or an artifact."""
    family = family_of(read_config(folder), str(folder)).ascend
    assert family is not None
    return family


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


def write_checkpoint(
    folder: Path,
    family: str = "llava",
    text: str = "llama",
    vision: str = "clip",
    *,
    layer: int | list[int] = -2,
    strategy: str = "default",
    dtype: torch.dtype = torch.bfloat16,
    tied: bool = False,
    text_options: dict[str, Any] | None = None,
    **options: Any,
) -> Path:
    """Write a random checkpoint.

    Args:
        folder: to write to.
        family: one of `FAMILIES`.
        text, vision: model types of the two sides.
        layer, strategy: vision_feature_layer and vision_feature_select_strategy.
        dtype: of the weights.
        tied: whether the LM head shares the embeddings' values.
        text_options: further entries of the text config.
        options: further entries of the config.
    """
    if family == "gemma3":
        return write_gemma3(folder, dtype=dtype, text_options=text_options, **options)
    if family in IDEFICS:
        return write_idefics(folder, family, text, dtype=dtype, tied=tied, text_options=text_options, **options)
    if family == "internvl":
        return write_internvl(folder, text, dtype=dtype, tied=tied, text_options=text_options, **options)
    if family in QWEN:
        return write_qwen(folder, family, dtype=dtype, tied=tied, text_options=text_options, **options)
    tokens = tokenizer()
    text_config = AutoConfig.for_model(
        text,
        vocab_size=512,
        hidden_size=WIDTH,
        intermediate_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=2048,
        initializer_range=0.1,
        bos_token_id=tokens.bos_token_id,
        eos_token_id=tokens.eos_token_id,
        pad_token_id=tokens.pad_token_id,
        **({"tie_word_embeddings": True} if tied else {}),
        **(text_options or {}),
    )
    if tied:
        options["tie_word_embeddings"] = True
    vision_config = AutoConfig.for_model(
        f"{vision}_vision_model",
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=4,
        image_size=SIZE,
        patch_size=PATCH,
    )
    if family != "llava":
        options["image_grid_pinpoints"] = GRID
    if family == "llava-next-video":
        options["video_token_index"] = tokens.convert_tokens_to_ids(VIDEO)
    config = getattr(transformers, f"{CLASSES[family]}Config")(
        vision_config=vision_config,
        text_config=text_config,
        image_token_index=tokens.convert_tokens_to_ids(IMAGE),
        vision_feature_layer=layer,
        vision_feature_select_strategy=strategy,
        **options,
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{CLASSES[family]}ForConditionalGeneration")(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1 and "language_model" not in name:
                parameter.normal_(std=0.2)
            elif name.endswith("bias"):
                parameter.normal_(std=0.1)
    _save(model, tokens, dtype, folder)
    write_processor(folder, family, vision, strategy)
    return folder


# As Gemma's: the token that begins a text, and turns in which the image is a token of its own that the processor expands.
GEMMA_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<start_of_turn>' + message['role'] + '\\n' }}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<start_of_image>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{{ '<end_of_turn>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\\n' }}{% endif %}"
)


def write_gemma3(
    folder: Path, *, dtype: torch.dtype = torch.bfloat16, text_options: dict[str, Any] | None = None, **options: Any
) -> Path:
    """Write a random Gemma 3 checkpoint; for the arguments see `write_checkpoint`."""
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

    names = ("<s>", "</s>", "<unk>", "<pad>", "<start_of_image>", "<image_soft_token>", "<end_of_image>")
    bpe = build_bpe(480, (*names, "<start_of_turn>", "<end_of_turn>"), "user model")
    tokens = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        pad_token="<pad>",
        extra_special_tokens={
            "boi_token": "<start_of_image>",
            "image_token": "<image_soft_token>",
            "eoi_token": "<end_of_image>",
        },
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
    )
    boi, image, eoi = (tokens.convert_tokens_to_ids(name) for name in names[4:])
    config = transformers.Gemma3Config(
        text_config={
            "vocab_size": 512,
            "hidden_size": WIDTH,
            "intermediate_size": 128,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "query_pre_attn_scalar": 16,
            "max_position_embeddings": 2048,
            "sliding_window": 12,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "bos_token_id": tokens.bos_token_id,
            "eos_token_id": tokens.eos_token_id,
            "pad_token_id": tokens.pad_token_id,
            **(text_options or {}),
        },
        vision_config={
            "hidden_size": 48,
            "intermediate_size": 96,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "image_size": SIZE,
            "patch_size": PATCH,
            "vision_use_head": False,
        },
        mm_tokens_per_image=4,
        boi_token_index=boi,
        image_token_index=image,
        eoi_token_index=eoi,
        **options,
    )
    torch.manual_seed(0)
    model = transformers.Gemma3ForConditionalGeneration(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.1 if "language_model" in name else 0.2)
            else:
                parameter.normal_(std=0.1)
    _save(model, tokens, dtype, folder)
    images = Gemma3ImageProcessorPil(size={"height": SIZE, "width": SIZE})
    transformers.Gemma3Processor(images, tokens, image_seq_length=4, chat_template=GEMMA_TEMPLATE).save_pretrained(
        folder
    )
    return folder


# Family -> prefix of transformers' classes, and what its vision config has beside the others'.
QWEN: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2-vl": ("Qwen2VL", {"embed_dim": 48, "mlp_ratio": 2, "hidden_size": WIDTH}),
    "qwen2.5-vl": (
        "Qwen2_5_VL",
        {
            "hidden_size": 48,
            "intermediate_size": 96,
            "window_size": 4 * PATCH,
            "fullatt_block_indexes": [1],
            "tokens_per_second": 2,
        },
    ),
    "qwen3-vl": (
        "Qwen3VL",
        {"hidden_size": 48, "intermediate_size": 96, "num_position_embeddings": 49, "deepstack_visual_indexes": [2, 0]},
    ),
}
QWEN_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def write_qwen(
    folder: Path,
    family: str,
    *,
    dtype: torch.dtype = torch.bfloat16,
    tied: bool = False,
    text_options: dict[str, Any] | None = None,
    vision_options: dict[str, Any] | None = None,
    **options: Any,
) -> Path:
    """Write a random Qwen-VL checkpoint whose images have 4 to 16 features; for the arguments see `write_checkpoint`."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    names = (
        "<|endoftext|>",
        "<|im_start|>",
        "<|im_end|>",
        "<|vision_start|>",
        "<|vision_end|>",
        "<|image_pad|>",
        "<|video_pad|>",
    )
    tokens = PreTrainedTokenizerFast(
        tokenizer_object=build_bpe(480, names, "user assistant <0.0 seconds>"),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
    )
    start, end, image, video = (tokens.convert_tokens_to_ids(name) for name in names[3:])
    prefix, vision = QWEN[family]
    features = {} if family == "qwen2-vl" else {"out_hidden_size": WIDTH}
    config = getattr(transformers, f"{prefix}Config")(
        text_config={
            "vocab_size": 512,
            "hidden_size": WIDTH,
            "intermediate_size": 128,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 2048,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]},
            "bos_token_id": None,
            "eos_token_id": tokens.eos_token_id,
            "pad_token_id": tokens.pad_token_id,
            **({"head_dim": 16} if family == "qwen3-vl" else {}),
            **(text_options or {}),
        },
        vision_config={
            "depth": 3,
            "num_heads": 4,
            "patch_size": PATCH,
            "spatial_merge_size": 2,
            **vision,
            **features,
            **(vision_options or {}),
        },
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
        tie_word_embeddings=tied,
        **options,
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{prefix}ForConditionalGeneration")(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.15 if "language_model" in name else 0.2)
            elif name.endswith("bias"):
                parameter.normal_(std=0.1)
    _save(model, tokens, dtype, folder)
    side = 2 * PATCH
    size = {"shortest_edge": 4 * side**2, "longest_edge": 16 * side**2}
    images = Qwen2VLImageProcessorPil(size=size, patch_size=PATCH)
    settings = images.to_dict() | {
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": f"{prefix}Processor",
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    frames = {
        name: settings[name] for name in ("image_mean", "image_std", "patch_size", "temporal_patch_size", "merge_size")
    }
    frames["size"] = {**size, "longest_edge": 64 * side**2}
    (folder / "video_preprocessor_config.json").write_text(json.dumps(frames))
    tokens.chat_template = QWEN_TEMPLATE
    tokens.save_pretrained(folder)
    return folder


INTERNVL_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '<IMG_CONTEXT>\\n' }}"
    "{% elif part['type'] == 'video' %}{{ '<video>\\n' }}"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def write_internvl(
    folder: Path,
    text: str = "qwen2",
    *,
    dtype: torch.dtype = torch.bfloat16,
    tied: bool = False,
    text_options: dict[str, Any] | None = None,
    vision_options: dict[str, Any] | None = None,
    **options: Any,
) -> Path:
    """Write a random InternVL checkpoint whose tiles have 4 features; for the arguments see `write_checkpoint`."""
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

    names = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<img>", "</img>", "<IMG_CONTEXT>", "<video>")
    tokens = PreTrainedTokenizerFast(
        tokenizer_object=build_bpe(480, names, "user assistant Frame1: "),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens={
            "start_image_token": "<img>",
            "end_image_token": "</img>",
            "context_image_token": "<IMG_CONTEXT>",
            "video_token": "<video>",
        },
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
    )
    config = transformers.InternVLConfig(
        text_config={
            "model_type": text,
            "vocab_size": 512,
            "hidden_size": WIDTH,
            "intermediate_size": 128,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "max_position_embeddings": 2048,
            "tie_word_embeddings": tied,
            "bos_token_id": None,
            "eos_token_id": tokens.eos_token_id,
            "pad_token_id": tokens.pad_token_id,
            **(text_options or {}),
        },
        vision_config={
            "hidden_size": 48,
            "intermediate_size": 96,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "image_size": [SIZE, SIZE],
            "patch_size": [PATCH, PATCH],
            **(vision_options or {}),
        },
        image_token_id=tokens.convert_tokens_to_ids("<IMG_CONTEXT>"),
        image_seq_length=4,
        tie_word_embeddings=tied,
        **options,
    )
    torch.manual_seed(0)
    model = transformers.InternVLForConditionalGeneration(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.15 if "language_model" in name else 0.2)
            elif name.endswith(("bias", "lambda_1", "lambda_2")):
                parameter.normal_(std=0.3)
    _save(model, tokens, dtype, folder)
    size = {"height": SIZE, "width": SIZE}
    images = GotOcr2ImageProcessorPil(size=size, crop_to_patches=True, min_patches=1, max_patches=12)
    settings = images.to_dict() | {
        "image_processor_type": "GotOcr2ImageProcessor",
        "processor_class": "InternVLProcessor",
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    names = ("image_mean", "image_std", "size")
    (folder / "video_preprocessor_config.json").write_text(json.dumps({name: settings[name] for name in names}))
    path = folder / "processor_config.json"
    path.write_text(json.dumps({"image_seq_length": 4, "processor_class": "InternVLProcessor"}))
    tokens.chat_template = INTERNVL_TEMPLATE
    tokens.save_pretrained(folder)
    return folder


IDEFICS = {"idefics3": "Idefics3", "smolvlm": "SmolVLM"}
IDEFICS_TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize + ':' }}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '<image>' }}"
    "{% elif part['type'] == 'video' %}{{ '<video>' }}"
    "{% else %}{{ ' ' + part['text'] }}{% endif %}{% endfor %}{{ '<end_of_utterance>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


def write_idefics(
    folder: Path,
    family: str,
    text: str = "llama",
    *,
    dtype: torch.dtype = torch.bfloat16,
    tied: bool = False,
    text_options: dict[str, Any] | None = None,
    vision_options: dict[str, Any] | None = None,
    **options: Any,
) -> Path:
    """Write a random Idefics3 or SmolVLM checkpoint whose tiles have 4 features; for the arguments see `write_checkpoint`."""
    from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

    places = [f"<row_{row + 1}_col_{column + 1}>" for row in range(6) for column in range(6)]
    names = (
        "<|im_start|>",
        "<|im_end|>",
        "<image>",
        "<fake_token_around_image>",
        "<global-img>",
        "<end_of_utterance>",
        "<video>",
    )
    tokens = PreTrainedTokenizerFast(
        tokenizer_object=build_bpe(480, (*names, *places), "User Assistant: Frame from 00:00:"),
        bos_token="<|im_start|>",
        eos_token="<end_of_utterance>",
        pad_token="<|im_end|>",
        padding_side="left",
        model_input_names=["input_ids", "attention_mask"],
    )
    prefix = IDEFICS[family]
    config = getattr(transformers, f"{prefix}Config")(
        text_config={
            "model_type": text,
            "vocab_size": 512,
            "hidden_size": WIDTH,
            "intermediate_size": 128,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 16,
            "max_position_embeddings": 2048,
            "tie_word_embeddings": tied,
            "bos_token_id": tokens.bos_token_id,
            "eos_token_id": tokens.eos_token_id,
            "pad_token_id": tokens.pad_token_id,
            **(text_options or {}),
        },
        vision_config={
            "hidden_size": 48,
            "intermediate_size": 96,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "image_size": SIZE,
            "patch_size": PATCH,
            **(vision_options or {}),
        },
        image_token_id=tokens.convert_tokens_to_ids("<image>"),
        tie_word_embeddings=tied,
        **options,
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{prefix}ForConditionalGeneration")(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.15 if "text_model" in name else 0.2)
            elif name.endswith("bias"):
                parameter.normal_(std=0.3)
    _save(model, tokens, dtype, folder)
    sizes = {"size": {"longest_edge": 4 * SIZE}, "max_image_size": {"longest_edge": SIZE}}
    settings = SmolVLMImageProcessorPil(**sizes).to_dict()
    settings |= {"image_processor_type": f"{prefix}ImageProcessor", "processor_class": f"{prefix}Processor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(settings))
    if family == "smolvlm":
        (folder / "video_preprocessor_config.json").write_text(json.dumps(sizes))
    path = folder / "processor_config.json"
    path.write_text(json.dumps({"image_seq_len": 4, "processor_class": f"{prefix}Processor"}))
    tokens.chat_template = IDEFICS_TEMPLATE
    tokens.save_pretrained(folder)
    return folder


def _save(model: Any, tokens: PreTrainedTokenizerFast, dtype: torch.dtype, folder: Path) -> None:
    """Write a model with the tokens that begin and end an answer."""
    model.generation_config = transformers.GenerationConfig(
        do_sample=False,
        bos_token_id=tokens.bos_token_id,
        eos_token_id=tokens.eos_token_id,
        pad_token_id=tokens.pad_token_id,
    )
    torch.nn.Module.to(model, dtype)
    model.save_pretrained(folder)


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
