"""The artifacts of a report, and the figures with which they are compared."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Table

from manifests.bench import BENCH_NAME, Bench, read_bench
from manifests.errors import BadInputError
from manifests.evaluation import EVALUATION_FOLDER, Evaluation, read_evaluation
from manifests.io import manifest_digest, read_manifest
from manifests.model import Manifest, Source
from vlmconvert.console import format_size
from vlmconvert.report.figures import FIDELITY, format_figure

__all__ = [
    "Accuracy",
    "Variant",
    "Yardstick",
    "checkpoint_size",
    "common_yardstick",
    "comparison_table",
    "read_variants",
]


@dataclass(frozen=True)
class Yardstick:
    """A metric on certain samples; only figures with the same yardstick are compared.

    Attributes:
        metric: name of the metric.
        data: description of the samples.
        digest: digest of the samples of an evaluation; None for the samples of a conversion's validation.
    """

    metric: str
    data: str
    digest: str | None


@dataclass(frozen=True)
class Accuracy:
    """A figure that scores an artifact's answers; `reference` is the checkpoint's figure."""

    yardstick: Yardstick
    value: float
    reference: float | None
    samples: int


@dataclass(frozen=True)
class Variant:
    """One artifact with its evaluation and benchmark. `number` identifies it in charts, from 1."""

    number: int
    label: str
    folder: Path
    manifest: Manifest
    evaluation: Evaluation | None
    bench: Bench | None

    @property
    def size(self) -> int:
        """Bytes of all component files."""
        return sum(file.size for component in self.manifest.components for file in component.files)

    @property
    def precision(self) -> str:
        """The precisions of the components, each of them once."""
        return " · ".join(dict.fromkeys(component.precision for component in self.manifest.components))

    @property
    def accuracies(self) -> list[Accuracy]:
        """The figures that score answers: those of the evaluation, then those of the validation in the manifest."""
        found = []
        if self.evaluation is not None:
            data = self.evaluation.data
            found = [
                Accuracy(
                    Yardstick(item.metric, f"{data.samples} samples of {data.source}", data.digest),
                    item.value,
                    item.reference,
                    item.samples,
                )
                for item in self.evaluation.figures
                if item.metric not in FIDELITY
            ]
        return found + [
            Accuracy(
                Yardstick(item.metric, f"{item.samples} held-out scenes of the conversion", None),
                item.value,
                item.reference,
                item.samples,
            )
            for item in self.manifest.validation
            if item.component == "artifact" and item.metric not in FIDELITY
        ]

    def accuracy(self, yardstick: Yardstick | None) -> Accuracy | None:
        """The figure on a yardstick; None if it was not measured."""
        return next((item for item in self.accuracies if item.yardstick == yardstick), None)

    def kl(self, yardstick: Yardstick | None) -> float | None:
        """KL divergence from the checkpoint in nats, on the samples of the yardstick."""
        if yardstick is not None and yardstick.digest is not None:
            data = self.evaluation if self.evaluation and self.evaluation.data.digest == yardstick.digest else None
            return next((item.value for item in data.figures if item.metric == "kl"), None) if data else None
        return next(
            (item.value for item in self.manifest.validation if (item.metric, item.component) == ("kl", "artifact")),
            None,
        )

    @property
    def perplexity(self) -> float | None:
        """Perplexity in the evaluation or, without one, along the held-out texts of the conversion."""
        evaluated = (
            [item.value for item in self.evaluation.figures if item.metric == "perplexity"] if self.evaluation else []
        )
        validated = [item.value for item in self.manifest.validation if item.metric == "text_perplexity"]
        return next(iter((*evaluated, *validated)), None)

    @property
    def per_token_ms(self) -> float | None:
        """Median time for a token in milliseconds, in the first row of the benchmark."""
        return self.bench.rows[0].per_token_ms.median if self.bench is not None and self.bench.rows else None


def checkpoint_size(source: Source) -> int:
    """Bytes of a checkpoint's weight files."""
    return sum(file.size for file in source.files if file.path.endswith(".safetensors"))


def read_variants(folders: Sequence[Path]) -> list[Variant]:
    """Read the manifest of each folder and, if it has them, its evaluation and its benchmark.

    Raises:
        BadInputError: if a folder is given twice or is not an artifact, if a record is damaged, or if an evaluation is
            of another build of the artifact.
    """
    names = Counter(folder.resolve().name for folder in folders)
    variants: list[Variant] = []
    for number, folder in enumerate(folders, start=1):
        resolved = folder.resolve()
        if any(resolved == variant.folder for variant in variants):
            raise BadInputError(f"{folder} is given twice: give each artifact once")
        manifest = read_manifest(folder)
        evaluation = read_evaluation(folder / EVALUATION_FOLDER) if (folder / EVALUATION_FOLDER).exists() else None
        if evaluation is not None and evaluation.manifest_sha256 != manifest_digest(manifest):
            raise BadInputError(
                f"{folder / EVALUATION_FOLDER} is of another build of {folder}: evaluate the artifact again"
            )
        variants.append(
            Variant(
                number,
                resolved.name if names[resolved.name] == 1 else f"{resolved.parent.name}/{resolved.name}",
                resolved,
                manifest,
                evaluation,
                read_bench(folder) if (folder / BENCH_NAME).exists() else None,
            )
        )
    return variants


def common_yardstick(variants: Sequence[Variant]) -> Yardstick | None:
    """The yardstick on which most variants were measured; among equals, the one that a variant lists first."""
    counts = Counter(item.yardstick for variant in variants for item in variant.accuracies)
    return max(counts, key=lambda yardstick: counts[yardstick], default=None)


def comparison_table(variants: Sequence[Variant]) -> Table:
    """Table of artifacts with what was measured of each, on the samples that most of them have in common."""
    yardstick = common_yardstick(variants)
    table = Table(title="Artifacts", title_justify="left")
    for column in ("artifact", "precisions"):
        table.add_column(column, overflow="fold")
    for column in ("size", "KL", "perplexity", yardstick.metric if yardstick else "accuracy", "ms per token"):
        table.add_column(column, justify="right")
    for variant in variants:
        kl, accuracy = variant.kl(yardstick), variant.accuracy(yardstick)
        table.add_row(
            variant.label,
            variant.precision,
            format_size(variant.size),
            _number(kl, 2),
            _number(variant.perplexity, 4),
            format_figure(accuracy.value, accuracy.yardstick.metric) if accuracy else "-",
            _number(variant.per_token_ms, 3),
        )
    return table


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}g}"
