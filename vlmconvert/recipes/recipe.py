"""Recipes: the passes of every component as a TOML text that a person can read, change and run."""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from manifests.errors import BadInputError
from manifests.files import first_fault, open_file
from manifests.model import CalibrationSettings, Manifest

__all__ = ["ComponentRecipe", "Recipe", "read_recipe", "recipe_of", "recipe_text"]

# In bytes; a line for each layer of a large model takes a hundredth of it.
_LONGEST = 10_000_000


class ComponentRecipe(BaseModel):
    """The recipe of one component.

    Attributes:
        passes: canonical lines of the passes, in the order in which they run.
        layers: pattern for names of layers -> precision of these layers; if several patterns match, the last one
            counts.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    passes: list[str] = Field(min_length=1)
    layers: dict[str, str] = Field(default_factory=dict)


class Recipe(BaseModel):
    """Everything that decides which artifact a checkpoint is converted to.

    Attributes:
        target: name of the target that the artifact is made for.
        options: values of the target's options.
        calibration: settings of the calibration samples.
        components: name of a component -> its recipe.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    target: str
    options: dict[str, Any] = Field(default_factory=dict)
    calibration: CalibrationSettings = Field(default_factory=CalibrationSettings)
    components: dict[str, ComponentRecipe] = Field(min_length=1)


def read_recipe(path: Path) -> Recipe:
    """Read a recipe from a file.

    Raises:
        BadInputError: if the file is missing, is not TOML, or is not a valid recipe.
    """
    return parse_recipe(read_toml(path), str(path))


def parse_recipe(content: Mapping[str, Any], where: str) -> Recipe:
    """Make a recipe from the tables of a TOML file.

    Args:
        content: the tables.
        where: path of the file, for the error.

    Raises:
        BadInputError: if a key or a value is wrong; the error names the key.
    """
    try:
        return Recipe.model_validate(content)
    except ValidationError as error:
        raise BadInputError(f"{where}: {first_fault(error)}; correct that key") from error


def read_toml(path: Path) -> dict[str, Any]:
    """Read the tables of a TOML file.

    Raises:
        BadInputError: if the file cannot be read.
    """
    try:
        with open_file(path) as stream:
            text = stream.read(_LONGEST + 1)
        if len(text) > _LONGEST:
            raise ValueError(f"it has more than {_LONGEST} bytes")
        return tomllib.loads(text.decode())
    except FileNotFoundError:
        raise BadInputError(f"{path} does not exist: correct the path") from None
    except (OSError, ValueError, RecursionError) as error:
        raise BadInputError(f"{path} cannot be read as TOML ({error}): correct its syntax") from error


def recipe_of(manifest: Manifest) -> Recipe:
    """Make the recipe of a finished artifact from its manifest.

    Raises:
        BadInputError: if the manifest was written by an older version, which did not record all settings, or is no artifact's.
    """
    if manifest.settings is None:
        raise BadInputError(
            f"the manifest of {manifest.name} was written by an older vlmconvert, which did not record the settings: convert "
            "the checkpoint again"
        )
    components = {
        item.name: ComponentRecipe(
            passes=list(item.passes),
            layers={name.removesuffix(".weight"): precision for name, precision in item.layers.items()},
        )
        for item in manifest.components
    }
    try:
        return Recipe(
            target=manifest.target,
            options=manifest.settings.options,
            calibration=manifest.settings.calibration or CalibrationSettings(),
            components=components,
        )
    except ValidationError as error:
        raise BadInputError(
            f"the manifest of {manifest.name} holds no recipe ({first_fault(error)}): convert the checkpoint again"
        ) from error


def recipe_text(recipe: Recipe, calibrated: bool = True) -> str:
    """Write a recipe as TOML.

    Args:
        recipe: the recipe.
        calibrated: whether any pass uses calibration samples; if not, their settings are left out.
    """
    import tomlkit

    document = tomlkit.document()
    document["target"] = recipe.target
    if recipe.options:
        document["options"] = recipe.options
    if calibrated:
        document["calibration"] = recipe.calibration.model_dump()
    components = tomlkit.table(is_super_table=True)
    for name, component in recipe.components.items():
        table = tomlkit.table()
        lines = tomlkit.array()
        lines.extend(component.passes)
        table["passes"] = lines.multiline(True)
        if component.layers:
            table["layers"] = component.layers
        components[name] = table
    document["components"] = components
    return tomlkit.dumps(document)
