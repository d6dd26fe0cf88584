"""Reading a Hugging Face checkpoint: a local folder or a hub id, safetensors only, tensor by tensor.

Opening a checkpoint reads only metadata: the config, the index and the header of every safetensors file. A fault in them is
found here, before any weight is read.
"""

from __future__ import annotations

import json
import struct
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

from manifests.errors import BadInputError
from manifests.files import read_json
from manifests.network import is_offline

if TYPE_CHECKING:
    import numpy as np

__all__ = [
    "FLOAT_DTYPES",
    "Checkpoint",
    "TensorInfo",
    "fetch_checkpoint",
    "open_checkpoint",
    "read_config",
    "read_header",
]

FLOAT_DTYPES = ("F32", "F16", "BF16")
_BUFFER_DTYPE = "I64"
_DTYPE_SIZES = {"F32": 4, "F16": 2, "BF16": 2, "I8": 1, _BUFFER_DTYPE: 8}
_HEADER_LIMIT = 100_000_000  # the same limit as the safetensors library's


@dataclass(frozen=True)
class TensorInfo:
    """Place of one tensor: `dtype` is F32, F16, BF16, I8 or I64, `offset` counts bytes from the start of the file."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def size(self) -> int:
        """Number of values."""
        count = 1
        for length in self.shape:
            count *= length
        return count

    @property
    def byte_size(self) -> int:
        """Number of bytes."""
        return self.size * _DTYPE_SIZES[self.dtype]


@dataclass(frozen=True)
class Checkpoint:
    """An opened checkpoint; picklable, since it holds no weights.

    The keys of `tensors` are the names in the files, which may be on-hub or in-memory names.
    """

    model: str
    revision: str | None
    folder: Path
    config: dict[str, Any]
    tensors: dict[str, TensorInfo]

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
        stored = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16, "I8": np.int8}[info.dtype]
        shape, offset = info.shape, info.offset
        if rows is not None:
            shape = (rows[1] - rows[0], *shape[1:])
            offset += rows[0] * (info.byte_size // info.shape[0])
        values = np.fromfile(self.folder / info.file, dtype=stored, count=prod(shape), offset=offset)
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

    @property
    def weight_files(self) -> list[str]:
        """Names of the safetensors files, sorted."""
        return sorted({info.file for info in self.tensors.values()})

    @property
    def dtype(self) -> str:
        """The dtypes of the weights, such as `BF16` or `BF16+F32`."""
        return "+".join(sorted({info.dtype for info in self.tensors.values()}))

    @property
    def main_dtype(self) -> str:
        """The dtype that takes most bytes of the weights."""
        sizes: Counter[str] = Counter()
        for info in self.tensors.values():
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
    config = read_config(folder)
    if method := _quantization(folder, config):
        raise BadInputError(
            f"{folder} is already quantized ({method}): give the float checkpoint that it was made from"
        )
    tensors: dict[str, TensorInfo] = {}
    for file, names in _weight_files(folder).items():
        header = read_header(folder, file, (*FLOAT_DTYPES, _BUFFER_DTYPE))
        if names is not None and (missing := sorted(names - header.keys())):
            raise BadInputError(
                f"{folder / file} lacks tensor {missing[0]}, which the index places there "
                f"({len(missing)} such tensors): fetch the file again"
            )
        for name, info in header.items():
            if name in tensors:
                raise BadInputError(
                    f"tensor {name} is in both {tensors[name].file} and {file}: fetch the checkpoint again"
                )
            # Integers are position ids in older checkpoints; they are not weights, and models make them themselves.
            if info.dtype != _BUFFER_DTYPE:
                tensors[name] = info
    return Checkpoint(model or folder.resolve().name, revision, folder, config, tensors)


def read_config(folder: Path) -> dict[str, Any]:
    """The checkpoint's config.json.

    Raises:
        BadInputError: if the file is missing or damaged, or names no model_type.
    """
    config = read_json(folder / "config.json", "give a Hugging Face checkpoint folder, which has one")
    if not isinstance(config, dict) or "model_type" not in config:
        raise BadInputError(f"{folder / 'config.json'} names no model_type: give an unmodified checkpoint folder")
    return config


def _quantization(folder: Path, config: dict[str, Any]) -> str | None:
    """How the weights in a folder were quantized, according to its config or its files; None if they are float."""
    for part in (config, config.get("text_config")):
        if isinstance(part, dict) and (method := part.get("quantization_config")):
            return str(method.get("quant_method", "unknown") if isinstance(method, dict) else method)
    # msmodelslim and MindIE write this key, or the files below.
    if config.get("quantize"):
        return str(config["quantize"])
    return next((path.name for path in sorted(folder.glob("quant_model_description*.json"))), None)


def _weight_files(folder: Path) -> dict[str, set[str] | None]:
    """Names of the weight files -> names of the tensors that the index places in each, or None without an index."""
    index_file = folder / "model.safetensors.index.json"
    if index_file.exists():
        index = read_json(index_file)
        weight_map = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(weight_map, dict) or not weight_map:
            raise BadInputError(f"{index_file} has no weight_map: fetch the file again")
        files: dict[str, set[str] | None] = {}
        for name, file in weight_map.items():
            # Only plain file names are allowed, since ".." or an absolute path would lead out of the folder.
            if not isinstance(file, str) or Path(file).name != file or file in {"", ".."}:
                raise BadInputError(
                    f"{index_file} places tensor {name} in {file!r}, outside its own folder: do not use this checkpoint"
                )
            names = files.setdefault(file, set())
            assert names is not None
            names.add(name)
        for file in files:
            if not (folder / file).is_file():
                raise BadInputError(f"{folder / file} is missing, and {index_file.name} names it: fetch the file again")
        return files
    if (folder / "model.safetensors").is_file():
        return {"model.safetensors": None}
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for path in folder.glob(pattern))
    if pickles:
        raise BadInputError(
            f"{folder} holds pickled weights only ({pickles[0]}), which can run code when read: save the model with "
            "save_pretrained, which writes safetensors, and convert that folder"
        )
    raise BadInputError(f"{folder} holds neither model.safetensors nor model.safetensors.index.json: fetch the weights")


def read_header(folder: Path, file: str, dtypes: Sequence[str] = FLOAT_DTYPES) -> dict[str, TensorInfo]:
    """The tensors of one safetensors file.

    Args:
        folder: the folder of the file.
        file: name of the file.
        dtypes: accepted dtypes.

    Raises:
        BadInputError: if the file is damaged, or holds a tensor of another dtype.
    """
    path = folder / file
    damaged = f"{path} is not a whole safetensors file"
    size = path.stat().st_size
    with path.open("rb") as stream:
        prefix = stream.read(8)
        length = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if not 2 <= length <= min(_HEADER_LIMIT, size - 8):
            raise BadInputError(f"{damaged} (header of {length} bytes in a file of {size}): fetch the file again")
        try:
            header = json.loads(stream.read(length))
        except ValueError as error:
            raise BadInputError(f"{damaged} (its header is not JSON): fetch the file again") from error
    header.pop("__metadata__", None)
    tensors = {}
    end = 0
    for name, entry in header.items():
        try:
            dtype, shape, (first, last) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        except (KeyError, TypeError, ValueError) as error:
            raise BadInputError(f"{damaged} (entry {name} is malformed): fetch the file again") from error
        if dtype not in dtypes:
            mend = "convert the checkpoint again" if "I8" in dtypes else "give the float checkpoint"
            known = [dtype for dtype in dtypes if dtype != _BUFFER_DTYPE]
            raise BadInputError(
                f"{path}: tensor {name} has dtype {dtype}, expected {', '.join(known[:-1])} or {known[-1]}: {mend}"
            )
        info = TensorInfo(file, dtype, shape, 8 + length + first)
        if last - first != info.byte_size or first < 0:
            raise BadInputError(
                f"{path}: tensor {name} of shape {list(shape)} takes {info.byte_size} bytes as {dtype}, "
                f"and its header gives {last - first}: fetch the file again"
            )
        tensors[name] = info
        end = max(end, last)
    if size != 8 + length + end:
        raise BadInputError(
            f"{path} has {size} bytes, but its header describes {8 + length + end}: fetch the file again"
        )
    return tensors
