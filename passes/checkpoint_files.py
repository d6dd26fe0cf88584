"""The files of a checkpoint's folder: which of them hold the weights, and whether a file is safe to read.

A checkpoint may come from a stranger. So a file is read only if it is a regular file of a plausible size that lies in the
folder, or in the hub's cache if the folder is a part of it.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from manifests.errors import BadInputError
from manifests.files import read_json

__all__ = ["WeightFiles", "check_file", "check_text", "read_object", "weight_files"]

_WHOLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_SNAPSHOTS, _BLOBS = "snapshots", "blobs"
_TEXT_LIMIT = 1_000_000
_POINTER = b"version https://git-lfs.github.com/spec/"


@dataclass(frozen=True)
class WeightFiles:
    """The files that transformers would load.

    Attributes:
        named: name of each file -> names of the tensors that the index places in it; None without an index.
        unread: names of other files with weights, or with their index, which lie beside them.
    """

    named: dict[str, set[str] | None]
    unread: tuple[str, ...]


def check_file(folder: Path, name: str, mend: str = "fetch the file again") -> Path:
    """The path of a file of a checkpoint.

    Args:
        folder: the checkpoint.
        name: name of the file.
        mend: end of the error message if the file is missing or damaged.

    Raises:
        BadInputError: if it is missing, is no regular file, is a link that leads out of the checkpoint, or is a Git LFS
            pointer in place of the file.
    """
    path = folder / name
    if not os.path.exists(path):  # also if the name is too long, or a link leads to itself
        what = "is a link to a file that does not exist" if os.path.islink(path) else "is missing"
        raise BadInputError(f"{path} {what}: {mend}")
    if not path.is_file():
        raise BadInputError(f"{path} is not a file: {mend}")
    if path.is_symlink() and _leads_out(folder, path):
        raise BadInputError(f"{path} is a link that leads out of the checkpoint: put the file itself there")
    try:
        with path.open("rb") as stream:
            start = stream.read(len(_POINTER))
    except OSError as error:
        raise BadInputError(f"{path} cannot be read ({error.strerror}): {mend}") from error
    if start == _POINTER:
        raise BadInputError(f"{path} is a Git LFS pointer in place of the file: run git lfs pull in that folder")
    return path


def _leads_out(folder: Path, path: Path) -> bool:
    """Whether a link leads out of its folder; in the hub's cache, files are links into a folder beside the snapshots."""
    home, real = folder.resolve(), path.resolve()
    places = [home]
    if home.parent.name == _SNAPSHOTS:
        places.append(home.parents[1] / _BLOBS)
    return not any(real.is_relative_to(place) for place in places)


def read_object(folder: Path, name: str, mend: str = "fetch the file again") -> dict[str, Any]:
    """Read a JSON file of a checkpoint that holds an object.

    Args:
        folder: the checkpoint.
        name: name of the file.
        mend: end of the error message.

    Raises:
        BadInputError: see `check_file`; or if the file is not JSON, or is JSON of another kind.
    """
    content = read_json(check_file(folder, name, mend), mend)
    if not isinstance(content, dict):
        kind = {list: "a list", str: "a text", type(None): "null"}.get(type(content), "a number")
        raise BadInputError(f"{folder / name} holds {kind} in place of an object: {mend}")
    return content


def check_text(folder: Path, name: str, mend: str) -> None:
    """Refuse a text file of a checkpoint that cannot be read.

    Raises:
        BadInputError: see `check_file`; or if the file is too large, or is not UTF-8.
    """
    path = check_file(folder, name, mend)
    if path.stat().st_size > _TEXT_LIMIT:
        raise BadInputError(f"{path} has {path.stat().st_size} bytes, more than such a file can have: {mend}")
    try:
        path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise BadInputError(f"{path} is not UTF-8 ({error}): {mend}") from error


def weight_files(folder: Path, config: dict[str, Any]) -> WeightFiles:
    """Find the files that hold a checkpoint's weights, in the order in which transformers looks for them.

    Args:
        folder: the checkpoint.
        config: content of its config.json.

    Raises:
        BadInputError: if there is none, or one of them is missing or leads out of the folder.
    """
    first = next((name for name in _candidates(folder, config) if os.path.exists(folder / name)), None)
    if first is None:
        raise BadInputError(_nothing(folder))
    named: dict[str, set[str] | None]
    if first.endswith(".json"):
        named = dict(_indexed(folder, first))
    else:
        check_file(folder, first)
        named = {first: None}
    beside = {path.name for pattern in ("*.safetensors", "*.safetensors.index.json") for path in folder.glob(pattern)}
    return WeightFiles(named, tuple(sorted(beside - {first, *named})))


def _candidates(folder: Path, config: dict[str, Any]) -> tuple[str, ...]:
    named = config.get("transformers_weights")
    if named is None:
        return _WHOLE, _INDEX
    if not isinstance(named, str) or not _is_plain(named) or not named.endswith((_WHOLE[5:], _INDEX[5:])):
        raise BadInputError(
            f"{folder / 'config.json'} names the weights {named!r} (transformers_weights), and not a safetensors file in its "
            "own folder: remove that entry"
        )
    return (named,)


def _is_plain(name: str) -> bool:
    """Whether a name leads nowhere else than to a file of the same folder."""
    return Path(name).name == name and "\\" not in name and "\0" not in name and name not in {"", ".."}


def _nothing(folder: Path) -> str:
    """Why a folder has no weights that can be read, and the mend."""
    if (folder / "adapter_config.json").exists():
        return f"{folder} holds an adapter without its base model: merge the two with merge_and_unload, and convert the result"
    if pickles := sorted(path.name for pattern in _PICKLES for path in folder.glob(pattern)):
        return (
            f"{folder} holds pickled weights only ({pickles[0]}), which can run code when read: save the model with "
            "save_pretrained, which writes safetensors, and convert that folder"
        )
    others = sorted(path.name for path in folder.glob("*.safetensors"))
    mend = f"rename {others[0]}, if it holds the whole model" if others else "fetch the weights"
    return f"{folder} holds neither {_WHOLE} nor {_INDEX}: {mend}"


def _indexed(folder: Path, index: str) -> dict[str, set[str]]:
    """Name of each shard -> names of the tensors that the index places there."""
    weight_map = read_object(folder, index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise BadInputError(f"{folder / index} has no weight_map: fetch the file again")
    files: dict[str, set[str]] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or not _is_plain(file):
            raise BadInputError(
                f"{folder / index} places tensor {name} in {file!r}, outside its own folder: do not use this checkpoint"
            )
        files.setdefault(file, set()).add(name)
    for file in files:
        check_file(folder, file, f"{index} names it, so fetch it again")
    return files
