"""Build files: TOML files with the options or recipes of several variants of a checkpoint."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from calibration.sources import BUILT_IN
from manifests.errors import BadInputError
from vlmconvert.options import Option
from vlmconvert.precisions import Side, precision_names, precision_options
from vlmconvert.recipes.recipe import read_toml
from vlmconvert.targets import TARGETS, load_target

__all__ = ["Variant", "read_build_file"]

# Arguments of `vlmconvert.convert` that `vlmconvert build` takes as options, and those that a build file cannot set.
_OF_BUILD = {"output", "token", "workers", "max_memory", "cluster", "store", "force", "dry_run"}
_NOT_HERE = {"save_recipe", "reporter", "options"}
# Types of arguments whose default depends on the model; the others without a default are texts.
_WITHOUT_DEFAULT: dict[str, type] = {"max_kl": float}
_SIDES: dict[str, Side] = {"llm": "language", "vision": "vision"}
# Arguments that a recipe sets, in addition to the options of precisions and targets.
_IN_RECIPES = {"target", *_SIDES, "samples", "vision_samples", "sequence_length", "seed", "calibration"}
# Names that are allowed for a folder on every operating system, and are not hidden.
_NAME = re.compile(r"\w[\w.+-]*")


@dataclass(frozen=True)
class Variant:
    """One artifact of a build file.

    Attributes:
        name: name of the variant and of its folder.
        arguments: arguments of `vlmconvert.convert`.
    """

    name: str
    arguments: Mapping[str, Any]


def read_build_file(path: Path, arguments: Mapping[str, Any]) -> list[Variant]:
    """Read the variants of a build file, in the order of the file.

    Args:
        path: the file.
        arguments: argument of `vlmconvert.convert` -> its default. A build file may set these arguments, in addition to
            the options of precisions and targets.

    Raises:
        BadInputError: if the file cannot be read or has no variants, a key is unknown, or a value is of the wrong type.
    """
    content = read_toml(path)
    variants = content.pop("variants", None)
    if not isinstance(variants, dict) or not variants:
        raise BadInputError(f"{path} has no variants: add a table such as [variants.int4]")
    options = {option.name: option for name in TARGETS.names for option in load_target(name).options}
    options |= {option.name: option for option in precision_options()}
    keys = options | {
        name: Option(name, _WITHOUT_DEFAULT.get(name, str) if default is None else type(default), "")
        for name, default in arguments.items()
        if name not in _OF_BUILD | _NOT_HERE
    }
    _check(str(path), content, keys)
    made = []
    for name, table in variants.items():
        place = f"{path}: variants.{name}"
        if not isinstance(table, dict):
            raise BadInputError(f"{place} is not a table: write it as [variants.{name}]")
        if not _NAME.fullmatch(name):
            raise BadInputError(
                f"{path}: variant {name!r} cannot be the name of a folder: begin with a letter or digit, and use only letters, "
                "digits, '.', '-', '+' and '_'"
            )
        _check(place, table, keys)
        made.append(Variant(name, _from_folder(path.parent, _merged(place, content, table, set(options)))))
    return made


def _check(place: str, table: Mapping[str, Any], keys: Mapping[str, Option]) -> None:
    """Refuse unknown keys, and values that no variant can have."""
    for key, value in table.items():
        if key in _OF_BUILD:
            raise BadInputError(
                f"{place} has a key {key}, which is an option of the command: remove the key, and give "
                f"--{key.replace('_', '-')} to vlmconvert build"
            )
        if key not in keys:
            raise BadInputError(
                f"{place} has an unknown key {key}: use options of `vlmconvert convert` with underscores, such as group_size"
            )
        try:
            keys[key].read(value)
        except BadInputError as error:
            raise BadInputError(f"{place}: {error}") from error
        if key in _SIDES and value not in (names := precision_names(_SIDES[key])):
            raise BadInputError(f"{place}: {key} cannot be {value}: use {', '.join(names)}")
        if key == "target" and value not in TARGETS:
            raise BadInputError(f"{place}: there is no target {value}: use {', '.join(TARGETS.names)}")


def _merged(place: str, defaults: Mapping[str, Any], own: Mapping[str, Any], options: set[str]) -> dict[str, Any]:
    """Merge the arguments of one variant with the defaults of the file.

    Defaults that do not apply to the variant's target, precisions or recipe are left out.

    Args:
        place: file and name of the variant, for the error.
        defaults: arguments that the file sets for all variants.
        own: arguments that the file sets for this variant.
        options: names of the options of precisions and targets.

    Raises:
        BadInputError: if the variant has a recipe, and also sets an argument that the recipe sets.
    """
    merged = {**defaults, **own}
    if "recipe" in merged:
        said = options | _IN_RECIPES
        if needless := sorted(own.keys() & said):
            raise BadInputError(f"{place} has a recipe, which already sets {needless[0]}: leave one of the two out")
        return {key: value for key, value in merged.items() if key not in said}
    target = merged.get("target", "openvino")
    foreign = options - {option.name for option in (*precision_options(target), *load_target(target).options)}
    foreign |= {key for key, side in _SIDES.items() if merged.get(key) not in precision_names(side, target)}
    return {key: value for key, value in merged.items() if key in own or key not in foreign}


def _from_folder(folder: Path, arguments: dict[str, Any]) -> dict[str, Any]:
    """Resolve relative paths from the folder of the build file; a checkpoint that is not a path is a hub id."""
    paths = {key: folder / arguments[key] for key in ("checkpoint", "recipe", "calibration") if key in arguments}
    found = {key: str(path) for key, path in paths.items() if key == "recipe" or path.exists()}
    if arguments.get("calibration") in BUILT_IN:
        found.pop("calibration", None)
    return arguments | found
