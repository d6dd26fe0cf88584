"""How the report shows figures: names of metrics, percentages, and numbers of digits."""

from __future__ import annotations

__all__ = ["FIDELITY", "SHARES", "format_change", "format_error", "format_figure", "metric_name"]

# Metrics that compare an artifact with its checkpoint; all others score answers against references.
FIDELITY = {
    "kl",
    "max_abs_logit_difference",
    "perplexity",
    "text_agreement",
    "text_kl",
    "text_perplexity",
    "token_agreement",
    "top1_agreement",
}
# Metrics that are means of values between 0 and 1; the report shows them as percentages.
SHARES = {"exact_match", "text_agreement", "token_agreement", "top1_agreement", "vqa"}
_NAMES = {
    "bleu4": "BLEU-4",
    "cider": "CIDEr",
    "kl": "KL divergence, nats",
    "max_abs_logit_difference": "largest logit difference",
    "rouge_l": "ROUGE-L",
    "text_agreement": "top-1 agreement along texts",
    "text_kl": "KL divergence along texts, nats",
    "text_perplexity": "perplexity of texts",
    "top1_agreement": "top-1 agreement",
    "vqa": "VQA accuracy",
}


def metric_name(metric: str) -> str:
    """The usual name of a metric."""
    return _NAMES.get(metric, metric.replace("_", " "))


def format_figure(value: float | None, metric: str) -> str:
    """A figure of a metric as text; an empty text for None."""
    if value is None:
        return ""
    if metric in SHARES:
        return f"{100 * value:.1f}\N{NO-BREAK SPACE}%"
    return f"{value:.2g}" if metric in {"kl", "text_kl"} else f"{value:.4g}"


def format_change(value: float, reference: float, metric: str) -> str:
    """The difference between a figure and the checkpoint's figure, for shares in percentage points."""
    scale, digits, unit = (100, 1, " pp") if metric in SHARES else (1, 3, "")
    change = round(scale * (value - reference), digits)
    return f"{change:+.{digits}f}{unit}" if change else f"{0:.{digits}f}{unit}"


def format_error(value: float) -> str:
    """A relative error as a percentage with two significant digits."""
    return f"{100 * value:.2g} %"
