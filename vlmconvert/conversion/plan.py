"""The plan of a conversion: the passes and estimated sizes of every component; it is made before any work starts."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from manifests.errors import BadInputError
from manifests.model import CalibrationSettings
from passes.base import TransformPass, check_order, parse_pass
from passes.vocabulary import Component
from vlmconvert.families.opened import OpenedModel
from vlmconvert.options import read_options
from vlmconvert.precisions import SIDES, find_precision, max_kl
from vlmconvert.recipes.layers import chosen_layers
from vlmconvert.recipes.recipe import Recipe
from vlmconvert.targets.base import ComponentPlan, ComponentRequest, Target

__all__ = ["Plan", "make_plan"]


@dataclass(frozen=True)
class Plan:
    """Everything that a conversion will do.

    Attributes:
        target: the target that the artifact is made for.
        options: values of the target's options.
        calibration: settings of the calibration samples.
        components: plan of each component.
        unused_tensors: in-memory names of the tensors that no component reads.
    """

    target: Target
    options: dict[str, Any]
    calibration: CalibrationSettings
    components: tuple[ComponentPlan, ...]
    unused_tensors: tuple[str, ...]

    @property
    def calibrates_blocks(self) -> bool:
        """Whether any pass needs `samples`."""
        return any(map(_compresses_by_activations, self.components))

    @property
    def quantizes_activations(self) -> bool:
        """Whether any pass needs `vision_samples`."""
        return any(step.quantizes_activations for plan in self.components for step in plan.steps)

    @property
    def calibrates(self) -> bool:
        """Whether any pass needs calibration samples."""
        return self.calibrates_blocks or self.quantizes_activations

    @property
    def sample_counts(self) -> dict[str, int]:
        """Name of a component -> number of samples that must flow through it; components that need none are missing."""
        counts: dict[str, int] = {}
        needed = 0
        for plan in reversed(self.components):
            if _compresses_by_activations(plan):
                needed = max(needed, self.calibration.samples)
            if any(step.quantizes_activations for step in plan.steps):
                needed = max(needed, self.calibration.vision_samples)
            if needed:
                counts[plan.component.name] = needed
        return counts

    @property
    def size_after(self) -> int:
        """Estimated bytes of the finished components."""
        return sum(plan.size_after for plan in self.components)

    @property
    def max_kl(self) -> float:
        """The default limit for the KL divergence of the artifact from the checkpoint, in nats."""
        return max_kl(*([p.precision for p in self.components if p.component.side == side] for side in SIDES))

    @property
    def label(self) -> str:
        """The part of an artifact's default name that has the target and the precisions."""
        language = self.components[-1].precision
        vision = [plan.precision for plan in self.components if plan.component.side == "vision"]
        return "-".join((self.target.name, language, *vision[:1]))


def make_plan(recipe: Recipe, target: Target, model: OpenedModel) -> Plan:
    """Check a recipe against a checkpoint, and plan the conversion.

    Args:
        recipe: the recipe.
        target: target of the recipe.
        model: the checkpoint.

    Raises:
        BadInputError: if the recipe names a component, pass, option or layer that does not exist, its passes cannot
            follow each other, or a value is out of range.
    """
    offered = [option for option in target.options if not option.in_passes]
    options = read_options(offered, recipe.options, f"--target {target.name}")
    components = target.components(model)
    names = [component.name for component in components]
    if unknown := sorted(recipe.components.keys() - set(names)):
        raise BadInputError(
            f"the recipe has a component {unknown[0]}, which {model.family.name} models for {target.name} do not have: their "
            f"components are {', '.join(names)}"
        )
    if missing := [name for name in names if name not in recipe.components]:
        raise BadInputError(f"the recipe has no component {missing[0]}: add a table [components.{missing[0]}]")
    plans = []
    for component in components:
        own = recipe.components[component.name]
        steps = tuple(_transform(component, line) for line in own.passes)
        check_order(component, steps, target.ends)
        layers = chosen_layers(component, own.layers, steps, model.templates.shapes)
        precision = find_precision(steps, target.name)
        asked = ComponentRequest(model, component, precision, steps, layers, options)
        plans.append(target.plan(asked))
    plan = Plan(target, options, recipe.calibration, tuple(_with_notes(plans)), model.unused)
    _check_samples(plan)
    return plan


def _transform(component: Component, line: str) -> TransformPass:
    try:
        item = parse_pass(line)
    except BadInputError as error:
        raise BadInputError(f"component {component.name}: {error}") from error
    if not isinstance(item, TransformPass):
        raise BadInputError(
            f"component {component.name}: pass {item.name} works on finished artifacts: remove it from the recipe"
        )
    return item


def _compresses_by_activations(plan: ComponentPlan) -> bool:
    """Whether a pass of a component needs activations to compress weights."""
    steps = [step for step in plan.steps if not step.quantizes_activations]
    return any(step.needs_activations(role) for step in steps for role in _roles(plan.component))


def _roles(component: Component) -> set[str]:
    return {block.role for block in component.blocks}


def _check_samples(plan: Plan) -> None:
    """Refuse passes that need calibration samples if the plan has no samples."""
    if plan.calibration.samples or not plan.calibrates_blocks:
        return
    for part in plan.components:
        for step in part.steps:
            if not step.quantizes_activations and any(map(step.needs_activations, _roles(part.component))):
                raise BadInputError(
                    f"component {part.component.name}: pass {step.name} needs calibration samples, but there are none: use "
                    "--samples 64 (in a recipe, samples = 64 under [calibration]), or leave the pass out (--ratio 1 ranks no layers)"
                )


def _with_notes(plans: list[ComponentPlan]) -> list[ComponentPlan]:
    """The plans, with a note on each component whose activations stay float because no sample reaches it."""
    run = {plan.component.side for plan in plans if any(step.quantizes_activations for step in plan.steps)}
    return [
        plan
        if plan.component.calibrated or plan.component.side not in run or plan.precision in {"fp32", "custom"}
        else replace(
            plan,
            fallbacks=(
                f"{plan.component.name}: {plan.precision}, its activations stay float since no sample reaches it",
                *plan.fallbacks,
            ),
        )
        for plan in plans
    ]
