"""`Target`, the interface of a runtime that artifacts are made for; `docs/extending/target.md` shows how to add one.

A target is one object. It says which passes lead to it, and how an artifact is written, described, verified and run.
Everything that depends on the target is in its folder; no other code depends on its name.
"""

from __future__ import annotations

import importlib.util
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, TypeVar

from manifests.errors import BadInputError
from manifests.files import link_or_copy
from passes.checkpoint import read_config

if TYPE_CHECKING:
    from manifests.model import ComponentRecord, FileRecord, Manifest
    from manifests.run_plan import RunPlan
    from manifests.verify import Finding
    from passes.base import Form, Intermediate, TransformPass
    from passes.chain import BlockModels
    from passes.store import Store
    from passes.validate.model import Model
    from passes.vocabulary import Component
    from vlmconvert.families.base import Family
    from vlmconvert.families.opened import OpenedModel
    from vlmconvert.options import Option
    from vlmconvert.targets.runner import ArtifactRunner

__all__ = ["ComponentPlan", "ComponentRequest", "Job", "Target", "source_size"]

T = TypeVar("T")


@dataclass(frozen=True)
class ComponentRequest:
    """The part of a recipe for one component, as a target plans it.

    Attributes:
        model: the checkpoint.
        component: the component.
        precision: name of the precision that has these passes.
        steps: the passes, whose order has been checked.
        layers: in-memory name of a weight -> precision of its layer, for layers that differ from `precision`.
        options: values of the target's options.
    """

    model: OpenedModel
    component: Component
    precision: str
    steps: tuple[TransformPass, ...]
    layers: Mapping[str, str]
    options: Mapping[str, Any]


@dataclass(frozen=True)
class ComponentPlan:
    """The plan of one component.

    Attributes:
        component: the component.
        precision: name of the precision that has these passes, such as int4-awq.
        steps: the passes, in the order in which they run.
        layers: in-memory name of a weight -> precision of its layer, for layers that differ from `precision`.
        fallbacks: sentences about layers that cannot be compressed as requested, and what they get instead.
        size_before: bytes of the component's tensors in the checkpoint.
        size_after: estimated bytes of the finished component.
        files: name -> bytes, for files whose sizes are known before they are written.
    """

    component: Component
    precision: str
    steps: tuple[TransformPass, ...]
    layers: Mapping[str, str]
    fallbacks: tuple[str, ...]
    size_before: int
    size_after: int
    files: Mapping[str, int] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        asked: ComponentRequest,
        size_before: int,
        size_after: int,
        fallbacks: Sequence[str] = (),
        files: Mapping[str, int] | None = None,
    ) -> ComponentPlan:
        """Make the plan for a request, with the sizes and fallbacks that a target has found."""
        return cls(
            asked.component,
            asked.precision,
            asked.steps,
            asked.layers,
            tuple(fallbacks),
            size_before,
            size_after,
            files or {},
        )

    @property
    def lines(self) -> tuple[str, ...]:
        """The canonical lines of the passes."""
        return tuple(map(str, self.steps))


class Job(Protocol):
    """A running conversion, as a target sees it.

    Attributes:
        model: the checkpoint that is converted.
        options: values of the target's options.
        workers: number of files that may be written at once.
        store: where results are kept.
    """

    model: OpenedModel
    options: Mapping[str, Any]
    workers: int
    store: Store

    def in_helper(self, function: Callable[..., T], *arguments: Any) -> T:
        """Run a function in another process, which may import torch and transformers."""
        ...

    def stage(self, title: str, total: int | None = None) -> AbstractContextManager[Callable[[str], None]]:
        """Show the progress of a stage of work; call the yielded function with a label after each of `total` steps."""
        ...


class Target(ABC):
    """One target.

    Every target is the only object of a subclass, which is defined in a module that can be imported.

    Attributes:
        name: name of the target, which `--target` takes.
        title: what sentences call an artifact of this target, such as `OpenVINO IR`.
        summary: the runtimes that open the artifacts, for `--help`.
        ends: forms of a component that the target can write; the last pass of a recipe must make one of them.
        precisions: side -> default precision; a side that is missing has no default.
        options: options of the target on the command line, in addition to those of its precisions.
        extra: extra of `pip install vlmconvert[...]` that the target needs; empty if vlmconvert's own requirements are
            enough.
        packages: import names of the packages that the target needs.
        distributions: packages whose versions an artifact depends on, in addition to those that every artifact depends
            on.
        traced: whether blocks are traced to graphs; a runtime that builds the model's graph itself needs only the
            tensors.
        links: whether an artifact holds links to the files in the store, where that can be, instead of copies.
        runnable: whether `open_runner` can run artifacts on this machine; artifacts that cannot be run are not
            validated.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    summary: ClassVar[str]
    ends: ClassVar[tuple[Form, ...]]
    precisions: ClassVar[Mapping[str, str]]
    options: ClassVar[tuple[Option, ...]] = ()
    extra: ClassVar[str] = ""
    packages: ClassVar[tuple[str, ...]] = ()
    distributions: ClassVar[tuple[str, ...]] = ()
    traced: ClassVar[bool] = False
    links: ClassVar[bool] = False
    runnable: ClassVar[bool] = True

    def check_installed(self) -> None:
        """Refuse the target if its libraries are not installed.

        Raises:
            BadInputError: if one is missing; the error says how to install it.
        """
        missing = [name for name in self.packages if importlib.util.find_spec(name) is None]
        if missing:
            raise BadInputError(
                f'--target {self.name} needs {", ".join(missing)}: pip install "vlmconvert[{self.extra or self.name}]"'
            )

    # Planning.

    @abstractmethod
    def components(self, model: OpenedModel) -> tuple[Component, ...]:
        """The components that are written and described, one by one."""

    def check_precision(self, side: str, precision: str, model: OpenedModel) -> None:
        """Check the precision that was requested for a side for which this target has no component.

        Raises:
            BadInputError: unless the artifact has that side in that precision anyway.
        """
        raise BadInputError(
            f"--{'llm' if side == 'language' else side} {precision} does not go with --target {self.name}: leave the option out"
        )

    @abstractmethod
    def steps(
        self, component: Component, dtype: str, compression: Sequence[TransformPass], options: Mapping[str, Any]
    ) -> tuple[TransformPass, ...]:
        """The passes that lead a component to this target.

        Args:
            component: the component that is converted.
            dtype: dtype of the float weights before compression, f32 or f16.
            compression: passes of the component's precision.
            options: values of the target's options.
        """

    @abstractmethod
    def plan(self, asked: ComponentRequest) -> ComponentPlan:
        """Plan a component from the checkpoint's metadata, without reading weights.

        Raises:
            BadInputError: if the options or passes do not fit the checkpoint.
        """

    def disk(self, plans: Sequence[ComponentPlan], options: Mapping[str, Any]) -> int:
        """Estimate the bytes that all components need on the disk while they are written."""
        return sum(plan.size_after for plan in plans)

    # Making an artifact.

    @abstractmethod
    def write_component(self, plan: ComponentPlan, made: Intermediate, folder: Path, job: Job) -> list[FileRecord]:
        """Write the files of a component.

        Args:
            plan: plan of the component.
            made: result of the component's passes.
            folder: an empty folder for the files, which the store keeps.
            job: the running conversion.

        Returns:
            Records of the files that were hashed while they were written.
        """

    @abstractmethod
    def describe(self, plan: ComponentPlan, files: list[FileRecord], folder: Path) -> ComponentRecord:
        """Make the manifest's record of a component from the written files themselves."""

    @abstractmethod
    def write_assets(self, job: Job, folder: Path) -> list[FileRecord]:
        """Write config, processor and tokenizer into the folder of an artifact, and return their records."""

    def place(self, source: Path, target: Path) -> None:
        """Link or copy a finished file from the store into an artifact."""
        if self.links:
            link_or_copy(source, target)
        else:
            shutil.copyfile(source, target)

    def run_plan(self, job: Job, plans: Sequence[ComponentPlan], folder: Path) -> RunPlan | None:
        """The commands that start the artifact in its runtimes; None if the target has no such plan."""
        return None

    def distributions_with(self, options: Mapping[str, Any]) -> tuple[str, ...]:
        """Packages whose versions an artifact depends on with these options, in addition to those of every artifact."""
        return self.distributions

    # Using an artifact.

    def open_runner(
        self,
        folder: Path,
        manifest: Manifest,
        family: Family,
        device: str,
        config: Mapping[str, Any],
        cache_dir: Path | None,
    ) -> ArtifactRunner:
        """Open an artifact, so that it can be run.

        Args:
            folder: the artifact.
            manifest: manifest of the artifact.
            family: family of the artifact.
            device: device of the runtime.
            config: options of the runtime.
            cache_dir: folder where the runtime keeps compiled graphs; None keeps none.

        Raises:
            BadInputError: if the runtime does not have the device or an option, or the target is not `runnable`.
        """
        raise BadInputError(f"{folder} is {self.title}, which vlmconvert cannot run: use its own runtime")

    def config(self, folder: Path, family: Family) -> dict[str, Any]:
        """The config of an artifact, completed as `vlmconvert.families.complete_config` does."""
        return read_config(folder)

    def blocks(self, folder: Path, manifest: Manifest, family: Family) -> BlockModels | None:
        """The blocks of an artifact, to compute them one by one; None if its components cannot be cut into blocks."""
        return None

    @abstractmethod
    def verify(self, folder: Path, manifest: Manifest, family: Family, damaged: set[str]) -> Iterator[Finding]:
        """Compare the content of an artifact's files with its manifest and with the requirements of the runtime.

        Args:
            folder: the artifact.
            manifest: manifest of the artifact.
            family: family of the artifact.
            damaged: places ("component, file") of the files whose hashes are not those of the manifest.
        """

    def contradictions(self, manifest: Manifest) -> Iterator[str]:
        """Yield a sentence for each statement of a manifest that cannot be true for this target."""
        return iter(())

    def takes(self, family: Family) -> bool:
        """Whether a runtime of this target runs models of a family."""
        return True

    # Folders in the format of this target that another tool has written.

    def recognizes(self, folder: Path) -> bool:
        """Whether a folder without a manifest is in the format of this target."""
        return False

    def verify_foreign(self, folder: Path, family: Family) -> Iterator[Finding]:
        """Check a folder that `recognizes` accepts against the requirements of the runtime."""
        return iter(())

    def open_foreign(self, folder: Path, family: Family, keep: int) -> Model:
        """Open a folder that `recognizes` accepts, so that it can be run.

        Args:
            folder: folder that another tool has written.
            family: family of the model.
            keep: maximum number of bytes of weights that stay in memory between calls.
        """
        raise BadInputError(f"{folder} cannot be run: convert the checkpoint with vlmconvert")


def source_size(model: OpenedModel, component: Component) -> int:
    """Bytes of a component's tensors in the checkpoint."""
    return sum(
        model.checkpoint.tensors[model.names[name]].byte_size
        for block in component.blocks
        for name in block.tensors.values()
    )
