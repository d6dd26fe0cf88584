"""What a conversion will take: memory, disk and time, from the plan, the shapes of its activations and this machine's speed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import ceil, prod

from manifests.errors import BadInputError
from passes.base import Effort
from passes.compress.layers import MOST_TOKENS
from passes.sketch import Sketch
from passes.tables import PIECE, large_table
from passes.vocabulary import Block
from vlmconvert.conversion.machine import Machine, cores, free_memory
from vlmconvert.conversion.plan import Plan
from vlmconvert.conversion.reference import fits_whole
from vlmconvert.conversion.validate import BATCH, MINUTE, Limits
from vlmconvert.families.opened import OpenedModel
from vlmconvert.targets.base import ComponentPlan

__all__ = ["Forecast", "Resources", "choose_resources", "forecast"]

_GIB = 1 << 30
# Memory of an idle process of vlmconvert, of the helper with torch and transformers, and of one that validates.
_IDLE, _HELPER, _VALIDATING = 0.3 * _GIB, 1.15 * _GIB, 0.75 * _GIB
# What a block takes that is only exported, and one that is computed (its weights as they are read, and as they are used).
_EXPORT, _COMPUTE = Effort(1.5, 5.0), 1.5
# Operations for each product of two inputs of a layer, to sum up its Hessian on most tokens, to invert it and to use it.
_PRODUCTS = 2.0
# Seconds for opening a checkpoint, for starting processes, and for a block besides the work on its weights.
_OPEN, _START, _BLOCK = 5.0, 4.0, 0.2
# Bytes a second that are written or read with some work on them, such as hashing or converting.
_FLOW = 0.8e9
# Bytes of float32 weights a second at which blocks are loaded for a validation.
_LOADED = 1.4e9


@dataclass(frozen=True)
class Resources:
    """What a conversion may use at the same time.

    Attributes:
        workers: number of processes that compress blocks.
        remote: whether these are on other machines.
        at_once: number of samples that are computed at the same time.
        memory: limit for the memory in bytes; None if there is none.
    """

    workers: int
    remote: bool = False
    at_once: int = 1
    memory: int | None = None


@dataclass(frozen=True)
class Forecast:
    """What a conversion will take.

    Attributes:
        memory: peak of the memory of all its processes on this machine, in bytes.
        disk: maximum number of bytes on the disk at one time, the artifact included.
        seconds: wall time.
    """

    memory: int
    disk: int
    seconds: float


def forecast(
    plan: Plan,
    model: OpenedModel,
    sketch: Sketch | None,
    machine: Machine,
    limits: Limits | None,
    linked: bool,
    resources: Resources,
) -> Forecast:
    """Forecast a conversion that finds nothing in the store.

    Args:
        plan: the plan.
        model: the checkpoint.
        sketch: what one sample takes; None if no sample is needed.
        machine: this machine.
        limits: limits of the validation; None if there is none.
        linked: whether the artifact can be linked to files in the store, because both are on one disk.
        resources: what the conversion may use.
    """
    memory = _IDLE + _HELPER
    weights = sum(info.byte_size for info in model.checkpoint.weights.values())
    seconds = _OPEN + weights / machine.hash / machine.cores
    remote, workers = resources.remote, resources.workers
    disk = done = waiting = 0
    samples = max(plan.sample_counts.values(), default=0)
    inputs = samples * sketch.inputs if sketch is not None else 0
    if samples:
        seconds += _START
    for part in plan.components:
        sizes = _Blocks(model, part)
        computed, kept, chain = _chain(plan, part, sizes, sketch, machine, resources.at_once)
        efforts = list(sizes.efforts())
        own = sum(work.seconds(machine) + _BLOCK for work in efforts)
        making = sorted((work.memory for work in efforts), reverse=True)
        if not making:
            memory = max(memory, _IDLE + max(sizes.largest * _EXPORT.memory, chain))
            seconds += computed + sizes.values * _EXPORT.time / machine.round
        elif remote:
            memory = max(memory, _IDLE + chain)
            seconds += _START + max(own / workers, computed)
        elif workers == 1:  # joblib makes the blocks in this process then, one after the other
            memory = max(memory, _IDLE + making[0] + chain)
            seconds += own + computed
        else:
            memory = max(memory, _IDLE + chain + sum(making[:workers]) + workers * _IDLE)
            seconds += _START + max((own + computed * machine.cores) / machine.cores, own / workers)
        seconds += part.size_after / _FLOW
        blocks = part.size_after if making else 0
        # The activations of a component that needs none are computed for the next one that needs some.
        needed = any(step.needs_activations(block.role) for step in part.steps for block in part.component.blocks)
        kept = max(kept, waiting)
        waiting = 0 if needed else kept
        disk = max(disk, inputs + done + blocks + max(kept if needed else 0, part.size_after))
        done += part.size_after
    copies = 1 if plan.target.links and linked else 2
    disk = max(disk, copies * plan.target.disk(plan.components, plan.options))
    if limits is not None:
        used, taken = _validation(plan, model, sketch, machine, resources.memory, limits, seconds)
        memory, seconds = max(memory, used), seconds + taken
    return Forecast(int(memory), int(disk), seconds)


def choose_resources(
    workers: int | None, remote: bool, blocks: int, limit: int | None, expect: Callable[[Resources], Forecast]
) -> tuple[Resources, Forecast]:
    """Choose how many processes and samples at once fit the memory.

    Args:
        workers: number of processes that was asked for, or that a cluster has; None chooses it.
        remote: whether a cluster has them.
        blocks: number of blocks of the largest component; more processes would have nothing to do.
        limit: limit for the memory in bytes; None takes as much as is free.
        expect: the forecast for some resources.

    Raises:
        BadInputError: if nothing fits the limit; the error says what would.
    """
    most = limit if limit is not None else free_memory()
    for count in [workers] if workers else range(min(cores(), blocks), 0, -1):
        for at_once in range(max(1, cores() // 4), 0, -1):
            resources = Resources(count, remote, at_once, limit)
            expected = expect(resources)
            if expected.memory <= most:
                return resources, expected
    if limit is None:  # what is free changes, and the forecast is not exact
        return resources, expected
    smaller = ""
    if workers and workers > 1 and not remote:
        smaller = f", or {_gib(expect(Resources(1, memory=limit)).memory)} with --workers 1"
    raise BadInputError(f"--max-memory is too small: this conversion needs {_gib(expected.memory)}{smaller}")


@dataclass(frozen=True)
class _Work:
    """What a pass takes to make a block.

    Attributes:
        effort: what the pass says.
        values: number of values of the block's weights.
        taken: bytes of weights in memory at one time.
        widest: number of inputs of the widest layer.
    """

    effort: Effort
    values: int
    taken: int
    widest: int

    @property
    def memory(self) -> float:
        """Bytes of memory."""
        return self.effort.fixed + self.effort.memory * self.taken + self.effort.hessians * 4 * self.widest**2

    def seconds(self, machine: Machine) -> float:
        """Time on one core."""
        products = (MOST_TOKENS + self.widest) * self.widest**2 if self.effort.hessians else 0
        return self.effort.time * self.values / machine.round + _PRODUCTS * products * machine.cores / machine.multiply


class _Blocks:
    """The blocks of a component and what its passes take to make them.

    Attributes:
        values: number of values of all weights.
        largest: bytes in float32 of the largest block that is exported as a whole.
        large: names of the blocks of which only pieces are in memory.
    """

    def __init__(self, model: OpenedModel, part: ComponentPlan) -> None:
        self._part = part
        infos = {block.name: _shapes(model, block) for block in part.component.blocks}
        self._values = {name: sum(map(prod, shapes.values())) for name, shapes in infos.items()}
        self._widest = {
            name: max((shape[1] for shape in shapes.values() if len(shape) == 2), default=0)
            for name, shapes in infos.items()
        }
        self.large = {block.name for block in part.component.blocks if large_table(block, infos[block.name])}
        self.values = sum(self._values.values())
        self.largest = 4 * max(self._values.values(), default=0)

    def efforts(self) -> Iterator[_Work]:
        """For each pass and block, what it takes to make the block."""
        for step in self._part.steps:
            for block in self._part.component.blocks:
                if (effort := step.effort(block.role)) is not None:
                    values = self._values[block.name]
                    taken = PIECE if block.name in self.large else 4 * values
                    yield _Work(effort, values, taken, self._widest[block.name])

    def in_memory(self, block: str) -> int:
        """Bytes of a block's weights in float32."""
        return 4 * self._values[block]


def _shapes(model: OpenedModel, block: Block) -> dict[str, tuple[int, ...]]:
    return {name: model.checkpoint.tensors[model.names[name]].shape for name in block.tensors.values()}


def _chain(
    plan: Plan, part: ComponentPlan, sizes: _Blocks, sketch: Sketch | None, machine: Machine, at_once: int
) -> tuple[float, int, float]:
    """What computing the activations of a component takes: seconds, bytes on the disk, and bytes of memory."""
    count = plan.sample_counts.get(part.component.name, 0)
    if not count or sketch is None:
        return 0.0, 0, 0.0
    blocks = [block for block in sketch.blocks if block.component == part.component.name]
    roles = {block.name: block.role for block in part.component.blocks}
    # The outputs of the LM head are not needed, unless a pass needs statistics of its layers.
    blocks = [
        block
        for block in blocks
        if roles[block.block] != "head" or any(step.needs_activations("head") for step in part.steps)
    ]
    seconds = sum(count * block.operations / machine.multiply + _BLOCK for block in blocks)
    kept = max((count * block.kept for block in blocks), default=0)
    memory = max((_COMPUTE * sizes.in_memory(block.block) + at_once * block.inside for block in blocks), default=0.0)
    return seconds, kept, memory


def _validation(
    plan: Plan,
    model: OpenedModel,
    sketch: Sketch | None,
    machine: Machine,
    limit: int | None,
    limits: Limits,
    seconds: float,
) -> tuple[float, float]:
    """Memory and time of the comparison with the checkpoint, after a conversion that took `seconds`."""
    size = sum(4 * info.size for info in model.checkpoint.weights.values())
    batches = ceil(limits.samples / BATCH)
    longest = max(MINUTE, limits.share * seconds) if limits.share else float("inf")
    # Without a sketch, only the weights are known, which take most of the time and memory of large models.
    operations = sum(block.operations for block in sketch.blocks) if sketch is not None else 0
    if fits_whole(model, plan.size_after, limit):
        once = min(BATCH, limits.samples) * 2 * operations / machine.multiply
        memory = size + 1.5 * plan.size_after
        fixed = (size + plan.size_after) / _FLOW
    else:
        seen = [part.component.name for part in plan.components if part.component.side == "vision"]
        vision = sum(map(sketch.operations, seen)) if sketch is not None else 0
        # Each model computes the vision side once, and the language side twice.
        once = 2 * (2 * operations - vision) / machine.multiply + 3 * size / _LOADED
        memory = 0.0
        for part in plan.components:
            sizes = _Blocks(model, part)
            blocks = [block for block in part.component.blocks if block.name not in sizes.large]
            memory = max(memory, _COMPUTE * max((sizes.in_memory(block.name) for block in blocks), default=0))
        memory += 2 * max(block.kept for block in sketch.blocks) if sketch is not None else 0
        fixed, batches = 0.0, limits.samples
    return _VALIDATING + memory, fixed + min(batches * once, max(once, longest - fixed))


def _gib(size: float) -> str:
    """A size that is rounded up, as `--max-memory` takes it."""
    return f"{ceil(10 * size / _GIB) / 10:g}GiB"
