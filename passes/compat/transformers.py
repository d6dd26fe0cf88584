"""Undocumented interfaces and behaviour of transformers on which vlmconvert relies.

The layers of its models, which families take apart, are not here: the families' own modules use them.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor
    from torch.nn import Module
    from transformers import PreTrainedConfig, PreTrainedModel

__all__ = [
    "GraphState",
    "LayerCache",
    "StatefulGeneration",
    "attention_replaced",
    "image_processor_class",
    "processor_class",
    "sdpa",
    "tensor_renaming",
    "use_sdpa",
    "video_processor_class",
    "with_any_video_processor",
    "with_texts_changed",
]


# Frames are taken to be as far apart as the processors of published models sample them.
_FRAMES_PER_SECOND = 2.0


def tensor_renaming(model: PreTrainedModel) -> Callable[[str], str]:
    """A function that takes a tensor's name in a checkpoint's files, on-hub or in-memory, and returns its in-memory name."""
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightRenaming, rename_source_key

    renamings = [item for item in get_model_conversion_mapping(model) if isinstance(item, WeightRenaming)]
    expected = model.state_dict()

    def rename(name: str) -> str:
        target, _ = rename_source_key(name, renamings, [], model.base_model_prefix, expected)
        return target

    return rename


def use_sdpa(config: PreTrainedConfig) -> None:
    """Make layers that are built from a config compute attention by `scaled_dot_product_attention`."""
    config._attn_implementation = "sdpa"


@contextmanager
def attention_replaced(wrap: Callable[[Callable[..., Any]], Callable[..., Any]]) -> Iterator[None]:
    """Make layers that use `scaled_dot_product_attention` compute attention by another function.

    Args:
        wrap: takes the original function and returns the other one. Both take the module; query, key and value [batch,
            heads, length, width], where several query heads may share a key-value head; the mask or None; and keyword
            arguments such as `scaling`. Both return the output [batch, length, heads, width], and the weights or None.
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    ALL_ATTENTION_FUNCTIONS["sdpa"] = wrap(ALL_ATTENTION_FUNCTIONS["sdpa"])
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]  # the original function, which this entry hid, applies again


def sdpa(module: Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scaling: float) -> Tensor:
    """Attention as layers compute it that use `scaled_dot_product_attention`, or what `attention_replaced` puts in its place.

    Returns:
        [batch, length, heads, width].
    """
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

    attended: Tensor = ALL_ATTENTION_FUNCTIONS["sdpa"](
        module, query, key, value, mask, scaling=scaling, is_causal=False
    )[0]
    return attended


class LayerCache:
    """The key-value cache of one layer as plain tensors [batch, heads, length, width], with the interface of attention."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        self.keys, self.values = keys, values

    def update(self, keys: Tensor, values: Tensor, _layer_idx: int) -> tuple[Tensor, Tensor]:
        """Append keys and values along the sequence, and return all of them."""
        import torch

        self.keys = torch.cat((self.keys, keys), dim=2)
        self.values = torch.cat((self.values, values), dim=2)
        return self.keys, self.values

    @property
    def layers(self) -> list[LayerCache]:
        """The layers of the cache, as in transformers; cross-attention looks up its keys and values as layer 0."""
        return [self]


class GraphState:
    """Takes the place of the cache in `generate` if the model itself keeps its cache."""

    is_compileable = False


class StatefulGeneration(ABC):
    """The methods that `generate` needs of a model that keeps its cache itself; a base class before `GenerationMixin`."""

    main_input_name: ClassVar[str] = "input_ids"
    base_model_prefix: ClassVar[str] = ""
    _is_stateful: ClassVar[bool] = True

    @abstractmethod
    def repeat_rows(self, times: int) -> None:
        """Called before `generate` repeats each row of the inputs `times` times, for beams or several answers."""

    @abstractmethod
    def reorder_rows(self, rows: np.ndarray) -> None:
        """Called before a step; `rows` [batch] is, for each row, the row of the last step that it continues."""

    @abstractmethod
    def check_inputs(self, given: set[str]) -> None:
        """Called with the names of the given inputs; raises ValueError if the model does not know one of them."""

    @classmethod
    def can_generate(cls) -> bool:
        """Whether the model can generate: always true."""
        return True

    def get_experts_implementation(self) -> dict[str, str]:
        """Implementations of mixtures of experts: none; `generate` asks every model for them."""
        return {}

    def _validate_model_kwargs(self, model_kwargs: dict[str, Any]) -> None:
        self.check_inputs({name for name, value in model_kwargs.items() if value is not None})

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False

    def _expand_inputs_for_generation(self, expand_size: int = 1, **inputs: Any) -> Any:
        self.repeat_rows(expand_size)
        return super()._expand_inputs_for_generation(expand_size=expand_size, **inputs)  # type: ignore[misc]

    def _reorder_cache(self, past_key_values: GraphState, beam_idx: Tensor) -> GraphState:
        self.reorder_rows(beam_idx.numpy())
        return past_key_values


def image_processor_class(model_type: str) -> Any:
    """The image processor class of transformers, with the Pillow backend, for a `model_type`.

    Raises:
        KeyError: if transformers has none.
    """
    import transformers
    from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES  # type: ignore[attr-defined]

    return getattr(transformers, IMAGE_PROCESSOR_MAPPING_NAMES[model_type]["pil"])


def processor_class(model_type: str) -> str:
    """Name of the processor class of transformers, for text and images, for a `model_type`.

    Raises:
        KeyError: if transformers has none.
    """
    from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES  # type: ignore[attr-defined]

    name: str = PROCESSOR_MAPPING_NAMES[model_type]
    return name


def video_processor_class(model_type: str, name: str) -> Any:
    """A video processor class of transformers that needs no torchvision; it takes frames as images.

    transformers resizes and normalizes with torchvision, which calls the same functions of torch, and hides the class without it.

    Args:
        model_type: the model to which the class belongs.
        name: of the class.
    """
    import importlib

    import numpy as np
    import torch
    from transformers.video_processing_utils import BaseVideoProcessor
    from transformers.video_utils import VideoMetadata

    class WithoutTorchvision(BaseVideoProcessor):
        def preprocess(self, videos: Any, **options: Any) -> Any:
            # Either the videos, or the videos of each prompt.
            flat = [
                video for own in videos if len(own) for video in (own if isinstance(own[0], list | tuple) else [own])
            ]
            frames = [np.stack([np.asarray(frame.convert("RGB")) for frame in video]) for video in flat]
            times = [
                VideoMetadata(
                    total_num_frames=len(video), fps=_FRAMES_PER_SECOND, frames_indices=list(range(len(video)))
                )
                for video in frames
            ]
            return super().preprocess(frames, **options | {"video_metadata": times})

        def convert_to_rgb(self, image: Any, input_data_format: Any = None) -> Any:
            return image  # `preprocess` has done it

        def resize(self, image: Any, size: Any, resample: Any = None, *_more: Any, **_options: Any) -> Any:
            mode = {1: "lanczos", 2: "bilinear", 3: "bicubic"}[int(resample)]
            frames = image.flatten(0, -4)
            frames = torch.nn.functional.interpolate(frames, (size.height, size.width), mode=mode, antialias=True)
            return frames.reshape(*image.shape[:-2], size.height, size.width)

        def normalize(self, image: Any, mean: Any, std: Any, *_more: Any, **_options: Any) -> Any:
            mean, std = (torch.as_tensor(values, dtype=image.dtype)[:, None, None] for values in (mean, std))
            return image.sub(mean).div_(std)

    with _torchvision_importable():
        module = importlib.import_module(f"transformers.models.{model_type}.video_processing_{model_type}")
    return type(name, (getattr(module, name), WithoutTorchvision), {})


@contextmanager
def _torchvision_importable() -> Iterator[None]:
    """Let modules that import torchvision, and of which only parts without it are used, be imported where there is none."""
    from transformers.utils.import_utils import is_torchvision_available

    names = ("torchvision", "transforms", "v2", "functional")
    if is_torchvision_available() or names[0] in sys.modules:
        yield
        return
    paths = [".".join(names[: count + 1]) for count in range(len(names))]
    sys.modules.update({path: ModuleType(path) for path in paths})
    for path, name in zip(paths, names[1:], strict=False):
        setattr(sys.modules[path], name, sys.modules[f"{path}.{name}"])
    try:
        yield
    finally:
        for path in paths:
            del sys.modules[path]


def with_any_video_processor(base: Any) -> Any:
    """Make a processor class that accepts any object as its video processor.

    transformers' own check of the object fails without torchvision, because it cannot import the expected class.

    Args:
        base: transformers' processor class.
    """

    class Processor(base):  # type: ignore[misc]
        def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
            if argument_name == "video_processor":
                return None
            return super().check_argument_for_proper_class(argument_name, argument)

    return Processor


def with_texts_changed(processor: Any, change: Callable[[str], str]) -> Any:
    """The processor, changed so that texts are changed before they are processed.

    Args:
        processor: a processor of transformers.
        change: takes a text, and returns the one that is processed.
    """

    class Processor(type(processor)):  # type: ignore[misc]
        def __call__(self, images: Any = None, text: Any = None, **options: Any) -> Any:
            changed = change(text) if isinstance(text, str) else [change(part) for part in text or ()]
            return super().__call__(images=images, text=changed or text, **options)

    processor.__class__ = Processor
    return processor
