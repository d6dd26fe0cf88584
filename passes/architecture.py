"""What transformers says of a checkpoint's config: how its tensors are called, and which of them are linear layers.

No weight is read and nothing is traced. Importing transformers takes seconds and hundreds of megabytes, so this is meant for
a process of its own; what comes back is small and picklable.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from manifests.errors import BadInputError
from passes.checkpoint import Checkpoint
from passes.export.template import empty_model, in_memory_names, load_config

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

__all__ = ["Architecture", "read_architecture"]

# In-memory prefix -> prefixes under which checkpoints on the hub carry it, the one that runtimes look for first. Which of
# them is right is not guessed: it is the first that transformers itself maps back to the name in memory.
_ON_HUB = {
    "lm_head.": ("language_model.lm_head.",),
    "model.language_model.": ("language_model.model.",),
    "model.vision_tower.": ("vision_tower.vision_model.", "vision_tower."),
    "model.vision_model.": ("vision_model.",),
    "model.multi_modal_projector.": ("multi_modal_projector.",),
    "model.vision_resampler.": ("vision_resampler.",),
    "model.image_newline": ("image_newline",),
}


@dataclass(frozen=True)
class Architecture:
    """The tensors of one checkpoint, by all their names.

    Attributes:
        config: the config with every default filled in.
        names: in-memory tensor name -> name in the checkpoint's files; also of buffers that the config does not ask for,
            which no artifact holds.
        on_hub: in-memory tensor name -> on-hub name; also for tensors that the checkpoint ties and does not hold.
        shapes: in-memory tensor name -> shape that the config implies.
        linears: in-memory names of the linear layers inside the language model, without its LM head.
        tied: in-memory tensor name -> in-memory name of the tensor whose values it shares.
        gated: (up, down) in-memory names of linear layers with nothing between them but a product with a gate, so that a
            factor may move from one's output to the other's input.
    """

    config: dict[str, Any]
    names: dict[str, str]
    on_hub: dict[str, str]
    shapes: dict[str, tuple[int, ...]]
    linears: tuple[str, ...]
    tied: dict[str, str]
    gated: tuple[tuple[str, str], ...] = ()

    def source(self, name: str) -> str:
        """The name in the checkpoint's files of the values of an in-memory tensor."""
        return self.names[name if name in self.names else self.tied[name]]

    def in_file_order(self, checkpoint: Checkpoint) -> list[str]:
        """In-memory names of the model's tensors, tied ones too, in the order in which a disk reads them."""

        def place(name: str) -> tuple[str, int, str]:
            info = checkpoint.tensors[self.source(name)]
            return info.file, info.offset, name

        return sorted(self.shapes, key=place)

    def check(self, checkpoint: Checkpoint) -> None:
        """Compare the checkpoint's tensors with what the config implies, on metadata.

        Raises:
            BadInputError: if a tensor is missing or misshapen, or the language model has a matrix that the config does not
                know, so that a description by the config would leave a linear layer out.
        """
        for name, shape in self.shapes.items():
            if name not in self.names and name not in self.tied:
                raise BadInputError(
                    f"{checkpoint.folder} lacks tensor {self.on_hub[name]} (shape {list(shape)}), which config.json asks for: "
                    "fetch the checkpoint again or mend its config.json"
                )
            info = checkpoint.tensors[self.source(name)]
            if info.shape != shape:
                raise BadInputError(
                    f"{checkpoint.folder / info.file}: tensor {self.source(name)} has shape {list(info.shape)}, expected "
                    f"{list(shape)} from config.json: give the config that belongs to these weights"
                )
        for name, in_file in self.names.items():
            info = checkpoint.tensors[in_file]
            if name not in self.shapes and len(info.shape) > 1:
                raise BadInputError(
                    f"{checkpoint.folder / info.file}: config.json knows no layer for tensor {in_file} "
                    f"(shape {list(info.shape)}), so no runtime would be told of it: give the config that belongs to these weights"
                )


def read_architecture(folder: Path, tensor_names: list[str]) -> Architecture:
    """Ask transformers about a checkpoint folder.

    Args:
        folder: holds config.json; its weights are not read.
        tensor_names: names in its files, in either spelling.

    Raises:
        BadInputError: if transformers refuses the config, or two names stand for one weight.
    """
    config = load_config(folder)
    model = empty_model(config)
    names = in_memory_names(model, tensor_names)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    tied = {}
    ties = any(getattr(part, "tie_word_embeddings", False) for part in (config, config.get_text_config()))
    if ties and "lm_head.weight" not in names:
        embeddings = next(name for name, part in model.named_modules() if part is model.get_input_embeddings())
        tied["lm_head.weight"] = f"{embeddings}.weight"
    return Architecture(
        config=config.to_dict(),
        names=names,
        on_hub=_on_hub_names(model, shapes),
        shapes=shapes,
        linears=tuple(_linears(model)),
        tied=tied,
        gated=tuple(_gated(model)),
    )


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
        back = in_memory_names(model, candidates.values())
        found |= {name: candidate for name, candidate in candidates.items() if back.get(name) == candidate}
    return {name: found.get(name, name) for name in names}
