"""What is compared by `check`: an artifact and its baseline, and the limits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from manifests.errors import BadInputError
from manifests.io import read_manifest, read_manifest_file
from manifests.model import Manifest
from vlmconvert.measuring.blocks import artifact_blocks

__all__ = ["CheckRequest", "Party", "check_limits", "open_party"]


@dataclass(frozen=True)
class CheckRequest:
    """One comparison and its limits; a limit of None is not checked, unless said otherwise.

    Attributes:
        folder: the artifact.
        baseline: folder of another artifact, or the path of its manifest.json.
        data: source of the samples; None takes the data that both were evaluated on or, without such data, scenes.
        samples: number of samples, if they are not taken from evaluations; `auto` takes as many as `max_drop` needs.
        max_drop: maximum loss of each score, in percentage points.
        max_kl: maximum mean KL divergence from the baseline along the baseline's answers, in nats; None takes that of the
            artifact's precisions if the baseline has graphs, or almost none if both were made of the same in the same way.
        max_block_error: maximum relative error of a block's output compared with the baseline's block.
        max_size_ratio: maximum size of the component files as a multiple of the baseline's size.
        max_latency_ratio: maximum time for each token as a multiple of the baseline's time.
        device: OpenVINO device name.
        ov_config: OpenVINO compile options, for both artifacts.
        cache_dir: folder where OpenVINO keeps compiled models.
    """

    folder: Path
    baseline: Path
    data: str | None = None
    samples: int | Literal["auto"] = 200
    max_drop: float = 1.0
    max_kl: float | None = None
    max_block_error: float | None = None
    max_size_ratio: float | None = None
    max_latency_ratio: float | None = None
    device: str = "CPU"
    ov_config: Mapping[str, str] = field(default_factory=dict)
    cache_dir: Path | None = None


@dataclass(frozen=True)
class Party:
    """The artifact or the baseline; `folder` is None for a baseline that is only a manifest.json."""

    label: str
    manifest: Manifest
    folder: Path | None

    @property
    def graphs(self) -> Path | None:
        """The folder, if it has all component files, so that the artifact can answer; otherwise None."""
        files = [record.path for component in self.manifest.components for record in component.files]
        return self.folder if self.folder and all((self.folder / path).exists() for path in files) else None

    @property
    def has_blocks(self) -> bool:
        """Whether the artifact has all component files, and these can be cut into blocks."""
        return self.graphs is not None and self.is_graphs

    @property
    def is_graphs(self) -> bool:
        """Whether artifacts of this target are graphs, which can be cut into blocks."""
        return artifact_blocks(self.folder or Path(), self.manifest) is not None


def open_party(path: Path) -> Party:
    """Open an artifact's folder, or the manifest.json of one.

    Raises:
        BadInputError: if it is neither.
    """
    if path.is_file():
        manifest = read_manifest_file(path)
        return Party(f"{manifest.name} (manifest)", manifest, None)
    return Party(path.resolve().name, read_manifest(path), path)


def check_limits(request: CheckRequest, artifact: Party, baseline: Party) -> None:
    """Refuse limits that cannot be checked on these two artifacts, before any work starts."""
    for party in (artifact, baseline):
        if request.max_block_error is not None and not party.is_graphs:
            raise BadInputError(
                f"--max-block-error needs an artifact that can be cut into blocks, and {party.label} for {party.manifest.target} cannot: "
                "use --max-kl"
            )
    if baseline.graphs is not None:
        return
    limits = {
        "--max-kl": request.max_kl,
        "--max-block-error": request.max_block_error,
        "--max-latency-ratio": request.max_latency_ratio,
    }
    for name, limit in limits.items():
        if limit is not None:
            raise BadInputError(
                f"{name} needs the baseline's graphs, and {request.baseline} has none: give the folder of the baseline"
            )
