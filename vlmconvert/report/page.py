"""The HTML page of a report: its content is computed here, and `page.html.j2` lays it out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from manifests.model import Source
from vlmconvert.console import format_size
from vlmconvert.report.blocks import heat_strips
from vlmconvert.report.figures import format_change, format_error, format_figure, metric_name
from vlmconvert.report.gallery import disagreements
from vlmconvert.report.latency import latency_charts, way_of_asking
from vlmconvert.report.losses import loss_chart
from vlmconvert.report.scatter import pareto_front, scatter
from vlmconvert.report.variants import Variant, Yardstick, checkpoint_size, common_yardstick, read_variants
from vlmconvert.version import __version__

__all__ = ["render_report"]


@dataclass(frozen=True)
class _Fact:
    """A figure at the top of the page; `number` is the artifact's, if the report has several artifacts."""

    name: str
    value: str
    number: int | None
    note: str


def render_report(folders: Sequence[Path], most_samples: int = 24) -> str:
    """Write one self-contained HTML page about one artifact or several.

    Args:
        folders: the artifacts; the page also shows the evaluation and the benchmark in each folder, if it has them.
        most_samples: maximum number of samples on which artifact and checkpoint disagree.

    Returns:
        The page's HTML.

    Raises:
        BadInputError: if a folder is not an artifact, or if one of its records is damaged.
    """
    variants = read_variants(folders)
    yardstick = common_yardstick(variants)
    cards, tallies = disagreements(variants, yardstick, most_samples)
    # Answers, questions and names come from data sets and models, so all text is escaped.
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"size": format_size, "error": format_error, "figure": format_figure, "metric": metric_name}
    return environment.get_template("page.html.j2").render(
        version=__version__,
        variants=variants,
        sources=_sources(variants),
        change=format_change,
        checkpoint_size=checkpoint_size,
        facts=_facts(variants, yardstick),
        yardstick=yardstick,
        front=_front(variants, yardstick),
        scatter=scatter(variants, yardstick) if yardstick else None,
        losses=loss_chart(variants, yardstick),
        strips=heat_strips(variants),
        latency=latency_charts(variants),
        cards=cards,
        tallies=tallies,
    )


def _sources(variants: Sequence[Variant]) -> list[tuple[Source, list[int]]]:
    """Each checkpoint, and the numbers of the variants that were made from it."""
    sources: list[tuple[Source, list[int]]] = []
    for variant in variants:
        for source, numbers in sources:
            if source == variant.manifest.source:
                numbers.append(variant.number)
                break
        else:
            sources.append((variant.manifest.source, [variant.number]))
    return sources


def _front(variants: Sequence[Variant], yardstick: Yardstick | None) -> set[int]:
    """Numbers of the variants on the Pareto front; none if fewer than two variants were measured."""
    measured = [(variant, item.value) for variant in variants if (item := variant.accuracy(yardstick)) is not None]
    if len(measured) < 2:
        return set()
    return {measured[index][0].number for index in pareto_front([(variant.size, value) for variant, value in measured])}


def _facts(variants: Sequence[Variant], yardstick: Yardstick | None) -> list[_Fact]:
    several = len(variants) > 1

    def fact(names: tuple[str, str], value: str, variant: Variant, note: str = "") -> _Fact:
        if several:
            note = f"{variant.precision}, {note}" if note else variant.precision
        return _Fact(names[several], value, variant.number if several else None, note)

    smallest = min(variants, key=lambda variant: variant.size)
    before = checkpoint_size(smallest.manifest.source)
    share = f"{100 * smallest.size / before:.0f} % of the checkpoint" if before else ""
    facts = [fact(("size", "smallest"), format_size(smallest.size), smallest, share)]
    measured = [(variant, item) for variant in variants if (item := variant.accuracy(yardstick)) is not None]
    if measured:
        best, accuracy = max(measured, key=lambda pair: (pair[1].value, -pair[0].size))
        metric = accuracy.yardstick.metric
        beside = "" if accuracy.reference is None else f"checkpoint {format_figure(accuracy.reference, metric)}"
        name = metric_name(metric)
        facts.append(fact((name, f"best {name}"), format_figure(accuracy.value, metric), best, beside))
    divergences = [(variant, kl) for variant in variants if (kl := variant.kl(yardstick)) is not None]
    if divergences:
        closest, kl = min(divergences, key=lambda pair: pair[1])
        facts.append(fact(("KL divergence", "lowest KL divergence"), f"{kl:.2g} nats", closest))
    benched = [(variant, variant.bench.rows[0]) for variant in variants if variant.bench and variant.bench.rows]
    if benched:
        fastest, row = min(benched, key=lambda pair: pair[1].per_token_ms.median)
        value = f"{row.per_token_ms.median:.3g} ms/token"
        facts.append(fact(("speed", "fastest"), value, fastest, way_of_asking(row)))
    return facts
