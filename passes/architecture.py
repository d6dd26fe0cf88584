"""What transformers says about the model of a config: names and shapes of its tensors, and its linear layers.

No weight is read and nothing is traced. Importing transformers takes seconds and hundreds of megabytes, so these functions
are meant for a process of their own; the `Architecture` that they return is small and picklable.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from manifests.errors import BadInputError, VlmConvertError
from passes.checkpoint import Checkpoint
from passes.compat.transformers import tensor_renaming, use_sdpa

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel

__all__ = [
    "Architecture",
    "check_sizes",
    "config_to_blame",
    "describe_architecture",
    "load_config",
    "read_architecture",
    "refuse_kernels",
]

# In-memory prefix -> prefixes that may replace it in checkpoints on the hub, first the one that runtimes look for. The right
# one is not guessed: it is the first that transformers maps back to the in-memory name.
_ON_HUB = {
    "lm_head.": ("language_model.lm_head.",),
    "model.language_model.": ("language_model.model.",),
    "model.vision_tower.": ("vision_tower.vision_model.", "vision_tower."),
    "model.": ("",),
}

# Entries of a config that count layers, and those that are the size of a dimension or a part of it. `max_window_layers` is only a
# limit, and not among them.
_LAYERS = re.compile(r"(?:num_(?:\w+_)?|n_)?layers?|depth")
_SIZES = re.compile(r"(?:hidden|intermediate|vocab|patch)_size|head_dim|(?:num_|max_num_)\w+|attention_heads")
# Entries from which positions are computed.
_POSITIVE = re.compile(r"rope_theta|factor|(?:low|high)_freq_factor|(?:original_)?max_position_embeddings")


@dataclass(frozen=True)
class Architecture:
    """The tensors of one checkpoint, by all their names.

    In-memory names are those of the model in this release of transformers. On-hub names are those of most checkpoints on the
    hub, which other runtimes look for. A checkpoint's files may have either.

    Attributes:
        config: the config with every default filled in, also the dtypes of its parts, as JSON has it.
        names: in-memory tensor name -> name in the checkpoint's files; also for buffers that the model of the config does
            not have, which no artifact holds.
        on_hub: in-memory tensor name -> on-hub name; also for tied tensors that the checkpoint does not hold.
        shapes: in-memory tensor name -> shape that the config implies.
        linears: in-memory names of the linear layers inside the language model, without its LM head.
        tied: in-memory tensor name -> in-memory name of the tensor whose values it shares.
        gated: in-memory names of pairs of linear layers (up, down) with only a product with a gate between them, so that a
            factor may move from the output of `up` to the input of `down`.
    """

    config: dict[str, Any]
    names: dict[str, str]
    on_hub: dict[str, str]
    shapes: dict[str, tuple[int, ...]]
    linears: tuple[str, ...]
    tied: dict[str, str]
    gated: tuple[tuple[str, str], ...] = ()

    def to_json(self) -> dict[str, Any]:
        """All fields but `names`, as values that JSON can hold."""
        return {
            "config": self.config,
            "on_hub": self.on_hub,
            "shapes": self.shapes,
            "linears": self.linears,
            "tied": self.tied,
            "gated": self.gated,
        }

    @classmethod
    def from_json(cls, names: dict[str, str], content: dict[str, Any]) -> Architecture:
        """The architecture of `names` and of what `to_json` returned."""
        return cls(
            config=content["config"],
            names=names,
            on_hub=content["on_hub"],
            shapes={name: tuple(shape) for name, shape in content["shapes"].items()},
            linears=tuple(content["linears"]),
            tied=content["tied"],
            gated=tuple((up, down) for up, down in content["gated"]),
        )

    def source(self, name: str) -> str:
        """The name in the checkpoint's files of the tensor that holds the values of an in-memory tensor, tied or not."""
        return self.names[name if name in self.names else self.tied[name]]

    def in_file_order(self, checkpoint: Checkpoint) -> list[str]:
        """In-memory names of the model's tensors, tied ones included, in the order in which their bytes lie in the files."""

        def place(name: str) -> tuple[str, int, str]:
            info = checkpoint.tensors[self.source(name)]
            return info.file, info.offset, name

        return sorted(self.shapes, key=place)

    def check(self, checkpoint: Checkpoint, ignore_unused: bool = False) -> None:
        """Compare the checkpoint's tensors with those that the config implies, by metadata.

        Args:
            checkpoint: the checkpoint.
            ignore_unused: whether to accept a matrix that the model of the config does not have, and that an artifact
                leaves out.

        Raises:
            BadInputError: if a tensor is missing or has a wrong shape or dtype, or if there is such a matrix.
        """
        for name, shape in self.shapes.items():
            if name not in self.names and name not in self.tied:
                raise BadInputError(
                    f"{checkpoint.folder} lacks tensor {self.on_hub[name]} (shape {list(shape)}), which config.json asks for: "
                    "fetch the checkpoint again or correct its config.json"
                )
            info = checkpoint.weight(self.source(name))
            if info.shape != shape:
                raise BadInputError(
                    f"{checkpoint.folder / info.file}: tensor {self.source(name)} has shape {list(info.shape)}, expected "
                    f"{list(shape)} from config.json: give the config that belongs to these weights"
                )
        weights = {} if ignore_unused else checkpoint.weights
        for name, in_file in self.names.items():
            info = checkpoint.tensors[in_file]
            if name not in self.shapes and in_file in weights and len(info.shape) > 1:
                raise BadInputError(
                    f"{checkpoint.folder / info.file}: config.json describes no layer for tensor {in_file} "
                    f"(shape {list(info.shape)}), so no runtime would use it: give the config that belongs to these weights"
                )


def check_sizes(checkpoint: Checkpoint) -> None:
    """Refuse a config whose numbers cannot belong to the checkpoint, before anything is made of the config.

    It may not have more layers than the checkpoint has tensors, nor sizes beyond those of all tensors.

    Raises:
        BadInputError: with the entry of config.json.
    """
    count = len(checkpoint.tensors)
    largest = max((size for info in checkpoint.tensors.values() for size in info.shape), default=0)
    for place, part in _parts(checkpoint.config):
        for key, value in part.items():
            if _LAYERS.fullmatch(key):
                limit, what = count, f"the checkpoint has {count} tensors"
            elif _SIZES.fullmatch(key):
                limit, what = largest, f"no tensor of the checkpoint has a dimension above {largest}"
            elif key == "image_size" and isinstance(patch := part.get("patch_size"), int) and patch > 0:
                limit = patch * (math.isqrt(largest) + 1)
                what = f"the checkpoint has no positions for that many patches of {patch}"
            elif _POSITIVE.fullmatch(key) and isinstance(value, int | float) and value <= 0:
                limit, what = -1, "it must be above 0"
            else:
                continue
            if isinstance(value, int | float) and not 0 <= value <= limit:
                raise BadInputError(
                    f"{checkpoint.folder / 'config.json'} has {place}{key} {value}, and {what}: give the config that belongs to these "
                    "weights"
                )


def refuse_kernels(checkpoint: Checkpoint) -> None:
    """Refuse a config that names a repository of kernels, which are code that transformers would download and run.

    Raises:
        BadInputError: with the entry of config.json.
    """
    for place, part in _parts(checkpoint.config):
        for key, value in part.items():
            if "_implementation" in key and "/" in json.dumps(value):
                raise BadInputError(
                    f"{checkpoint.folder / 'config.json'} asks for code from {value} ({place}{key}), which vlmconvert does not run: "
                    "remove that entry"
                )


def _parts(config: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """A config and all its parts, each with the beginning of its entries' names, such as `text_config.`."""
    left = [("", config)]
    while left:
        place, part = left.pop()
        yield place, part
        left += [(f"{place}{key}.", value) for key, value in part.items() if isinstance(value, dict)]


def load_config(folder: Path) -> PreTrainedConfig:
    """The config of a checkpoint folder as transformers completes it.

    Raises:
        BadInputError: if transformers refuses the config.
    """
    from transformers import AutoConfig
    from transformers.utils import logging

    logging.set_verbosity_error()
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:
        reason = " ".join(str(error).split())
        raise BadInputError(
            f"transformers refuses {folder / 'config.json'} ({reason[:300]}): correct the config"
        ) from error
    use_sdpa(config)  # it does not matter here, and another implementation may need a package that is not installed
    config.name_or_path = ""  # no result may depend on the path of the folder
    return config


def read_architecture(folder: Path, tensor_names: Iterable[str]) -> Architecture:
    """The architecture of a checkpoint folder, as transformers knows it.

    Args:
        folder: holds config.json; its weights are not read.
        tensor_names: names in the checkpoint's files, on-hub or in-memory.

    Raises:
        BadInputError: if transformers refuses the config, or two names stand for the same weight.
    """
    return describe_architecture(load_config(folder), tensor_names)


def describe_architecture(config: PreTrainedConfig, tensor_names: Iterable[str]) -> Architecture:
    """The architecture of the model that a config describes, as transformers knows it.

    Args:
        config: see `load_config`.
        tensor_names: names in the checkpoint's files, on-hub or in-memory.

    Raises:
        BadInputError: if transformers cannot make the model, or two names stand for the same weight.
    """
    model = _empty_model(config)
    names = _in_memory_names(model, tensor_names)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    tied = {}
    ties = any(getattr(part, "tie_word_embeddings", False) for part in (config, config.get_text_config()))
    if ties and "lm_head.weight" not in names:
        embeddings = next(name for name, part in model.named_modules() if part is model.get_input_embeddings())
        tied["lm_head.weight"] = f"{embeddings}.weight"
    return Architecture(
        config=json.loads(json.dumps(config.to_dict())),  # keys that are numbers become strings, as in a file
        names=names,
        on_hub=_on_hub_names(model, shapes),
        shapes=shapes,
        linears=tuple(_linears(model)),
        tied=tied,
        gated=tuple(_gated(model)),
    )


@contextmanager
def config_to_blame(what: str) -> Iterator[None]:
    """Turn an exception in the `with` block into a `BadInputError` about the config.

    The block must read no weights, so that only the config can be at fault. --debug shows the original exception.

    Args:
        what: what could not be made, such as `no model`.
    """
    try:
        yield
    except (VlmConvertError, ImportError, MemoryError):
        raise
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise BadInputError(
            f"config.json describes {what} that can be made ({type(error).__name__}: {reason}): correct the config"
        ) from error


def _empty_model(config: PreTrainedConfig) -> PreTrainedModel:
    """The model that transformers makes of a config, with its weights on the meta device.

    Raises:
        BadInputError: if transformers cannot make it.
    """
    import torch
    from transformers import AutoModelForImageTextToText

    with config_to_blame("no model"), torch.device("meta"):
        return AutoModelForImageTextToText.from_config(config)


def _in_memory_names(model: PreTrainedModel, tensor_names: Iterable[str]) -> dict[str, str]:
    """In-memory name -> name in the files, by transformers' own mapping, which leaves in-memory names as they are.

    Raises:
        BadInputError: if two names stand for the same weight.
    """
    in_memory = tensor_renaming(model)
    names: dict[str, str] = {}
    for name in tensor_names:
        target = in_memory(name)
        if target in names:
            raise BadInputError(f"tensors {names[target]} and {name} are the same weight {target}: keep one of them")
        names[target] = name
    return names


def _language_modules(model: PreTrainedModel) -> Iterator[tuple[str, nn.Module]]:
    """Every module of the language model with its in-memory name."""
    language_model: nn.Module = model.get_decoder()
    prefix = next(name for name, part in model.named_modules() if part is language_model)
    for name, part in language_model.named_modules():
        yield f"{prefix}.{name}", part


def _linears(model: PreTrainedModel) -> Iterator[str]:
    from torch import nn

    return (name for name, part in _language_modules(model) if isinstance(part, nn.Linear))


def _gated(model: PreTrainedModel) -> Iterator[tuple[str, str]]:
    from torch import nn

    for name, part in _language_modules(model):
        projections = [getattr(part, f"{kind}_proj", None) for kind in ("gate", "up", "down")]
        if all(isinstance(projection, nn.Linear) for projection in projections):
            yield f"{name}.up_proj", f"{name}.down_proj"


def _on_hub_names(model: PreTrainedModel, names: Iterable[str]) -> dict[str, str]:
    """On-hub name of every in-memory name."""
    found: dict[str, str] = {}
    for attempt in range(max(map(len, _ON_HUB.values()))):
        candidates = {}
        for name in names:
            prefix = next((prefix for prefix in _ON_HUB if name.startswith(prefix)), None)
            if prefix is not None and name not in found and attempt < len(_ON_HUB[prefix]):
                candidates[name] = _ON_HUB[prefix][attempt] + name.removeprefix(prefix)
        back = _in_memory_names(model, candidates.values())
        found |= {name: candidate for name, candidate in candidates.items() if back.get(name) == candidate}
    return {name: found.get(name, name) for name in names}
