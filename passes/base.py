"""The pass infrastructure: passes as frozen dataclasses, their canonical lines, and the registry.

A pass is a frozen dataclass whose fields are its options, so it prints as one line and reads back from it:
`compress-int4-awq{group_size=64,symmetric=false}`. That line is what a plan shows, what the store hashes and what the
manifest records. A *block pass* turns one block into a stored block and may run in another process; a *graph pass*
turns one `openvino.Model` into another.
"""

from __future__ import annotations

import dataclasses
import importlib
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from manifests.errors import BadInputError, ConversionError

if TYPE_CHECKING:
    import openvino as ov

    from passes.export.template import BlockSource

__all__ = ["BlockPass", "GraphPass", "Pass", "PassManager", "named_failure", "parse_pass", "pass_class"]

# Canonical name -> where the class lives; nothing heavy is imported before a pass is needed.
_REGISTRY = {
    "split": "passes.split:SplitPass",
    "export-openvino": "passes.export.openvino:ExportOpenvinoPass",
    "export-onnx": "passes.onnx.export:ExportOnnxPass",
    "transfer-onnx": "passes.onnx.transfer:TransferOnnxPass",
    "stitch": "passes.export.stitch:StitchPass",
    "stitch-onnx": "passes.onnx.stitch:StitchOnnxPass",
    "make-stateful": "passes.export.make_stateful:MakeStatefulPass",
    "slice-lm-head": "passes.export.slice_lm_head:SliceLmHeadPass",
    "slice-lm-head-onnx": "passes.onnx.slice_lm_head:SliceLmHeadOnnxPass",
    "measure-sensitivity": "passes.compress.sensitivity:MeasureSensitivityPass",
    "compress-int8": "passes.compress.weights:CompressInt8Pass",
    "compress-int4": "passes.compress.weights:CompressInt4Pass",
    "compress-int4-awq": "passes.compress.weights:CompressInt4AwqPass",
    "compress-w8a16": "passes.compress.w8a16:CompressW8A16Pass",
    "quantize-int8-ptq": "passes.compress.int8_ptq:QuantizeInt8PtqPass",
    "validate-blocks": "passes.validate.blocks:ValidateBlocksPass",
    "validate-parity": "passes.validate.parity:ValidateParityPass",
    "validate-accuracy": "passes.validate.accuracy:ValidateAccuracyPass",
}

_LINE = re.compile(r"^(?P<name>[a-z0-9-]+)(?:\{(?P<options>[^{}]*)\})?$")


@dataclasses.dataclass(frozen=True)
class Pass:
    """One transformation. Subclasses set `name` and `version`; their fields are its options.

    `version` is part of every store key: it grows when the same options and input give another result.
    """

    name: ClassVar[str]
    version: ClassVar[int] = 1

    def __str__(self) -> str:
        options = ",".join(
            f"{field.name}={_format_value(getattr(self, field.name))}" for field in dataclasses.fields(self)
        )
        return f"{self.name}{{{options}}}" if options else self.name

    @classmethod
    def from_options(cls, options: dict[str, str]) -> Pass:
        """Build the pass from option texts; an unknown name or an unreadable value is refused."""
        fields = {field.name: field for field in dataclasses.fields(cls)}
        values = {}
        for key, text in options.items():
            if key not in fields:
                known = ", ".join(fields) or "none"
                raise BadInputError(f"pass {cls.name} has no option {key}: its options are {known}")
            values[key] = _parse_value(cls.name, key, text, str(fields[key].type))
        return cls(**values)

    def needs_activations(self, role: str) -> bool:
        """Whether a block of this role is to be given the activations that reach it."""
        return False


class BlockPass(Pass, ABC):
    """A pass over one block; safe to run in another process."""

    @abstractmethod
    def run(self, source: BlockSource, output: Path) -> None:
        """Write the transformed block as `block.xml` and `block.bin` into the folder `output`.

        Args:
            source: the block's template, its weights and, if the pass asks for them, its activations.
            output: an existing empty folder.
        """


class GraphPass(Pass, ABC):
    """A pass over a whole component's graph."""

    def requires(self, model: ov.Model) -> None:
        """Raise `ConversionError` if the pass cannot work on `model`."""

    @abstractmethod
    def apply(self, model: ov.Model) -> ov.Model:
        """Transform the graph."""

    def ensures(self, model: ov.Model) -> None:
        """Raise `ConversionError` if the result is not what the pass promises."""


@dataclasses.dataclass(frozen=True)
class PassManager:
    """Runs graph passes in order over one component; a failure names the pass, the component and what ran before."""

    component: str
    passes: tuple[GraphPass, ...]

    def __call__(self, model: ov.Model) -> ov.Model:
        """Transform `model` with every pass in turn."""
        done: list[str] = []
        for item in self.passes:
            with named_failure(item, self.component, after=done):
                item.requires(model)
                model = item.apply(model)
                item.ensures(model)
            done.append(item.name)
        return model


@contextmanager
def named_failure(item: Pass, component: str, block: str | None = None, after: Sequence[str] = ()) -> Iterator[None]:
    """Turn whatever goes wrong inside into a `ConversionError` that names pass, component, block and what ran before."""
    try:
        yield
    except Exception as error:
        place = f"{component}, block {block}" if block else component
        before = f" (after {', '.join(after)})" if after else ""
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConversionError(f"pass {item.name} failed on {place}{before}: {reason}") from error


def pass_class(name: str) -> type[Pass]:
    """The class registered under a canonical name.

    Raises:
        BadInputError: if there is none.
    """
    if name not in _REGISTRY:
        raise BadInputError(f"there is no pass {name}: choose from {', '.join(sorted(_REGISTRY))}")
    module, _, attribute = _REGISTRY[name].partition(":")
    loaded: type[Pass] = getattr(importlib.import_module(module), attribute)
    return loaded


def parse_pass(line: str) -> Pass:
    """Read a canonical line back into its pass.

    Raises:
        BadInputError: if the line is malformed, or names an unknown pass or option.
    """
    match = _LINE.match(line.strip())
    if match is None:
        raise BadInputError(f"{line!r} is not a pass line: write name{{option=value,...}}")
    options: dict[str, str] = {}
    for part in filter(None, (match["options"] or "").split(",")):
        key, separator, value = part.partition("=")
        if not separator:
            raise BadInputError(f"{line!r}: option {part!r} has no value: write option=value")
        options[key.strip()] = value.strip()
    return pass_class(match["name"]).from_options(options)


def _format_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value)


def _parse_value(pass_name: str, key: str, text: str, type_name: str) -> Any:
    try:
        if type_name == "bool":
            return {"true": True, "false": False}[text]
        return {"int": int, "float": float, "str": str}[type_name](text)
    except (KeyError, ValueError):
        raise BadInputError(f"pass {pass_name}: {key}={text} is not a {type_name}") from None
