"""The pass infrastructure: passes as frozen dataclasses, their canonical lines, and the one way in which they are called.

A pass is a frozen dataclass whose fields are its options. It prints as one line, and can be made from that line again:
`compress-int4-awq{group_size=64,symmetric=false}`. Recipes hold this canonical line, plans show it, the store hashes it and
manifests record it.

A *transform pass* turns a component from one form into another. A recipe is a list of such passes; each declares the forms
that it `takes` and the form that it `makes`, so that a wrong order is refused before any work. There are three kinds: a
*block pass* (`passes.block_pass`) turns one block into a stored block and may run in another process, a *graph pass*
(`passes.graph_pass`) turns a component's graph into another while its weights stay on disk, and a *tensor pass*
(`passes.tensor_pass`) turns one tensor into others.
"""

from __future__ import annotations

import dataclasses
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar

from manifests.errors import BadInputError, ConversionError
from passes.formats import stored_bits
from passes.registry import Registry
from passes.store import Store

if TYPE_CHECKING:
    from passes.block_pass import BlockPass
    from passes.chain import FloatChain
    from passes.export.template import BlockSource
    from passes.vocabulary import Component

__all__ = [
    "PASSES",
    "WANTED",
    "Context",
    "Effort",
    "Form",
    "Intermediate",
    "Pass",
    "PassError",
    "TransformPass",
    "WeightBits",
    "check_order",
    "final_bits",
    "load_pass",
    "named_failure",
    "parse_pass",
]

T = TypeVar("T")

# Name of a pass -> its class, imported when the pass is needed.
PASSES = Registry(
    "pass",
    "vlmconvert.passes",
    "passes.base:Pass",
    {
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
        "compress-int4-gptq": "passes.compress.gptq:CompressInt4GptqPass",
        "compress-w8a16": "passes.ascend.w8a16:CompressW8A16Pass",
        "quantize-int8-ptq": "passes.compress.int8_ptq:QuantizeInt8PtqPass",
        "validate-blocks": "passes.validate.blocks:ValidateBlocksPass",
        "validate-parity": "passes.validate.parity:ValidateParityPass",
        "validate-accuracy": "passes.validate.accuracy:ValidateAccuracyPass",
        "validate-texts": "passes.validate.texts:ValidateTextsPass",
    },
    classes=True,
)

# Type of an option -> what an error message asks the user to give.
WANTED = {"bool": "true or false", "int": "a whole number", "float": "a number", "str": "a text"}
_LINE = re.compile(r"^(?P<name>[a-z0-9-]+)(?:\{(?P<options>[^{}]*)\})?$")


class Form(StrEnum):
    """The form that a component has between two passes; the values are its names in error messages."""

    CHECKPOINT = "the tensors of a checkpoint"
    SPLIT = "the blocks of a checkpoint"
    F32_BLOCKS = "OpenVINO blocks with float32 weights"
    F16_BLOCKS = "OpenVINO blocks with float16 weights"
    COMPRESSED_BLOCKS = "compressed OpenVINO blocks"
    GRAPH = "an OpenVINO graph"
    ONNX_BLOCKS = "ONNX blocks"
    ONNX_GRAPH = "an ONNX graph"
    TENSORS = "finished tensors"


@dataclasses.dataclass(frozen=True)
class WeightBits:
    """Bits per value that a weight will take, and a sentence if the weight cannot be compressed as asked."""

    bits: float
    fallback: str | None = None


@dataclasses.dataclass(frozen=True)
class Effort:
    """What a pass takes to make a block, in addition to an idle process.

    Attributes:
        memory: peak of the memory, as a multiple of the block's weights in float32.
        time: time on one core, as a multiple of that in which it rounds the block's weights to 8 bit with numpy.
        fixed: bytes of memory that do not depend on the weights.
        hessians: number of matrices in memory with a row and a column, in float32, for each input of the widest layer. The time
            to sum one up and to invert it is added to `time`.
    """

    memory: float
    time: float
    fixed: int = 0
    hessians: float = 0.0


@dataclasses.dataclass(frozen=True)
class Pass:
    """One transformation or one check. Subclasses set `name` and `version`; their fields are its options.

    `version` is part of every store key: increase it when the same options and input give another result.
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
        """Make the pass from options as text.

        Raises:
            BadInputError: if the pass has no such option, or a value is not of the option's type.
        """
        fields = {field.name: field for field in dataclasses.fields(cls)}
        values = {}
        for key, text in options.items():
            if key not in fields:
                mend = f"its options are {', '.join(fields)}" if fields else "leave the option out"
                raise BadInputError(f"pass {cls.name} has no option {key}: {mend}")
            values[key] = _parse_value(cls.name, key, text, str(fields[key].type))
        return cls(**values)


class Intermediate:
    """A component between two passes: its content is determined, but is computed only when it is needed.

    Attributes:
        key: digest of everything that determines the content; the store keeps results by it.
    """

    key: str

    def prepare(self) -> None:
        """Do the long part of the work, such as compressing blocks in other processes, and show its progress."""

    def discard(self) -> None:
        """Remove from the store the results that were needed only to make this component."""


class Context(Protocol):
    """The services that a conversion offers to its passes.

    Attributes:
        component: the component that the pass works on.
        identity: digest of the checkpoint, the traces and the library versions, on which every result depends.
        layers: tensor (in-memory name) -> the precision that this layer gets instead of the component's.
        store: where results are kept.
        samples: number of samples for a pass that compresses weights by activations.
        vision_samples: number of samples for a pass that quantizes activations.
    """

    component: Component
    identity: str
    layers: Mapping[str, str]
    store: Store
    samples: int
    vision_samples: int

    @property
    def chain(self) -> FloatChain:
        """The activations of the float model on the calibration samples, which are processed at the first access."""
        ...

    @property
    def onnx_traces(self) -> Path:
        """A folder with the ONNX graph of every kind of block, as torch exports it."""
        ...

    def in_helper(self, function: Callable[..., T], *arguments: Any) -> T:
        """Run a function in another process, which may import torch and transformers."""
        ...

    def make_blocks(
        self, item: BlockPass, keys: Mapping[int, str], source: Callable[[int], BlockSource], last: bool
    ) -> None:
        """Run a block pass in parallel over the blocks whose results the store lacks.

        Args:
            item: the pass.
            keys: index of a block -> key of its result in the store.
            source: takes the index of a block, and returns what the pass needs to make it.
            last: whether no later pass needs the activations that reach these blocks.
        """
        ...

    def stage(self, title: str, total: int | None = None) -> AbstractContextManager[Callable[[str], None]]:
        """Show the progress of one stage of work; call the yielded function with a label after each of `total` steps."""
        ...


@dataclasses.dataclass(frozen=True)
class TransformPass(Pass, ABC):
    """A pass that a recipe may hold: it turns a component from one form into another.

    Attributes:
        takes: forms that the pass can start from.
        overrides: precisions that single layers may have instead of the pass's own.
        needs_torch: whether the pass imports torch or transformers; a process that runs only other passes saves their memory.
        quantizes_activations: whether the pass quantizes activations, for which it gets `vision_samples` samples.
    """

    takes: ClassVar[tuple[Form, ...]]
    overrides: ClassVar[tuple[str, ...]] = ()
    needs_torch: ClassVar[bool] = False
    quantizes_activations: ClassVar[bool] = False

    @property
    @abstractmethod
    def makes(self) -> Form:
        """The form of the component after this pass."""

    @abstractmethod
    def __call__(self, before: Intermediate, context: Context) -> Intermediate:
        """The component after this pass; the work itself is done when its content is needed.

        Args:
            before: the component in one of the forms that the pass takes.
            context: the services of the conversion.
        """

    @property
    def takes_nonfinite(self) -> bool:
        """Whether the pass takes weights that are NaN or infinite; a checkpoint that has some is refused otherwise."""
        return False

    def needs_activations(self, role: str) -> bool:
        """Whether the pass needs the activations that reach a block of this role."""
        return False

    def scarce(self, tokens: int, channels: int) -> str | None:
        """What the pass does instead with a layer of so many input channels, of whose inputs it sees so few tokens.

        Returns:
            A part of a sentence about the layer; None if the tokens are enough.
        """
        return None

    def prerequisites(self) -> tuple[TransformPass, ...]:
        """Passes that must run at some point before this one; recipes made of command-line options contain them."""
        return ()

    def check(self, component: Component) -> None:
        """Refuse a component that the pass cannot be used for, before any work.

        Raises:
            BadInputError: with the pass, the component and what the component lacks.
        """

    def effort(self, role: str) -> Effort | None:
        """What the pass takes to make a block of this role; None if it does no work on single blocks."""
        return None

    def weight_bits(self, role: str, layer: str, shape: tuple[int, ...]) -> WeightBits | None:
        """Bits per value of a weight after this pass, scales included, or None if the pass does not change weights.

        Args:
            role: role of the block that holds the weight.
            layer: name of the weight's tensor.
            shape: shape of the weight; vectors are never compressed.
        """
        return None

    def override_bits(self, precision: str, shape: tuple[int, ...]) -> float:
        """Bits per value of a weight that gets one of the pass's `overrides`, scales included."""
        return stored_bits(precision, shape)


def final_bits(
    steps: Sequence[TransformPass], role: str, layer: str, shape: tuple[int, ...], override: str | None = None
) -> WeightBits | None:
    """What the last pass that changes a weight makes of it; None if no pass does.

    Args:
        steps: the passes of a component.
        role: see `TransformPass.weight_bits`.
        layer: see `TransformPass.weight_bits`.
        shape: see `TransformPass.weight_bits`.
        override: precision of this layer, if it differs from that of its component.
    """
    if override is not None:
        return WeightBits(
            next(step for step in reversed(steps) if override in step.overrides).override_bits(override, shape)
        )
    made = [found for step in steps if (found := step.weight_bits(role, layer, shape)) is not None]
    return made[-1] if made else None


def check_order(component: Component, steps: Sequence[TransformPass], ends: Sequence[Form]) -> None:
    """Refuse a list of passes that cannot run in this order.

    Args:
        component: the component that the passes will work on.
        steps: the passes, in order.
        ends: forms that the target can write.

    Raises:
        BadInputError: with the component, the pass, the form that the pass would get and the forms that it takes.
    """
    form = Form.CHECKPOINT
    done: list[TransformPass] = []
    for step in steps:
        where = f"component {component.name}: pass {step.name}"
        if step.name in [other.name for other in done]:
            raise BadInputError(f"{where} is listed twice: remove one of the two from the recipe")
        if form not in step.takes:
            place = f"cannot follow {done[-1].name}, which gives {form}" if done else "cannot come first"
            mend = "first" if Form.CHECKPOINT in step.takes else f"after a pass that gives {' or '.join(step.takes)}"
            raise BadInputError(f"{where} {place}: put it {mend}")
        for wanted in step.prerequisites():
            if wanted not in done:
                raise BadInputError(f"{where} needs pass {wanted} before it: add that line to the recipe")
        step.check(component)
        form = step.makes
        done.append(step)
    if form not in ends:
        raise BadInputError(
            f"component {component.name}: its passes end with {form}, and the target writes {' or '.join(ends)}: add the "
            "missing passes"
        )


class PassError(ConversionError):
    """A failure that already says which pass, component and block it comes from."""


@contextmanager
def named_failure(item: Pass, component: str, block: str | None = None, after: Sequence[str] = ()) -> Iterator[None]:
    """Turn an exception in the `with` block into a `PassError` that names pass, component, block and earlier passes.

    A `BadInputError` stays as it is, since it names its cause better.

    Args:
        item: the pass that runs.
        component: name of the component that it works on.
        block: name of the block, if the pass works on one.
        after: names of the passes that ran before.
    """
    try:
        yield
    except (BadInputError, PassError):
        raise
    except Exception as error:
        place = f"{component}, block {block}" if block else component
        before = f" (after {', '.join(after)})" if after else ""
        reason = " ".join(str(error).split()) or type(error).__name__
        raise PassError(f"pass {item.name} failed on {place}{before}: {reason}") from error


def load_pass(name: str) -> type[Pass]:
    """The class of a pass.

    Raises:
        BadInputError: if no pass has that name, or an installed package provides something else under it.
    """
    found: type[Pass] = PASSES.load(name)
    return found


def parse_pass(line: str) -> Pass:
    """Read a canonical line back into its pass.

    Raises:
        BadInputError: if the line is malformed, or the pass or an option in it is unknown.
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
    return load_pass(match["name"]).from_options(options)


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
        raise BadInputError(f"pass {pass_name}: {key}={text} cannot be used: give {WANTED[type_name]}") from None
