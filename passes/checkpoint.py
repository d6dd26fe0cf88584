"""Reading a Hugging Face checkpoint: a local folder or a hub id, safetensors only, tensor by tensor.

Opening a checkpoint reads only metadata: the config, the index and the header of every safetensors file. A fault in them is
found here, before any weight is read.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from manifests.errors import BadInputError, printable
from manifests.files import read_json
from manifests.network import is_offline
from passes.checkpoint_files import check_file, weight_files
from passes.header import FLOAT_DTYPES, TensorInfo, read_header

if TYPE_CHECKING:
    import numpy as np

__all__ = [
    "Checkpoint",
    "fetch_checkpoint",
    "open_checkpoint",
    "read_config",
]

_CONFIG, _NO_CONFIG = "config.json", "give a Hugging Face checkpoint folder, which has one"
_STORED = {"F32": "f4", "F16": "f2", "BF16": "u2", "I8": "i1"}  # as numpy calls them
# config.json has a few kilobytes.
_CONFIG_LIMIT = 4_000_000


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint; picklable, since it holds no weights.

    Attributes:
        model: the hub id, or the name of the folder.
        revision: the commit, if it came from the hub.
        folder: the local folder.
        config: content of config.json.
        tensors: name in the files, which may be an on-hub or an in-memory name -> place; of every dtype.
        unread_files: names of other files with weights in the folder, which transformers would not load either.
    """

    model: str
    revision: str | None
    folder: Path
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]
    # Dtypes of tensors that models read; those of others are buffers, which models make themselves.
    dtypes: ClassVar[tuple[str, ...]] = FLOAT_DTYPES
    unread_files: tuple[str, ...] = ()

    def read(self, name: str, rows: tuple[int, int] | None = None) -> np.ndarray:
        """Read one tensor as float32, whatever its dtype in the file.

        Args:
            name: name of the tensor in the checkpoint's files.
            rows: the first and the last (exclusive) index along the first axis; None reads the whole tensor.

        Raises:
            BadInputError: if the file ends inside the tensor.
        """
        import numpy as np

        info = self.tensors[name]
        shape, offset = info.shape, info.offset
        if rows is not None:
            shape = (rows[1] - rows[0], *shape[1:])
            offset += rows[0] * (info.byte_size // info.shape[0])
        values = np.fromfile(self.folder / info.file, dtype=_STORED[info.dtype], count=prod(shape), offset=offset)
        if values.size != prod(shape):
            raise BadInputError(
                f"{self.folder / info.file} ended inside tensor {name}, so it changed while it was read: convert again"
            )
        if info.dtype == "BF16":
            # bfloat16 is the upper half of a float32.
            wide = values.astype(np.uint32)
            wide <<= 16
            values = wide.view(np.float32)
        return values.astype(np.float32, copy=False).reshape(shape)

    def weight(self, name: str) -> TensorInfo:
        """The place of a tensor that a model reads.

        Raises:
            BadInputError: if it is of another dtype.
        """
        info = self.tensors[name]
        if info.dtype not in self.dtypes:
            raise BadInputError(
                f"{self.folder / info.file}: tensor {name} has dtype {info.dtype}, expected {', '.join(self.dtypes[:-1])} or "
                f"{self.dtypes[-1]}: give the float checkpoint"
            )
        return info

    @property
    def weight_files(self) -> list[str]:
        """Names of the safetensors files, sorted."""
        return sorted({info.file for info in self.tensors.values()})

    @property
    def weights(self) -> dict[str, TensorInfo]:
        """The tensors of the dtypes that models read."""
        return {name: info for name, info in self.tensors.items() if info.dtype in self.dtypes}

    @property
    def dtype(self) -> str:
        """The dtypes of the weights, such as `BF16` or `BF16+F32`."""
        return "+".join(sorted({info.dtype for info in self.weights.values()}))

    @property
    def main_dtype(self) -> str:
        """The dtype that takes most bytes of the weights."""
        sizes: Counter[str] = Counter()
        for info in self.weights.values():
            sizes[info.dtype] += info.byte_size
        return sizes.most_common(1)[0][0]


def fetch_checkpoint(
    model: str,
    revision: str | None = None,
    token: str | None = None,
    check: Callable[[Path], None] = lambda folder: None,
) -> tuple[Path, str | None]:
    """The local folder of a checkpoint and, if it came from the hub, its commit.

    A local folder is used as it is. A hub id is downloaded through huggingface_hub into its usual cache: first all files but
    the weights, so that `check` can refuse the model before the weights are downloaded.

    Args:
        model: a folder or a hub id.
        revision: branch, tag or commit on the hub.
        token: access token for the hub.
        check: called with the folder before the weights are downloaded.

    Raises:
        BadInputError: if `model` is neither a folder nor a hub id that can be fetched.
    """
    path = Path(model).expanduser()
    if path.is_dir():
        if revision is not None:
            raise BadInputError(
                f"--revision {revision} is only for hub ids, and {model} is a local folder: leave the option out"
            )
        return path, None
    if path.exists() or model.startswith((".", "/", "~")) or model.count("/") != 1:
        raise BadInputError(
            f"{model} is neither a checkpoint folder nor a hub id: give a folder with config.json, or org/name"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    download = partial(snapshot_download, model, token=token, local_files_only=is_offline())
    patterns = ["*.json", "*.jinja", "*.txt", "*.model", "README.md"]
    try:
        folder = Path(download(revision=revision, allow_patterns=patterns))
        check(folder)
        folder = Path(download(revision=folder.name, allow_patterns=[*patterns, "*.safetensors"]))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        if is_offline():
            raise BadInputError(
                f"{model} is not in the local cache, and --offline forbids to fetch it: fetch it without --offline first, or "
                "give a folder"
            ) from error
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise BadInputError(
            f"{model} could not be fetched from the hub ({reason}): check the id, --revision and --token"
        ) from error
    return folder, folder.name


def open_checkpoint(folder: Path, model: str | None = None, revision: str | None = None) -> Checkpoint:
    """Open a local checkpoint folder and check all its metadata.

    Raises:
        BadInputError: if the config or a weight file is missing, damaged, unsafe or in an unsupported format.
    """
    check_file(folder, _CONFIG, _NO_CONFIG)
    config = read_config(folder)
    if method := _quantization(folder, config):
        raise BadInputError(
            f"{folder} is already quantized ({method}): give the float checkpoint that it was made from"
        )
    files = weight_files(folder, config)
    tensors: dict[str, TensorInfo] = {}
    for file, names in files.named.items():
        header = read_header(folder, file)
        if names is not None and (missing := sorted(names - header.keys())):
            raise BadInputError(
                f"{folder / file} lacks tensor {missing[0]}, which the index places there "
                f"({len(missing)} such tensors): fetch the file again"
            )
        if twice := sorted(header.keys() & tensors.keys()):
            raise BadInputError(
                f"tensor {twice[0]} is in both {tensors[twice[0]].file} and {file}: fetch the checkpoint again"
            )
        tensors |= header
    return Checkpoint(model or printable(folder.resolve().name, "?"), revision, folder, config, tensors, files.unread)


def read_config(folder: Path) -> dict[str, Any]:
    """The checkpoint's config.json.

    Raises:
        BadInputError: if the file is missing or damaged, or names no model_type.
    """
    config = read_json(folder / _CONFIG, _NO_CONFIG, _CONFIG_LIMIT)
    if not isinstance(config, dict) or "model_type" not in config:
        raise BadInputError(f"{folder / _CONFIG} names no model_type: give an unmodified checkpoint folder")
    try:
        json.dumps(config, allow_nan=False)
    except (ValueError, RecursionError) as error:
        raise BadInputError(
            f"{folder / _CONFIG} holds NaN, an infinite number, or too many parts inside of each other: correct the config"
        ) from error
    return config


def _quantization(folder: Path, config: dict[str, Any]) -> str | None:
    """How the weights in a folder were quantized, according to its config or its files; None if they are float."""
    for part in (config, *config.values()):
        if isinstance(part, dict) and (method := part.get("quantization_config")):
            return str(method.get("quant_method", "unknown") if isinstance(method, dict) else method)
    # msmodelslim and MindIE write this key, or the files below.
    if config.get("quantize"):
        return str(config["quantize"])
    return next((path.name for path in sorted(folder.glob("quant_model_description*.json"))), None)
