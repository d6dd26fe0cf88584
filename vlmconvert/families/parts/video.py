"""Loading of processors that also take videos, without torchvision, which transformers' own way to load them needs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from passes.compat.transformers import (
    image_processor_class,
    processor_class,
    video_processor_class,
    with_any_video_processor,
)

__all__ = ["load_frames_processor", "load_video_processor"]

_PROCESSOR, _IMAGES, _VIDEOS = "processor_config.json", "preprocessor_config.json", "video_preprocessor_config.json"


def load_frames_processor(folder: Path, model_type: str, owner: str, name: str, **defaults: Any) -> Any:
    """Load a processor whose videos are processed by transformers' own class, without torchvision.

    Args:
        folder: the checkpoint.
        model_type: of the checkpoint.
        owner: model to which the class belongs.
        name: name of the class.
        defaults: settings that the checkpoint may lack.
    """
    videos = video_processor_class(owner, name)
    # Frames are chosen before they are processed.
    return load_video_processor(
        folder, model_type, lambda settings: videos(**defaults | settings | {"do_sample_frames": False})
    )


def load_video_processor(folder: Path, model_type: str, videos: Callable[[dict[str, Any]], Any]) -> Any:
    """Load a processor for images, videos and text.

    Checkpoints of transformers 4 keep the settings in several files; each is read from the files in which transformers
    looks.

    Args:
        folder: the checkpoint.
        model_type: of the checkpoint.
        videos: takes the settings for videos, and returns what processes them.

    Raises:
        OSError, ValueError, KeyError: if a file is missing or damaged.
    """
    import transformers

    config = _read(folder / _PROCESSOR)
    settings = config.pop("video_processor", None) or _read(folder / _VIDEOS) or _read(folder / _IMAGES)
    config.pop("image_processor", None)
    base = getattr(transformers, config.pop("processor_class", processor_class(model_type)))
    processor = with_any_video_processor(base)
    # The class is found by the model's type, because older files name a class that transformers has removed.
    images = image_processor_class(model_type).from_pretrained(folder, local_files_only=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    template = folder / "chat_template.jinja"
    config["chat_template"] = (
        template.read_text(encoding="utf-8")
        if template.exists()
        else _read(folder / "chat_template.json").get("chat_template") or tokenizer.chat_template
    )
    return processor(image_processor=images, tokenizer=tokenizer, video_processor=videos(settings), **config)


def _read(path: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    return content
