"""Targets whose artifacts are tensors, for runtimes that build the graphs of models themselves."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from manifests.errors import BadInputError
from passes.base import TransformPass
from passes.vocabulary import Component
from vlmconvert.options import Option
from vlmconvert.targets.base import ComponentPlan, ComponentRequest, Target

if TYPE_CHECKING:
    from manifests.model import ComponentRecord, FileRecord
    from passes.export.shards import Shards
    from passes.tensor_pass import MadeTensor, Tensors
    from vlmconvert.families.opened import OpenedModel

__all__ = ["SHARD_SIZE", "TensorTarget", "into_shards"]

SHARD_SIZE = Option("shard_size", "size", "Maximum size of the tensors in a weight file.", default=4_000_000_000)


def into_shards(stem: str, groups: list[list[MadeTensor]], options: Mapping[str, Any]) -> Shards:
    """Divide tensors over safetensors files, for a target that has the option `SHARD_SIZE`.

    Args:
        stem: beginning of the files' names.
        groups: groups of tensors that stay together in one file.
        options: values of the target's options.

    Raises:
        BadInputError: if the maximum size of a file is not positive.
    """
    from passes.export.shards import Shards

    size = options[SHARD_SIZE.name]
    if size < 1:
        raise BadInputError(f"{SHARD_SIZE.flag} {size} is too small: give the maximum size of a file, such as 4GB")
    return Shards.packed(stem, groups, size)


class TensorTarget(Target):
    """Base class of the targets whose artifacts are tensors; all components are written as one, called `model`."""

    links: ClassVar[bool] = True

    def components(self, model: OpenedModel) -> tuple[Component, ...]:
        joined = replace(
            model.components[-1],
            name="model",
            role="vision encoder, projector and language model; the runtime has their graphs",
            kinds={},
            blocks=tuple(block for component in model.components for block in component.blocks),
            inputs=(),
            outputs=(),
            state={},
            logits=False,
            host_step=None,
        )
        return (joined,)

    def steps(
        self, component: Component, dtype: str, compression: Sequence[TransformPass], options: Mapping[str, Any]
    ) -> tuple[TransformPass, ...]:
        return tuple(compression)

    @abstractmethod
    def file_sizes(self, made: Tensors, options: Mapping[str, Any]) -> Mapping[str, int]:
        """Name -> bytes of each file to which these tensors are written; reads only metadata."""

    def plan(self, asked: ComponentRequest) -> ComponentPlan:
        model = asked.model
        architecture = model.templates.architecture
        files = self.file_sizes(self.layout(model, asked.steps), asked.options)
        used = {architecture.source(name) for name in architecture.shapes}
        before = sum(model.checkpoint.tensors[name].byte_size for name in used)
        return ComponentPlan.of(asked, before, sum(files.values()), files=files)

    def layout(self, model: OpenedModel, steps: Sequence[TransformPass]) -> Tensors:
        """The tensors that the passes make of the checkpoint's tensors; reads only metadata."""
        from passes.opened import OpenedCheckpoint
        from passes.tensor_pass import TensorPass, Tensors

        tensors = Tensors.of(OpenedCheckpoint(model.checkpoint, model.templates, ""))
        for step in steps:
            assert isinstance(step, TensorPass)
            tensors = tensors.followed_by(step)
        return tensors

    def record(
        self, plan: ComponentPlan, files: list[FileRecord], folder: Path, file_format: str, apart: tuple[str, ...] = ()
    ) -> ComponentRecord:
        """Make the manifest's record of the tensors; the numbers of weights come from the headers of the written files.

        Args:
            plan: plan of the component.
            files: records of the written files.
            folder: folder of the files.
            file_format: name of the format in the manifest.
            apart: endings of the names of tensors that are not weights, such as scales.
        """
        from manifests.model import ComponentRecord
        from passes.export.shards import read_shards

        return ComponentRecord(
            name=plan.component.name,
            role=plan.component.role,
            format=file_format,
            precision=plan.precision,
            files=sorted(files, key=lambda file: not file.path.endswith(".safetensors")),
            inputs=[],
            outputs=[],
            state=[],
            logits=None,
            weights=read_shards(folder).count_weights(apart),
            blocks={},
            passes=list(plan.lines),
            fallbacks=list(plan.fallbacks),
            layers=dict(plan.layers),
        )
