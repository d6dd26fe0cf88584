"""W8A16 weights for Ascend NPUs, in msmodelslim's format ascendV1, which MindIE and vllm-ascend open."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from manifests.errors import BadInputError
from manifests.files import write_json
from passes.base import Form, Intermediate, TransformPass
from vlmconvert.options import Option
from vlmconvert.targets.base import ComponentPlan, ComponentRequest, Job
from vlmconvert.targets.tensor import SHARD_SIZE, TensorTarget, into_shards

if TYPE_CHECKING:
    from manifests.model import ComponentRecord, FileRecord, Manifest
    from manifests.run_plan import RunPlan
    from manifests.verify import Finding
    from passes.ascend.family import AscendFamily
    from passes.ascend.w8a16 import CompressW8A16Pass
    from passes.chain import BlockModels
    from passes.export.segments import Segments
    from passes.tensor_pass import MadeTensor, Tensors
    from passes.validate.model import Model
    from vlmconvert.families.base import Family
    from vlmconvert.families.opened import OpenedModel
    from vlmconvert.targets.runner import ArtifactRunner

__all__ = ["ENGINES", "TARGET", "AscendTarget"]

ENGINES = ("vlmconvert", "msmodelslim")
# Precision that --vision may request -> dtype of the checkpoint for which this is true without any pass.
_FLOATS = {"fp32": "F32", "fp16": "F16"}


class AscendTarget(TensorTarget):
    """W8A16 weights for Ascend NPUs."""

    name = "ascend"
    title = "W8A16 weights for Ascend NPUs"
    summary = "MindIE and vllm-ascend"
    ends = (Form.TENSORS,)
    precisions = {"language": "w8a16"}  # noqa: RUF012  read only, as the base says
    options = (
        SHARD_SIZE,
        Option(
            "engine",
            str,
            "Library that quantizes the weights; msmodelslim holds the whole model in memory.",
            default="vlmconvert",
            choices=ENGINES,
        ),
    )

    def check_precision(self, side: str, precision: str, model: OpenedModel) -> None:
        if _FLOATS.get(precision) != model.checkpoint.dtype:
            raise BadInputError(
                f"--{side} {precision} does not go with --target {self.name}, whose runtimes compute the vision encoder in the "
                f"checkpoint's own {model.checkpoint.dtype}: leave the option out"
            )

    def plan(self, asked: ComponentRequest) -> ComponentPlan:
        _family(asked.model.family)  # refuses a family that no runtime opens
        plan = super().plan(asked)
        if asked.options["engine"] == "vlmconvert":
            return plan
        from passes.ascend.msmodelslim import check_options

        check_options(_w8a16(asked.steps))
        return replace(plan, files={})  # msmodelslim changes the dtype of tensors that stay float

    def disk(self, plans: Sequence[ComponentPlan], options: Mapping[str, Any]) -> int:
        # msmodelslim writes all weights to temporary files; they are written again under the checkpoint's tensor names.
        return super().disk(plans, options) * (2 if options["engine"] == "msmodelslim" else 1)

    def file_sizes(self, made: Tensors, options: Mapping[str, Any]) -> Mapping[str, int]:
        from passes.ascend.format import WEIGHTS_STEM

        return into_shards(WEIGHTS_STEM, made.made(), options).file_sizes

    def write_component(self, plan: ComponentPlan, made: Intermediate, folder: Path, job: Job) -> list[FileRecord]:
        from passes.ascend.format import DESCRIPTION_NAME, WEIGHTS_STEM, description
        from passes.ascend.msmodelslim import calibrate, calibrated_tensors
        from passes.tensor_pass import Tensors

        assert isinstance(made, Tensors)
        item = _w8a16(plan.steps)

        def write(groups: list[list[MadeTensor]], segments: Segments | None) -> list[FileRecord]:
            shards = into_shards(WEIGHTS_STEM, groups, job.options)
            head = description(shards.tensors, item.group_size)
            return [*shards.write(folder, job.workers, segments), write_json(folder / DESCRIPTION_NAME, head)]

        if job.options["engine"] == "vlmconvert":
            return write(made.made(), made.keep_in(job.store))
        with tempfile.TemporaryDirectory(prefix=".msmodelslim-", dir=folder) as temporary:
            raw = Path(temporary)
            job.in_helper(calibrate, made.checkpoint, made.architecture, item, raw)
            return write(calibrated_tensors(made.checkpoint, made.architecture, raw), None)

    def describe(self, plan: ComponentPlan, files: list[FileRecord], folder: Path) -> ComponentRecord:
        from passes.ascend.w8a16 import OFFSET, SCALE

        return self.record(plan, files, folder, f"{self.name}-w8a16", apart=(SCALE, OFFSET))

    def write_assets(self, job: Job, folder: Path) -> list[FileRecord]:
        from vlmconvert.targets.ascend.sidecars import write_sidecars

        config = write_json(folder / "config.json", _artifact_config(job.model))
        return [config, *write_sidecars(job.model.checkpoint.folder, folder)]

    def run_plan(self, job: Job, plans: Sequence[ComponentPlan], folder: Path) -> RunPlan | None:
        from passes.ascend.run_plan import plan_lengths, run_plan
        from passes.export.shards import read_shards

        family, config = job.model.family, _artifact_config(job.model)
        lengths = plan_lengths(config, family.image_tokens(config))
        group_size = _w8a16(plans[0].steps).group_size
        return run_plan(read_shards(folder), group_size, config, _family(family), **lengths)

    def distributions_with(self, options: Mapping[str, Any]) -> tuple[str, ...]:
        return ("msmodelslim",) if options["engine"] == "msmodelslim" else ()

    def open_runner(
        self,
        folder: Path,
        manifest: Manifest,
        family: Family,
        device: str,
        config: Mapping[str, Any],
        cache_dir: Path | None,
    ) -> ArtifactRunner:
        from vlmconvert.targets.ascend.runner import DequantizedRunner

        if device.upper() != "CPU" or config or cache_dir is not None:
            raise BadInputError(
                f"{folder} is for Ascend and runs in torch on this machine: leave out --device, --ov-config and --cache-dir"
            )
        return DequantizedRunner(folder, manifest, family)

    def config(self, folder: Path, family: Family) -> dict[str, Any]:
        from vlmconvert.targets.ascend.runner import dequantized_blocks

        return dequantized_blocks(folder, family).config

    def blocks(self, folder: Path, manifest: Manifest, family: Family) -> BlockModels:
        from vlmconvert.targets.ascend.runner import dequantized_blocks

        return dequantized_blocks(folder, family)

    def verify(self, folder: Path, manifest: Manifest, family: Family, damaged: set[str]) -> Iterator[Finding]:
        return self.verify_foreign(folder, family)

    def contradictions(self, manifest: Manifest) -> Iterator[str]:
        for component in manifest.components:
            if component.format != f"{self.name}-w8a16":
                yield f"the target is {self.name}, but the format of component {component.name} is {component.format}"
            elif {Path(file.path).suffix for file in component.files} != {".json", ".safetensors"}:
                yield f"component {component.name} does not have weights (.safetensors) and their description (.json)"
        if manifest.run_plan is None:
            yield f"it has no run plan, but artifacts for {self.name} have one"

    def takes(self, family: Family) -> bool:
        return family.ascend is not None

    def recognizes(self, folder: Path) -> bool:
        from passes.ascend.format import DESCRIPTION_NAME

        return (folder / DESCRIPTION_NAME).is_file()

    def verify_foreign(self, folder: Path, family: Family) -> Iterator[Finding]:
        from passes.ascend.rules import check_folder

        return check_folder(folder, _family(family))

    def open_foreign(self, folder: Path, family: Family, keep: int) -> Model:
        from vlmconvert.targets.ascend.runner import dequantized_model

        return dequantized_model(folder, family, keep)


def _family(family: Family) -> AscendFamily:
    """The names and settings of a family in runtimes for Ascend.

    Raises:
        BadInputError: if no such runtime supports the family.
    """
    if family.ascend is None:
        raise BadInputError(f"no runtime for Ascend opens {family.name} models: choose another --target")
    return family.ascend


def _w8a16(steps: Sequence[TransformPass]) -> CompressW8A16Pass:
    from passes.ascend.w8a16 import CompressW8A16Pass

    (item,) = (step for step in steps if isinstance(step, CompressW8A16Pass))
    return item


def _artifact_config(model: OpenedModel) -> dict[str, Any]:
    from passes.ascend.format import artifact_config

    return artifact_config(model.checkpoint, model.templates.architecture, _family(model.family))


TARGET = AscendTarget()
