"""The plan: which passes run on which component, and what they will write; made before any work starts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from manifests.errors import BadInputError
from passes.base import BlockPass, GraphPass, Pass
from passes.checkpoint import Checkpoint
from passes.compress.int8_ptq import QuantizeInt8PtqPass
from passes.compress.sensitivity import MeasureSensitivityPass
from passes.compress.weights import CompressInt4AwqPass, CompressInt4Pass, CompressInt8Pass, adjusted_group_size
from passes.export.make_stateful import MakeStatefulPass
from passes.export.openvino import ExportOpenvinoPass
from passes.export.slice_lm_head import SliceLmHeadPass
from passes.export.stitch import StitchPass
from passes.onnx.export import ExportOnnxPass
from passes.onnx.slice_lm_head import SliceLmHeadOnnxPass
from passes.onnx.stitch import StitchOnnxPass
from passes.onnx.transfer import TransferOnnxPass
from passes.split import Block, Component, SplitPass, TensorShapes

__all__ = ["LLM_PRECISIONS", "VISION_PRECISIONS", "ComponentPlan", "Options", "Plan", "PlanLine", "make_plan"]

LLM_PRECISIONS = ("fp32", "fp16", "int8", "int4", "int4-awq")
VISION_PRECISIONS = ("fp32", "fp16", "int8", "int8-ptq")

# Bits that one weight takes in each precision, with 16-bit scales and 4- or 8-bit zero points per group or row.
_BITS = {"fp32": 32.0, "fp16": 16.0, "int8": 8.1, "int8-ptq": 8.1}


@dataclass(frozen=True)
class Options:
    """What the user asks for; the defaults are the command line's."""

    target: Literal["openvino", "onnx"] = "openvino"
    llm: str = "int4-awq"
    vision: str = "int8-ptq"
    group_size: int = 64
    symmetric: bool = False
    ratio: float = 1.0
    all_layers: bool = False
    scale_estimation: bool = True
    smooth_quant_alpha: float = 0.6
    logits: Literal["last", "all"] = "last"
    calibration: str = "scenes"
    samples: int = 64
    vision_samples: int = 100
    sequence_length: int = 0
    seed: int = 0

    @property
    def label(self) -> str:
        """What the default name of an artifact says of them."""
        return f"{self.target}-{self.llm}-{self.vision}"


@dataclass(frozen=True)
class PlanLine:
    """What a person is shown of a component before any work starts.

    Attributes:
        blocks: how many.
        passes: canonical lines, in the order they run.
        fallbacks: layers that cannot be compressed as asked, and what they get instead.
        size_before: bytes of the component's tensors in the checkpoint.
        size_after: estimate in bytes.
        files: name -> bytes of files whose sizes are known beforehand.
    """

    name: str
    precision: str
    blocks: int
    passes: tuple[str, ...]
    fallbacks: tuple[str, ...]
    size_before: int
    size_after: int
    files: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class ComponentPlan:
    """What happens to one component.

    Attributes:
        sensitivity: runs first on the blocks that go to 4 bit, if only a share of their weights may.
        block_pass: runs on every block; blocks that are only exported are not stored on their own.
        quantize: runs on the stitched component, if at all.
        stitch: joins the blocks.
        graph_passes: run on the stitched OpenVINO graph.
        transfer: takes what compression has made for OpenVINO over into another target's graph.
        slice_lm_head: runs on the stitched ONNX graph.
        openvino: for another target, the plan of the component whose weights are taken over, where it is quantized whole.
        fallbacks: layers that cannot be compressed as asked, and what they get instead.
        size_before: bytes of the component's tensors in the checkpoint.
        size_after: estimate in bytes.
    """

    component: Component
    precision: str
    sensitivity: MeasureSensitivityPass | None
    block_pass: BlockPass | ExportOpenvinoPass | ExportOnnxPass
    quantize: QuantizeInt8PtqPass | None
    stitch: StitchPass | StitchOnnxPass
    graph_passes: tuple[GraphPass, ...]
    transfer: TransferOnnxPass | None
    slice_lm_head: SliceLmHeadOnnxPass | None
    openvino: ComponentPlan | None
    fallbacks: tuple[str, ...]
    size_before: int
    size_after: int

    @property
    def target(self) -> str:
        """What kind of graph is made."""
        return "onnx" if isinstance(self.stitch, StitchOnnxPass) else "openvino"

    @property
    def passes(self) -> tuple[Pass, ...]:
        """All passes in the order they run."""
        if self.openvino is not None:
            first = list(self.openvino.passes)
        else:
            first = [SplitPass()]
            if isinstance(self.block_pass, BlockPass):
                first.append(ExportOpenvinoPass("f32"))
            first += [step for step in (self.sensitivity, self.block_pass) if step is not None]
        last = (self.transfer, self.stitch, *self.graph_passes, self.slice_lm_head)
        quantize = self.quantize if self.openvino is None else None
        return (*first, *(step for step in (*last, quantize) if step is not None))

    @property
    def ranked(self) -> tuple[int, ...]:
        """Indexes of the blocks whose layers are ranked by sensitivity."""
        if self.sensitivity is None or not isinstance(self.block_pass, CompressInt4Pass):
            return ()
        return tuple(index for index, block in enumerate(self.component.blocks) if self.block_pass.in_4_bit(block.role))

    @property
    def calibrates(self) -> bool:
        """Whether any block needs activations."""
        return bool(self.ranked) or any(
            self.block_pass.needs_activations(block.role) for block in self.component.blocks
        )


@dataclass(frozen=True)
class Plan:
    """Everything that a run will do."""

    components: tuple[ComponentPlan, ...]
    unused_tensors: tuple[str, ...]

    @property
    def lines(self) -> tuple[PlanLine, ...]:
        """The components as a person is shown them."""
        return tuple(
            PlanLine(
                name=item.component.name,
                precision=item.precision,
                blocks=len(item.component.blocks),
                passes=tuple(str(step) for step in item.passes),
                fallbacks=item.fallbacks,
                size_before=item.size_before,
                size_after=item.size_after,
            )
            for item in self.components
        )

    @property
    def calibrates_llm(self) -> bool:
        """Whether any block needs activations."""
        return any(item.calibrates for item in self.components)

    @property
    def calibrates_vision(self) -> bool:
        """Whether any component is quantized on samples."""
        return any(item.quantize is not None for item in self.components)

    @property
    def size_after(self) -> int:
        """Estimate of the bytes of the finished graphs."""
        return sum(item.size_after for item in self.components)

    @property
    def disk(self) -> int:
        """Estimate of the bytes that a run needs at its fullest: stored blocks or the stitched component, and the result."""
        largest = max(item.size_after * (4 if item.quantize else 1) for item in self.components)
        return largest + 2 * self.size_after


def make_plan(
    options: Options,
    checkpoint: Checkpoint,
    components: tuple[Component, ...],
    names: dict[str, str],
    shapes: dict[str, TensorShapes],
    unused: list[str],
) -> Plan:
    """Choose the passes for every component.

    Raises:
        BadInputError: if an option is out of range.
    """
    plans = []
    for component in components:
        plan = _plan_component(options, checkpoint, component, names, shapes)
        plans.append(_for_onnx(plan, options) if options.target == "onnx" else plan)
    return Plan(tuple(plans), tuple(unused))


def _plan_component(
    options: Options,
    checkpoint: Checkpoint,
    component: Component,
    names: dict[str, str],
    shapes: dict[str, TensorShapes],
) -> ComponentPlan:
    """The plan for OpenVINO."""
    precision = options.llm if component.side == "language" else options.vision
    if not any(len(shapes[block.kind][name]) > 1 for block in component.blocks for name in block.tensors):
        precision = "fp32"  # nothing to compress
    fallbacks: list[str] = []
    if precision == "int8-ptq" and not component.calibrated:
        precision = "int8"
        fallbacks.append(f"{component.name}: int8, its activations stay float since no sample reaches it")
    block_pass, quantize = _passes(precision, options)
    graph_passes: list[GraphPass] = []
    if component.state:
        graph_passes.append(MakeStatefulPass())
    if component.logits and options.logits == "last":
        graph_passes.append(SliceLmHeadPass())
    before = after = 0
    for block in component.blocks:
        for parameter, tensor in block.tensors.items():
            info = checkpoint.tensors[names[tensor]]
            before += info.size * (4 if info.dtype == "F32" else 2)
            bits, fallback = _weight_bits(precision, block_pass, block, tensor, shapes[block.kind][parameter])
            after += int(info.size * bits / 8)
            if fallback:
                fallbacks.append(fallback)
    return ComponentPlan(
        component=component,
        precision=precision,
        sensitivity=_sensitivity(block_pass, options.samples),
        block_pass=block_pass,
        quantize=quantize,
        stitch=StitchPass(),
        graph_passes=tuple(graph_passes),
        transfer=None,
        slice_lm_head=None,
        openvino=None,
        fallbacks=tuple(fallbacks),
        size_before=before,
        size_after=after,
    )


def _for_onnx(plan: ComponentPlan, options: Options) -> ComponentPlan:
    """The same component as an ONNX graph, with the weights that compression makes for OpenVINO."""
    component = plan.component
    exported = isinstance(plan.block_pass, ExportOpenvinoPass) and plan.quantize is None
    return replace(
        plan,
        block_pass=ExportOnnxPass(plan.block_pass.dtype) if exported else plan.block_pass,  # type: ignore[union-attr]
        stitch=StitchOnnxPass(),
        graph_passes=(),
        transfer=None if exported else TransferOnnxPass(),
        slice_lm_head=SliceLmHeadOnnxPass() if component.logits and options.logits == "last" else None,
        openvino=plan if plan.quantize is not None else None,
    )


def _passes(precision: str, options: Options) -> tuple[BlockPass | ExportOpenvinoPass, QuantizeInt8PtqPass | None]:
    int4: dict[str, Any] = {
        "group_size": options.group_size,
        "symmetric": options.symmetric,
        "ratio": options.ratio,
        "all_layers": options.all_layers,
    }
    if precision == "fp32":
        return ExportOpenvinoPass("f32"), None
    if precision == "fp16":
        return ExportOpenvinoPass("f16"), None
    if precision == "int8":
        return CompressInt8Pass(options.symmetric), None
    if precision == "int4":
        return CompressInt4Pass(**int4), None
    if precision == "int4-awq":
        data_free = options.samples == 0
        return CompressInt4AwqPass(**int4, scale_estimation=options.scale_estimation, data_free=data_free), None
    if precision == "int8-ptq":
        return ExportOpenvinoPass("f32"), QuantizeInt8PtqPass(options.smooth_quant_alpha)
    raise BadInputError(
        f"precision {precision} is unknown: use {', '.join(dict.fromkeys(LLM_PRECISIONS + VISION_PRECISIONS))}"
    )


def _sensitivity(block_pass: Pass, samples: int) -> MeasureSensitivityPass | None:
    if isinstance(block_pass, CompressInt4Pass) and block_pass.ratio < 1:
        if not samples:
            raise BadInputError(
                "--ratio below 1 ranks the layers on calibration samples: use --samples 64, or --ratio 1"
            )
        return MeasureSensitivityPass(block_pass.group_size)
    return None


def _weight_bits(
    precision: str, block_pass: Pass, block: Block, tensor: str, shape: tuple[int, ...]
) -> tuple[float, str | None]:
    """Bits that a weight will take, and a sentence if it falls back."""
    if len(shape) < 2:
        return 32.0 if precision == "fp32" else 16.0, None
    if not isinstance(block_pass, CompressInt4Pass):
        return _BITS[precision], None
    if not block_pass.in_4_bit(block.role):
        return _BITS["int8"], None
    group = adjusted_group_size(shape[-1], block_pass.group_size)
    if group is None:
        return _BITS["int8"], (
            f"{tensor}: {shape[-1]} channels, not divisible by {block_pass.group_size} or any group from 32: int8 per row"
        )
    bits = 4 + (16 + (0 if block_pass.symmetric else 4)) / (shape[-1] if group == -1 else group)
    bits = block_pass.ratio * bits + (1 - block_pass.ratio) * _BITS["int8"]
    if group != block_pass.group_size:
        return bits, f"{tensor}: {shape[-1]} channels, not divisible by {block_pass.group_size}: group {group}"
    return bits, None
