"""`vlmconvert evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from vlmconvert.commands import at_least, device_options, parse_ov_config

if TYPE_CHECKING:
    from rich.table import Table

    from manifests.evaluation import Evaluation

__all__ = ["evaluate"]


@click.command(
    help="""Measure an artifact on data, beside the checkpoint that it was made from.

    The results go to FOLDER/evaluation: evaluation.json with the figures, predictions.jsonl with every answer.

    \b
    Metrics: exact_match, vqa, cider, bleu4, rouge_l; beside a checkpoint also token_agreement, kl, perplexity.

    \b
    Examples:
      vlmconvert evaluate mllama-openvino-int4-awq-int8-ptq
      vlmconvert evaluate llama-int4 --data captions.json:images --metrics cider,bleu4,rouge_l,kl
      vlmconvert evaluate llama-int4 --data questions.json,annotations.json:val2014 --metrics vqa --evalai answers.json
    """
)
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--checkpoint", help="Folder or hub id; by default what the manifest names, or the embedded demo.")
@click.option("--no-checkpoint", is_flag=True, help="Measure the artifact alone.")
@click.option(
    "--data", default="scenes", show_default=True, help="scenes, a folder, COCO or VQAv2 JSON, TSV, or a datasets id."
)
@click.option("--samples", default=200, show_default=True, help="Most samples.")
@click.option("--seed", default=0, show_default=True, help="Which samples.")
@click.option(
    "--metrics",
    help="Separated by commas.  [default: exact_match, and with a checkpoint token_agreement,kl,perplexity]",
)
@click.option("--max-new-tokens", default=32, show_default=True, help="Most tokens of an answer.")
@click.option("--batch", default=25, show_default=True, help="Questions that are answered together.")
@click.option("--block-samples", default=8, show_default=True, help="Samples for the error of each block, 0 for none.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Another folder for the results.")
@click.option("--evalai", type=click.Path(path_type=Path), help="Write the answers in the form that EvalAI takes, too.")
@click.option("--token", envvar="HF_TOKEN", help="Token for a gated hub id.")
@click.option(
    "--store", type=click.Path(path_type=Path), help="Where answers are kept.  [default: ~/.cache/vlmconvert]"
)
@device_options
def evaluate(
    no_checkpoint: bool, checkpoint: str | None, metrics: str | None, ov_config: tuple[str, ...], **values: Any
) -> None:
    """See the help."""
    from passes.store import default_store
    from vlmconvert.console import Reporter
    from vlmconvert.evaluate import DEFAULT_METRICS, TEXT_METRICS, EvaluationRequest
    from vlmconvert.evaluate import evaluate as run

    for name in ("samples", "max_new_tokens", "batch"):
        at_least(name, values[name], 1)
    at_least("block_samples", values["block_samples"], 0)
    names = tuple(part.strip() for part in metrics.split(",") if part.strip()) if metrics else DEFAULT_METRICS
    if no_checkpoint:
        checkpoint = ""
        names = names if metrics else tuple(name for name in names if name in TEXT_METRICS)
    values["store"] = values["store"] or default_store()
    request = EvaluationRequest(checkpoint=checkpoint, metrics=names, ov_config=parse_ov_config(ov_config), **values)
    reporter = Reporter()
    evaluation = run(request, reporter)
    reporter.table(_table(evaluation))
    reporter.say(str(request.results))


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
