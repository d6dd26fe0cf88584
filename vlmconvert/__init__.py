"""vlmconvert: convert, compress and check vision-language models."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping
    from os import PathLike

    from vlmconvert.model import VisionLanguageModel

__all__ = ["__version__", "load", "load_processor"]

__version__ = "0.1.0"


def load(
    folder: str | PathLike[str],
    device: str = "CPU",
    ov_config: Mapping[str, Any] | None = None,
    cache_dir: str | PathLike[str] | None = None,
) -> VisionLanguageModel:
    """Open an artifact from its manifest.

    Args:
        folder: what a conversion wrote.
        device: an OpenVINO device name, such as CPU, GPU or AUTO.
        ov_config: OpenVINO compile options.
        cache_dir: where OpenVINO keeps compiled models, to open faster the next time.

    Returns:
        A model with transformers' `generate`; use it with `load_processor(folder)`, or for models without videos with
        transformers' `AutoProcessor`.

    Raises:
        BadInputError: if the folder is no artifact, or OpenVINO refuses the device or an option.
    """
    from pathlib import Path

    from vlmconvert.model import VisionLanguageModel

    return VisionLanguageModel(Path(folder), device, ov_config, Path(cache_dir) if cache_dir else None)


def load_processor(folder: str | PathLike[str]) -> Any:
    """Open the processor of an artifact or a checkpoint, from local files.

    It is transformers' own, with images processed by Pillow; its videos, for which transformers needs torchvision, go through
    the image processor, frame by frame, and `apply_chat_template` has the checkpoint's template wherever it is kept.

    Args:
        folder: an artifact or a checkpoint.

    Raises:
        BadInputError: if a file is missing or damaged, or there is no chat template.
    """
    from pathlib import Path

    from calibration.inputs import load_processor

    return load_processor(Path(folder))
