"""`--max-size`: the format of each layer is chosen by what it loses, so that the artifact has at most a given size.

What every block loses in 4 bit is measured at the logits (`passes.effects`), and divided among its layers and their formats
(`passes.compress.measure_formats`). The choice becomes a part of the recipe, which makes the same artifact again without
measuring.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from math import ceil, prod
from pathlib import Path
from typing import Any

from manifests.errors import BadInputError
from manifests.files import read_json
from manifests.model import SizeBudget, SizePoint
from passes.block_pass import BlockResults
from passes.chain import Compute, FloatChain, openvino_compute
from passes.compress.budget import Cost, choose_formats, size_curve
from passes.compress.measure_formats import PROBE_GROUP, LayerErrors, MeasureFormatsPass
from passes.compress.weights import CompressInt4Pass
from passes.effects import effects
from passes.export.ir import BLOCK_FILE
from passes.formats import INT8, stored_bits
from passes.store import digest
from passes.vocabulary import Block, Component
from vlmconvert.console import format_size
from vlmconvert.conversion.answered import answer_places
from vlmconvert.conversion.build import Build
from vlmconvert.conversion.plan import Plan, make_plan
from vlmconvert.families.opened import OpenedModel
from vlmconvert.options import parse_size
from vlmconvert.precisions import SIDES, load_precision
from vlmconvert.recipes.recipe import ComponentRecipe, Recipe
from vlmconvert.targets.base import Target

__all__ = ["MEASURED_TOKENS", "Fitting", "fitted_recipe", "fitting"]

# Tokens by which the errors of layers are measured, and tokens of answers by which the effects of blocks are: as many samples are
# used as have these.
MEASURED_TOKENS, _ANSWER_TOKENS = 16_384, 1000
# Replacements of blocks in each component that are measured by themselves.
_VARIANTS = 12
_POINTS = 40
_SMALLEST = "int4-g128"
# Bytes by which the description of a graph grows for each compressed weight.
_GRAPH_OF_WEIGHT = 5500
_VERSION = 4
_BITS = re.compile(r"(\d+(?:\.\d+)?) *bits?")
_FILE = "effects.json"
# Precision of the passes by which components get layers of several formats, and that of components that no sample reaches.
_BY_LAYER, _WITHOUT_SAMPLES = "int4-gptq", "int8"


@dataclass(frozen=True)
class Fitting:
    """A request for an artifact of a given size, before anything is measured.

    Attributes:
        recipe: a recipe in which all layers whose format will be chosen have the smallest one.
        components: names of the components whose formats are chosen.
        limit: maximum number of bytes of all component files.
        in_8_bit: bytes of all component files if all layers whose format is chosen had 8 bit.
        symmetric: whether 4-bit weights have no zero points.
    """

    recipe: Recipe
    components: tuple[str, ...]
    limit: int
    in_8_bit: int
    symmetric: bool


def fitting(
    text: str,
    recipe: Recipe,
    sides: Sequence[str],
    target: Target,
    options: Mapping[str, Any],
    model: OpenedModel,
    symmetric: bool,
) -> Fitting:
    """Prepare the choice of formats, and refuse a size that no choice can have.

    Args:
        text: maximum size of the component files, such as 4.5GB, or as bits for each weight, such as 4.5bits.
        recipe: the recipe that the other options stand for.
        sides: sides of the model whose formats are chosen.
        target: target of the recipe.
        options: values of the target's options.
        model: the checkpoint.
        symmetric: whether 4-bit weights have no zero points.

    Raises:
        BadInputError: if the size is too small, or the target has no single layers.
    """
    if not target.traced:
        raise BadInputError(
            f"--max-size does not go with --target {target.name}, which takes whole components: leave it out"
        )
    if not sides:
        raise BadInputError("--max-size chooses the formats of a side without a precision: leave out --llm or --vision")
    if not recipe.calibration.samples:
        raise BadInputError("--max-size measures layers on calibration samples, but there are none: use --samples 64")
    steps = load_precision(_BY_LAYER).passes({"symmetric": symmetric, "all_layers": True})
    int8 = load_precision(_WITHOUT_SAMPLES).passes({})
    tables, in_8_bit = dict(recipe.components), dict(recipe.components)
    free: dict[str, dict[str, tuple[int, ...]]] = {}
    for component in target.components(model):
        name, weights = component.name, _weights(component, model)
        if component.side not in sides or not weights:
            continue
        lines = target.steps(component, "f32", steps if component.calibrated else int8, options)
        tables[name] = in_8_bit[name] = ComponentRecipe(passes=list(map(str, lines)))
        if component.calibrated:
            layers = dict.fromkeys(map(_layer, weights), INT8)
            in_8_bit[name] = tables[name].model_copy(update={"layers": layers})
            free[name] = {tensor: shape for tensor, shape in weights.items() if len(shape) == 2 and shape[1] % 32 == 0}
    plan = make_plan(recipe.model_copy(update={"components": in_8_bit}), target, model)
    shapes = [shape for own in free.values() for shape in own.values()]
    graphs = _graphs(plan, model)
    whole = plan.size_after + graphs
    limit = _limit(text, graphs, plan, model)
    least = whole + ceil(sum(_bytes(_SMALLEST, shape, symmetric) - _bytes(INT8, shape) for shape in shapes))
    if least > limit:
        given = [side for side in SIDES if side not in sides]
        mend = f", or leave out the precision of the {given[0]} side" if given else ""
        raise BadInputError(
            f"--max-size {text} is too small for {model.checkpoint.model}: the smallest formats make {format_size(least)} "
            f"({8 * (least - graphs) / _values(plan, model):.2f}bits): give that or more{mend}"
        )
    return Fitting(recipe.model_copy(update={"components": tables}), tuple(free), limit, whole, symmetric)


def fitted_recipe(asked: Fitting, build: Build) -> tuple[Recipe, SizeBudget]:
    """Measure what layers lose, and choose their formats.

    Args:
        asked: what is asked for.
        build: a conversion by the recipe in `asked`, whose plan has as many samples as have `MEASURED_TOKENS`, and which holds all.

    Returns:
        The recipe with the format of every layer, and the record of the choice.

    Raises:
        BadInputError: if the size is too small after all.
    """
    layers = _costs(asked, build)
    # Bytes of what has no choice: other components, vectors, small tables and graphs.
    fixed = asked.in_8_bit - sum(formats[INT8].size for formats in layers.values())
    chosen = choose_formats(layers, asked.limit - fixed)
    if chosen is None:
        least = fixed + size_curve(layers, 1)[0].size
        raise BadInputError(f"--max-size is too small: the smallest artifact has about {format_size(ceil(least))}")
    tables = dict(asked.recipe.components)
    for part in build.plan.components:
        name = part.component.name
        if name in asked.components:
            formats = {tensor: chosen.get(_key(name, tensor), INT8) for tensor in _weights(part.component, build.model)}
            named = {_layer(tensor): layer_format for tensor, layer_format in formats.items()}
            tables[name] = tables[name].model_copy(update={"layers": named})
    budget = SizeBudget(
        limit=asked.limit,
        kl=_figure(sum(layers[layer][layer_format].kl for layer, layer_format in chosen.items())),
        curve=[
            SizePoint(size=round(fixed + point.size), kl=_figure(point.kl)) for point in size_curve(layers, _POINTS)
        ],
    )
    return asked.recipe.model_copy(update={"components": tables}), budget


def _costs(asked: Fitting, build: Build) -> dict[str, dict[str, Cost]]:
    """Layer -> format -> what it costs, for all layers whose format is chosen."""
    measured: dict[tuple[str, str], list[LayerErrors]] = {}
    probes: dict[str, BlockResults] = {}
    for part in build.plan.components:
        if part.component.name not in asked.components:
            continue
        split, context = build.split(part), build.context(part)
        found = MeasureFormatsPass(asked.symmetric).measured(split, context)
        names = [block.name for block in split.component.blocks]
        measured |= {(part.component.name, name): layers for name, layers in zip(names, found, strict=True)}
        probe = CompressInt4Pass(PROBE_GROUP, asked.symmetric, all_layers=True)
        probes[part.component.name] = BlockResults(probe, split, context, {}, range(len(names)))
        probes[part.component.name].make(last=False)
    variants = _variants(build, measured)
    losses = _effects(build, variants, probes)
    for results in probes.values():
        results.discard()
    build.clear()
    costs: dict[str, dict[str, Cost]] = {}
    for blocks, loss in zip(variants, losses, strict=True):
        layers = [(block[0], layer) for block in blocks for layer in measured[block]]
        whole = sum(layer.share for _, layer in layers)
        for component, layer in layers:
            share = layer.share / whole if whole else 1 / len(layers)
            costs[_key(component, layer.tensor)] = _layer_costs(layer, share * loss, asked.symmetric)
    return costs


def _layer_costs(layer: LayerErrors, loss: float, symmetric: bool) -> dict[str, Cost]:
    """Format -> cost of a layer, if the probe loses `loss` nats."""
    return {
        name: Cost(_bytes(name, layer.shape, symmetric), loss * error / layer.probe if layer.probe else 0.0)
        for name, error in layer.errors.items()
    }


def _variants(build: Build, measured: Mapping[tuple[str, str], Sequence[LayerErrors]]) -> list[list[tuple[str, str]]]:
    """The replacements: component and block of each block in it; neighbouring layers of a long component are together."""
    made = []
    for part in build.plan.components:
        name = part.component.name
        blocks = [block for block in part.component.blocks if measured.get((name, block.name))]
        body = [(name, block.name) for block in blocks if block.role == "layer"]
        made += [[(name, block.name)] for block in blocks if block.role != "layer"]
        count = min(_VARIANTS, len(body))
        edges = [len(body) * number // count for number in range(count + 1)] if count else []
        made += [body[first:last] for first, last in pairwise(edges)]
    return made


def _effects(
    build: Build, variants: Sequence[Sequence[tuple[str, str]]], probes: Mapping[str, BlockResults]
) -> list[float]:
    """KL divergence in nats of each replacement; kept in the store."""
    assert build.samples is not None
    samples, model = build.samples, build.model

    def chain_of(count: int) -> FloatChain:
        counts = dict.fromkeys(build.chain.counts, count)
        return replace(build.chain, counts=counts, watch=lambda component, block: None)

    whole = chain_of(len(samples.samples))
    numbers = {
        (component.name, node.name): number
        for number, (component, node) in enumerate(whole.nodes)
        if isinstance(node, Block)
    }
    keys = {name: list(results.keys.values()) for name, results in probes.items()}
    key = digest("effects", _VERSION, whole.inputs_key(max(numbers.values())), variants, keys)

    def make(folder: Path) -> None:
        found = build.in_helper(answer_places, model.checkpoint.folder, samples, model.family, model.config)
        build.close_helper()
        lengths = accumulate(last - first for first, last in found)
        count = next((count for count, total in enumerate(lengths, 1) if total >= _ANSWER_TOKENS), len(found))
        chain = chain_of(count)
        names = [path.name for path in sorted(chain.samples.iterdir())]
        answers = {name: first for name, (first, _) in zip(names, found, strict=True)}
        with build.stage("what blocks lose", len(numbers)) as step:
            replaced = [frozenset(numbers[block] for block in blocks) for blocks in variants]
            losses = effects(chain, replaced, _Probes(probes, chain.at_once), answers, step)
        (folder / _FILE).write_text(json.dumps(losses), encoding="utf-8")

    folder = build.store.get_or_make(key, make, "what blocks lose in 4 bit")
    losses: list[float] = read_json(folder / _FILE, f"delete {folder}")
    return losses


@dataclass(frozen=True)
class _Probes:
    """The blocks in 4 bit, in the store."""

    results: Mapping[str, BlockResults]
    at_once: int

    def compute(self, component: Component, block: Block) -> Compute:
        """See `passes.chain.BlockModels`."""
        import openvino as ov

        index = [other.name for other in component.blocks].index(block.name)
        model = ov.Core().read_model(self.results[component.name].folder(index) / BLOCK_FILE)
        for result, port in zip(model.get_results(), component.kinds[block.kind].outputs, strict=True):
            result.set_friendly_name(port.name)  # a file keeps no name that an input has too
        return openvino_compute(model, self.at_once)


def _weights(component: Component, model: OpenedModel) -> dict[str, tuple[int, ...]]:
    """In-memory name -> shape of the weights of a component that can be compressed."""
    shapes = {
        tensor: model.checkpoint.tensors[model.names[tensor]].shape
        for block in component.blocks
        for tensor in block.tensors.values()
    }
    return {tensor: shape for tensor, shape in shapes.items() if len(shape) > 1}


def _graphs(plan: Plan, model: OpenedModel) -> int:
    """About the bytes of all graphs without weights: those of the blocks' templates, and the compression of each weight."""
    kinds = [block.kind for part in plan.components for block in part.component.blocks]
    weights = sum(len(_weights(part.component, model)) for part in plan.components)
    files = {kind: [model.templates.folder / f"{kind}{end}" for end in (".xml", ".bin")] for kind in set(kinds)}
    sizes = {kind: sum(path.stat().st_size for path in paths) for kind, paths in files.items()}
    return sum(sizes[kind] for kind in kinds) + _GRAPH_OF_WEIGHT * weights


def _limit(text: str, graphs: int, plan: Plan, model: OpenedModel) -> int:
    """Bytes of a size, or of so many bits for each weight and the graphs."""
    match = _BITS.fullmatch(text.strip().lower())
    if match is None:
        try:
            return parse_size("max_size", text)
        except BadInputError as error:
            raise BadInputError(f"{error}, or as bits for each weight: 4.5bits") from None
    return int(float(match[1]) * _values(plan, model) / 8) + graphs


def _values(plan: Plan, model: OpenedModel) -> int:
    """Number of values of all weights that can be compressed."""
    return sum(prod(shape) for part in plan.components for shape in _weights(part.component, model).values())


def _bytes(layer_format: str, shape: tuple[int, ...], symmetric: bool = False) -> float:
    return prod(shape) * stored_bits(layer_format, shape, symmetric) / 8


def _key(component: str, tensor: str) -> str:
    return f"{component}/{tensor}"


def _layer(tensor: str) -> str:
    """The name of a weight's layer, as recipes have it."""
    return tensor.removesuffix(".weight")


def _figure(value: float) -> float:
    return float(f"{value:.3g}")
