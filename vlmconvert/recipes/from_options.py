"""Making a recipe from the options of the command line."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

from manifests.errors import BadInputError
from manifests.model import CalibrationSettings
from passes.base import TransformPass
from passes.vocabulary import Component
from vlmconvert.families.opened import OpenedModel
from vlmconvert.options import read_options
from vlmconvert.precisions import Precision, Side, load_precision, precision_names, precision_options
from vlmconvert.recipes.recipe import ComponentRecipe, Recipe
from vlmconvert.targets.base import Target

__all__ = ["chosen_precisions", "recipe_from_options"]

# Precision of a component that no calibration sample reaches.
_WITHOUT_SAMPLES = "int8"


def recipe_from_options(
    target: Target,
    model: OpenedModel,
    asked: Mapping[Side, str | None],
    values: Mapping[str, Any],
    options: Mapping[str, Any],
    calibration: CalibrationSettings,
) -> Recipe:
    """Make the recipe that options stand for.

    Args:
        target: the runtime that the artifact is made for.
        model: the checkpoint.
        asked: side -> requested precision; None takes the target's default.
        values: option of the precisions -> value; None takes the pass's default.
        options: values of the target's options.
        calibration: settings of the calibration samples.

    Raises:
        BadInputError: if a precision does not go with the side or the target, or a value is out of range.
    """
    chosen = chosen_precisions(target, asked)
    known = read_options(precision_options(target.name), values, f"--target {target.name}")
    known["data_free"] = calibration.samples == 0
    components = target.components(model)
    for side, name in asked.items():
        if name is not None and side not in {component.side for component in components}:
            target.check_precision(side, name, model)
    recipes = {}
    for component in components:
        row = chosen[component.side]
        if row is None:
            raise BadInputError(
                f"--target {target.name} has no default precision for the {component.side} side: choose one with --llm or --vision"
            )
        dtype, compression = _compression(component, row, known, model)
        steps = target.steps(component, dtype, compression, options)
        recipes[component.name] = ComponentRecipe(passes=list(map(str, steps)))
    said = {option.name for option in target.options if option.in_passes}
    rest = {name: value for name, value in options.items() if name not in said}
    return Recipe(target=target.name, options=rest, calibration=calibration, components=recipes)


def chosen_precisions(target: Target, asked: Mapping[Side, str | None]) -> dict[Side, Precision | None]:
    """The precision of each side; needs no checkpoint.

    Args:
        target: the runtime that the artifact is made for.
        asked: side -> requested precision; None takes the target's default.

    Raises:
        BadInputError: if a precision does not go with the side or the target.
    """
    return {side: _precision(side, name or target.precisions.get(side), target) for side, name in asked.items()}


def _precision(side: Side, name: str | None, target: Target) -> Precision | None:
    if name is None:
        return None
    row = load_precision(name)
    option = "llm" if side == "language" else side
    if side not in row.sides:
        fitting = ", ".join(precision_names(side, target.name))
        raise BadInputError(f"--{option} cannot be {name}, which is not a precision of the {side} side: use {fitting}")
    if target.name not in row.targets and side in target.precisions:
        fitting = ", ".join(precision_names(side, target.name))
        raise BadInputError(f"--{option} {name} does not go with --target {target.name}: use {fitting}")
    if missing := [package for package in row.packages if find_spec(package) is None]:
        raise BadInputError(f"--{option} {name} needs {', '.join(missing)}: install it with pip")
    return row


def _compression(
    component: Component, row: Precision, values: Mapping[str, Any], model: OpenedModel
) -> tuple[str, Sequence[TransformPass]]:
    """The dtype of the float weights and the compressing passes of one component."""
    tensors = [name for block in component.blocks for name in block.tensors.values()]
    if not any(len(model.checkpoint.tensors[model.names[name]].shape) > 1 for name in tensors):
        return "f32", ()  # nothing to compress
    passes = row.passes(values)
    if not component.calibrated and any(item.quantizes_activations for item in passes):
        return "f32", load_precision(_WITHOUT_SAMPLES).passes(values)
    return row.export, passes
