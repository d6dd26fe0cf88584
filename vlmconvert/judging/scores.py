"""How good the answers of an artifact are beside those of a baseline."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from manifests.check_report import Check, TestRecord
from manifests.errors import BadInputError
from manifests.evaluation import EVALUATION_FOLDER, Evaluation, Prediction, read_evaluation, read_predictions
from manifests.io import manifest_digest
from manifests.leftovers import scratch_folder
from passes.validate.accuracy import LEAST_ACCURACY
from passes.validate.paired import compare_paired
from vlmconvert.console import Reporter
from vlmconvert.judging.request import CheckRequest, Party
from vlmconvert.measuring.evaluate import EvaluationRequest, evaluate
from vlmconvert.measuring.questions import load_questions

__all__ = ["compare_scores"]

# Scores of a prediction that compare it with the checkpoint and do not say how good the answer is.
_NO_QUALITY = {"kl", "token_agreement"}


def compare_scores(
    request: CheckRequest, artifact: Party, baseline: Party, reporter: Reporter
) -> tuple[str, list[Check]]:
    """Check every score; returns where the samples are from, and the checks."""
    evaluated = _evaluated_scores(request, artifact, baseline, reporter)
    if evaluated is not None:
        source, before, after = evaluated
        return source, [_paired_check(name, before[name], after[name], request.max_drop) for name in before]
    source = request.data or "scenes"
    if baseline.graphs is not None:
        assert request.samples != "auto"
        was, now = (_exact_matches(request, party, source, request.samples, reporter) for party in (baseline, artifact))
        found = _paired_check("exact_match", was, now, request.max_drop)
        if source == "scenes" and np.mean(was) < LEAST_ACCURACY:
            found = found.model_copy(
                update={
                    "limit": None,
                    "passed": True,
                    "note": f"not judged by scenes, of which the baseline answers {np.mean(was):.0%}",
                }
            )
        return f"{len(now)} samples of {source}, answered now", [found]
    return _unpaired(request, artifact, baseline, reporter)


def _evaluated_scores(
    request: CheckRequest, artifact: Party, baseline: Party, reporter: Reporter
) -> tuple[str, dict[str, list[float]], dict[str, list[float]]] | None:
    """The scores of both by metric, and where they are from; None unless both were evaluated on the requested data."""
    first, second = _evaluation(baseline, reporter), _evaluation(artifact, reporter)
    if first is None or second is None or first.data.digest != second.data.digest:
        return None
    if request.data is not None:
        asked, _questions = load_questions(request.data, first.data.samples, first.data.seed)
        if asked.digest != first.data.digest:
            return None
    predictions = [_predictions(party) for party in (baseline, artifact)]
    if [item.id for item in predictions[0]] != [item.id for item in predictions[1]]:
        raise BadInputError(
            f"the evaluations of {baseline.label} and {artifact.label} are on the same data set, but on different samples: "
            "evaluate both again"
        )
    names = set.intersection(*({*item.scores} for side in predictions for item in side)) - _NO_QUALITY
    if not names:
        return None
    before, after = ({name: [item.scores[name] for item in side] for name in sorted(names)} for side in predictions)
    return f"{len(predictions[0])} samples of {first.data.source}, from both evaluations", before, after


def _evaluation(party: Party, reporter: Reporter) -> Evaluation | None:
    """The evaluation in an artifact's folder; None if there is none, or if it is of another build of the artifact."""
    if party.folder is None or not (party.folder / EVALUATION_FOLDER).is_dir():
        return None
    evaluation = read_evaluation(party.folder / EVALUATION_FOLDER)
    if evaluation.manifest_sha256 != manifest_digest(party.manifest):
        reporter.log(f"{party.label}: its evaluation is of another build and is not used")
        return None
    return evaluation


def _predictions(party: Party) -> list[Prediction]:
    assert party.folder is not None
    return list(read_predictions(party.folder / EVALUATION_FOLDER))


def _exact_matches(request: CheckRequest, party: Party, data: str, samples: int, reporter: Reporter) -> list[float]:
    """Let an artifact answer now; returns 1 for each answer that matches its reference exactly, else 0."""
    assert party.folder is not None
    with scratch_folder() as temporary:
        # A temporary store: the user's store could have answers of the artifact from before a file was damaged.
        asked = EvaluationRequest(
            party.folder,
            checkpoint="",
            data=data,
            samples=samples,
            metrics=("exact_match",),
            output=Path(temporary) / EVALUATION_FOLDER,
            block_samples=0,
            store=Path(temporary) / "store",
            device=request.device,
            ov_config=request.ov_config,
            cache_dir=request.cache_dir,
        )
        reporter.log(f"{party.label} ...")
        evaluate(asked, reporter)
        return [item.scores["exact_match"] for item in read_predictions(asked.results)]


def _paired_check(name: str, before: list[float], after: list[float], limit: float) -> Check:
    test = compare_paired(before, after)
    drop = round(100 * test.drop, 6)
    verdict = "no drop"
    if drop > 0:
        verdict = f"the drop is {'' if test.larger_than_chance else 'not '}larger than chance"
    return Check(
        name=name,
        baseline=float(np.mean(before)),
        artifact=float(np.mean(after)),
        value=drop,
        unit="points",
        limit=limit,
        passed=drop <= limit,
        test=TestRecord(
            method=test.method,
            samples=test.samples,
            lost=test.lost,
            gained=test.gained,
            p_value=test.p_value,
            larger_than_chance=test.larger_than_chance,
        ),
        note=f"{verdict}: {test.method}, n = {test.samples}, {test.lost} lost, {test.gained} gained, p = {test.p_value:.2g}; "
        f"the smallest drop that so many samples can show is {test.smallest_drop * 100:.2g} points",
    )


def _unpaired(request: CheckRequest, artifact: Party, baseline: Party, reporter: Reporter) -> tuple[str, list[Check]]:
    """Compare the accuracy figure of a manifest with the accuracy of the artifact on as many scenes."""
    figure = next((item for item in baseline.manifest.validation if item.metric == "exact_match"), None)
    if figure is None:
        raise BadInputError(
            f"{request.baseline} has neither graphs nor an exact_match figure: "
            "give the folder of the baseline, or convert the baseline with validation"
        )
    if request.data not in (None, "scenes"):
        raise BadInputError(
            f"the figure in {request.baseline} was measured on scenes, not on {request.data}: "
            "give the folder of the baseline, or leave out --data"
        )
    value = round(float(np.mean(_exact_matches(request, artifact, "scenes", figure.samples, reporter))), 6)
    drop = round(100 * (figure.value - value), 6)
    found = Check(
        name="exact_match",
        baseline=figure.value,
        artifact=value,
        value=drop,
        unit="points",
        limit=request.max_drop,
        passed=drop <= request.max_drop,
        test=None,
        note=f"unpaired: the manifest has one figure over {figure.samples} samples, so chance is not tested",
    )
    return f"{figure.samples} samples of scenes, answered now, compared with the figure in the manifest", [found]
