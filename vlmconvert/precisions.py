"""The table of precisions, from which the command line, plans, size estimates and the README's matrix are made."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cache
from typing import Any, Literal

from passes.base import TransformPass, load_pass
from passes.registry import Registry
from vlmconvert.options import Option

__all__ = [
    "PRECISIONS",
    "SIDES",
    "Precision",
    "Side",
    "find_precision",
    "load_precision",
    "max_kl",
    "precision_names",
    "precision_options",
]

Side = Literal["language", "vision"]
SIDES: tuple[Side, ...] = ("language", "vision")

_GROUP_SIZE = Option(
    "group_size",
    int,
    "int4, w8a16: number of input channels that share a scale, -1 for all.  [default: 64, or -1 for w8a16]",
)
_SYMMETRIC = Option("symmetric", bool, "int4, int8: quantize without zero points.")
_RATIO = Option(
    "ratio",
    float,
    "int4: maximum share of the weights in 4 bit; the most sensitive layers get 8 bit instead.  [default: 1.0]",
)
_ALL_LAYERS = Option("all_layers", bool, "int4: also compress embeddings and LM head to 4 bit, instead of 8 bit.")
_SCALE_ESTIMATION = Option(
    "scale_estimation",
    bool,
    "int4-awq: choose scales that minimize the error of a layer's outputs, instead of the error of its weights."
    "  [default: yes]",
    negatable=True,
)
_SMOOTH_QUANT_ALPHA = Option(
    "smooth_quant_alpha",
    float,
    "int8-ptq: how much of the range SmoothQuant moves from activations to weights, from 0 to 1.  [default: 0.6]",
)
_ALLOW_NONFINITE = Option(
    "allow_nonfinite", bool, "w8a16: accept weights with NaN or infinity, which are otherwise refused."
)
_OUTLIER_SUPPRESSION = Option(
    "outlier_suppression",
    str,
    "w8a16: equalize moves scale factors between the projections of each MLP before quantization, so that outlier "
    "channels keep their precision; the float model computes the same.  [default: none]",
    choices=("none", "equalize"),
)
_GRAPHS = ("openvino", "onnx")
# Of components whose passes are chosen one by one.
_CUSTOM_MAX_KL = 1.0


@dataclass(frozen=True)
class Precision:
    """One row of the table.

    Attributes:
        name: name of the precision, which `--llm` and `--vision` take.
        sides: the sides of a model that can have this precision.
        targets: the targets that can write it.
        export: dtype of the float weights before compression, f32 or f16.
        steps: names of the passes that compress, in the order in which they run. Each pass gets the values of the
            options that have the same names as its fields.
        options: the options of these passes on the command line.
        packages: import names of the packages that must be installed in addition to vlmconvert's own requirements.
        max_kl: what one side in this precision may add to the KL divergence of an artifact from its checkpoint, in nats;
            twice what is usual for small models, which lose more than large ones (`docs/guarding.md`).
    """

    name: str
    sides: tuple[Side, ...]
    targets: tuple[str, ...]
    export: Literal["f32", "f16"] = "f32"
    steps: tuple[str, ...] = ()
    options: tuple[Option, ...] = ()
    packages: tuple[str, ...] = ()
    max_kl: float = 1.0

    def passes(self, values: Mapping[str, Any]) -> tuple[TransformPass, ...]:
        """Make the compressing passes with their options; each follows the passes that it needs.

        Args:
            values: option -> value; options that no pass has are ignored, and None takes the pass's default.

        Raises:
            BadInputError: if a value is out of range.
        """
        made: list[TransformPass] = []
        for name in self.steps:
            kind = load_pass(name)
            own = {field.name for field in fields(kind)}
            item = kind(**{key: value for key, value in values.items() if key in own and value is not None})
            assert isinstance(item, TransformPass)
            made += [*(wanted for wanted in item.prerequisites() if wanted not in made), item]
        return tuple(made)

    @property
    def bits(self) -> int:
        """Number of bits of one weight of a layer, without the scales."""
        for item in reversed(self.passes({})):
            found = item.weight_bits("layer", "", (64, 64))
            if found is not None:
                return int(found.bits)
        return {"f32": 32, "f16": 16}[self.export]


_TABLE = (
    Precision("fp32", ("language", "vision"), _GRAPHS, max_kl=1e-6),
    Precision("fp16", ("language", "vision"), _GRAPHS, export="f16", max_kl=1e-4),
    Precision("int8", ("language", "vision"), _GRAPHS, steps=("compress-int8",), options=(_SYMMETRIC,), max_kl=0.01),
    Precision(
        "int4",
        ("language",),
        _GRAPHS,
        steps=("compress-int4",),
        options=(_GROUP_SIZE, _SYMMETRIC, _RATIO, _ALL_LAYERS),
        max_kl=0.7,
    ),
    Precision(
        "int4-awq",
        ("language",),
        _GRAPHS,
        steps=("compress-int4-awq",),
        options=(_GROUP_SIZE, _SYMMETRIC, _RATIO, _ALL_LAYERS, _SCALE_ESTIMATION),
        max_kl=0.5,
    ),
    Precision(
        "int4-gptq",
        ("language",),
        _GRAPHS,
        steps=("compress-int4-gptq",),
        options=(_GROUP_SIZE, _SYMMETRIC, _RATIO, _ALL_LAYERS),
        max_kl=0.3,
    ),
    Precision(
        "int8-ptq", ("vision",), _GRAPHS, steps=("quantize-int8-ptq",), options=(_SMOOTH_QUANT_ALPHA,), max_kl=0.05
    ),
    Precision(
        "w8a16",
        ("language",),
        ("ascend",),
        steps=("compress-w8a16",),
        options=(_GROUP_SIZE, _ALLOW_NONFINITE, _OUTLIER_SUPPRESSION),
        max_kl=0.01,
    ),
)

PRECISIONS = Registry(
    "precision", "vlmconvert.precisions", "vlmconvert.precisions:Precision", {row.name: row for row in _TABLE}
)


@cache
def load_precision(name: str) -> Precision:
    """Load a precision from the table, or from the entry point `vlmconvert.precisions` of an installed package.

    Raises:
        BadInputError: if no precision has that name, or an installed package registers something else under it.
    """
    found: Precision = PRECISIONS.load(name)
    return found


def precision_names(side: Side, target: str | None = None) -> tuple[str, ...]:
    """Names of the precisions that a side can have, for one target or, with None, for all."""
    rows = (load_precision(name) for name in PRECISIONS.names)
    return tuple(row.name for row in rows if side in row.sides and (target is None or target in row.targets))


def precision_options(target: str | None = None) -> tuple[Option, ...]:
    """The options of the precisions of one target or, with None, of all targets; each option once."""
    rows = (load_precision(name) for name in PRECISIONS.names)
    found = {option.name: option for row in rows if target in (None, *row.targets) for option in row.options}
    return tuple(found.values())


def find_precision(steps: Sequence[TransformPass], target: str) -> str:
    """Find the name of the precision that has these passes; `custom` if no precision has them.

    Args:
        steps: all passes of a component.
        target: name of the target that the component is made for.
    """
    rows = [load_precision(name) for name in PRECISIONS.names]
    compressing = {name for row in rows for name in row.steps}
    taken = tuple(step.name for step in steps if step.name in compressing)
    exported = {getattr(step, "dtype", "f32") for step in steps if step.name.startswith("export-")} or {"f32"}
    for row in rows:
        if target in row.targets and row.steps == taken and exported == {row.export}:
            return row.name
    return "custom"


def max_kl(language: Iterable[str], vision: Iterable[str]) -> float:
    """The default of `--max-kl` in nats: what the least precise component of each side may lose, added up.

    Args:
        language: precisions of the components of the language side; `custom` for passes that no precision has.
        vision: precisions of those of the vision side.
    """
    known = {name: load_precision(name).max_kl for name in PRECISIONS.names}
    return sum(max((known.get(name, _CUSTOM_MAX_KL) for name in side), default=0.0) for side in (language, vision))
