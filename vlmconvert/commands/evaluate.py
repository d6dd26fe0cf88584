"""`vlmconvert evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vlmconvert.commands import at_least, check_new_file, device_options, parse_ov_config

if TYPE_CHECKING:
    from rich.table import Table

    from manifests.evaluation import Evaluation

__all__ = ["evaluate"]


@click.command(
    help="""Measure an artifact on data, and compare it with the checkpoint that it was made from.

    The results are written to FOLDER/evaluation: the figures to evaluation.json, every answer to predictions.jsonl.

    \b
    Metrics: exact_match, vqa, cider, bleu4, rouge_l; with a checkpoint also token_agreement, kl, perplexity.

    \b
    Examples:
      vlmconvert evaluate mllama-openvino-int4-gptq-int8-ptq
      vlmconvert evaluate llama-int4 --data captions.json:images --metrics cider,bleu4,rouge_l,kl
      vlmconvert evaluate llama-int4 --data questions.json,annotations.json:val2014 --metrics vqa --evalai answers.json
    """
)
@click.argument("folder", type=click.Path(path_type=Path))
@click.option(
    "--checkpoint", help="Local folder or hub id.  [default: the hub id in the manifest, or the embedded demo]"
)
@click.option("--no-checkpoint", is_flag=True, help="Measure the artifact alone.")
@click.option(
    "--data",
    default="scenes",
    show_default=True,
    help="Source of samples: scenes (drawn images), a folder, COCO or VQAv2 JSON, TSV, or a datasets id[:split].",
)
@click.option("--samples", default=200, show_default=True, help="Maximum number of samples.")
@click.option("--seed", default=0, show_default=True, help="Seed that selects the samples.")
@click.option(
    "--metrics",
    help="Metrics, separated by commas.  [default: exact_match, and with a checkpoint token_agreement,kl,perplexity]",
)
@click.option("--max-new-tokens", default=32, show_default=True, help="Maximum number of tokens of an answer.")
@click.option("--batch", default=25, show_default=True, help="Number of questions that are answered together.")
@click.option(
    "--block-samples", default=8, show_default=True, help="Number of samples for the error of each block, 0 for none."
)
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="Folder for the results.  [default: FOLDER/evaluation]"
)
@click.option(
    "--evalai", type=click.Path(path_type=Path), help="Also write the answers to this file, in the format of EvalAI."
)
@click.option("--token", envvar="HF_TOKEN", help="Access token for a gated hub id.")
@click.option(
    "--store", type=click.Path(path_type=Path), help="Folder where answers are kept.  [default: ~/.cache/vlmconvert]"
)
@device_options
def evaluate(
    no_checkpoint: bool, checkpoint: str | None, metrics: str | None, ov_config: tuple[str, ...], **values: Any
) -> None:
    """See the help."""
    import vlmconvert
    from manifests.evaluation import EVALUATION_FOLDER
    from vlmconvert.console import Reporter

    for name in ("samples", "max_new_tokens", "batch"):
        at_least(name, values[name], 1)
    at_least("block_samples", values["block_samples"], 0)
    check_new_file("evalai", values["evalai"])
    names = [part.strip() for part in metrics.split(",") if part.strip()] if metrics else None
    reporter = Reporter()
    evaluation = vlmconvert.evaluate(
        checkpoint="" if no_checkpoint else checkpoint,
        metrics=names,
        ov_config=parse_ov_config(ov_config),
        reporter=reporter,
        **values,
    )
    reporter.table(_table(evaluation))
    reporter.say(str(values["output"] or values["folder"] / EVALUATION_FOLDER))


def _table(evaluation: Evaluation) -> Table:
    from rich.table import Table

    data = evaluation.data
    table = Table(title=f"{evaluation.artifact} on {data.samples} samples of {data.source}", title_justify="left")
    table.add_column("metric")
    for column in ("checkpoint", "artifact"):
        table.add_column(column, justify="right")
    for item in evaluation.figures:
        table.add_row(item.metric, "-" if item.reference is None else f"{item.reference:.4g}", f"{item.value:.4g}")
    if evaluation.blocks:
        worst = max(evaluation.blocks, key=lambda block: block.relative_error)
        table.add_section()
        table.add_row("largest block error", f"{worst.component} {worst.block}", f"{worst.relative_error:.3g}")
    return table
