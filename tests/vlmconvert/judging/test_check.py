import json
import shutil
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from manifests.check_report import CheckReport
from manifests.evaluation import BlockError, DataRecord, Evaluation, Prediction, write_evaluation
from manifests.io import manifest_digest, read_manifest
from tests import garbage
from tests.conftest import exhaustive_but, vlmconvert
from vlmconvert.judging.junit import junit_xml

FLOAT = ("--llm", "fp32", "--vision", "fp32")
FEW = ("--samples", 30)


def copy(folder: Path, target: Path) -> Path:
    shutil.copytree(folder, target)
    return target


@pytest.fixture(scope="module")
def corrupted(build, tmp_path_factory):
    """An artifact whose language model has other weights than it should; sizes and manifest are as before."""
    folder = copy(build(*FLOAT), tmp_path_factory.mktemp("corrupted") / "corrupted")
    path = folder / "openvino_language_model.bin"
    weights = np.frombuffer(path.read_bytes(), np.float32).copy()
    chosen = np.random.default_rng(0).random(weights.size) < 0.5
    weights[chosen & (np.abs(weights) > 1e-3) & (np.abs(weights) < 1)] = 0  # integers look like none of these
    path.write_bytes(weights.tobytes())
    return folder


def evaluate(folder: Path, scores: list[float], metric: str = "exact_match", error: float = 0.0, stale: bool = False):
    """Leave an evaluation on three colours, as `vlmconvert evaluate` would."""
    manifest = read_manifest(folder)
    data = DataRecord(source="colours", revision=None, seed=0, samples=len(scores), digest="0" * 64)
    evaluation = Evaluation(
        artifact=manifest.name,
        manifest_sha256="f" * 64 if stale else manifest_digest(manifest),
        data=data,
        figures=[],
        blocks=[
            BlockError(component="language_model", block=f"layers.{index}", cosine=1.0, relative_error=0.01 + value)
            for index, value in enumerate((0.02, error, 0.0))
        ],
        environment={},
    )
    predictions = (
        Prediction(
            id=str(index),
            image="",
            prompt="?",
            references=["red"],
            answer="red",
            checkpoint_answer=None,
            scores={metric: score, "kl": 0.1},
            checkpoint_scores={},
        )
        for index, score in enumerate(scores)
    )
    (folder / "evaluation").mkdir(exist_ok=True)
    write_evaluation(evaluation, predictions, folder / "evaluation")


def report(path: Path) -> CheckReport:
    return CheckReport.model_validate_json(path.read_text())


def cases(path: Path) -> dict[str, str | None]:
    """Name of each test case -> message of its failure."""
    suite = ElementTree.parse(path).getroot()[0]
    assert suite.get("tests") == str(len(suite))
    found = {case.get("name"): case.find("failure") for case in suite}
    assert suite.get("failures") == str(sum(failure is not None for failure in found.values()))
    return {name: None if failure is None else failure.get("message") for name, failure in found.items()}


@pytest.mark.slow
def test_equal_artifacts_pass_every_limit(build, tmp_path):
    folder = build(*FLOAT)
    options = ("--max-drop", 0, "--max-kl", 1e-6, "--max-size-ratio", 1, "--max-latency-ratio", 10)
    files = ("--json", tmp_path / "c.json", "--junit", tmp_path / "c.xml")
    result = vlmconvert("check", folder, "--baseline", folder, *FEW, *options, *files)
    assert result.exit_code == 0, result.output
    found = report(tmp_path / "c.json")
    assert [item.name for item in found.checks] == ["exact_match", "kl", "size", "latency"]
    assert found.checks[0].test.p_value == 1
    assert found.checks[0].test.samples == 30
    assert found.data == "30 samples of scenes, answered now"
    assert cases(tmp_path / "c.xml") == {"exact_match": None, "kl": None, "size": None, "latency": None}
    assert "no drop: McNemar's exact test, n = 30" in result.output


@pytest.mark.slow
def test_a_corrupted_artifact_fails(build, corrupted, tmp_path):
    files = ("--json", tmp_path / "c.json", "--junit", tmp_path / "c.xml")
    result = vlmconvert("check", corrupted, "--baseline", build(*FLOAT), *FEW, "--max-kl", 0.1, *files)
    assert result.exit_code == 1, result.output
    assert "check failed: exact_match is" in result.output
    assert "check failed: kl is" in result.output
    assert "the drop is larger than chance" in " ".join(result.output.split())
    found = report(tmp_path / "c.json").checks
    assert [item.passed for item in found] == [False, False, True]
    assert found[0].test.lost > 6
    messages = cases(tmp_path / "c.xml")
    assert "the limit is 1" in messages["exact_match"]
    assert messages["size"] is None


@pytest.mark.slow
@pytest.mark.parametrize("spoil", exhaustive_but([garbage.spoil_scale], garbage.GARBAGE))
def test_every_bad_build_of_the_same_recipe_fails_by_default(build, tmp_path, spoil):
    good = build("--llm", "int4", "--vision", "int8-ptq", "--vision-samples", "8")
    bad = garbage.copy(good, tmp_path / "bad")
    spoil(bad)
    garbage.rehash(bad)
    for folder, code in ((bad, 1), (good, 0)):
        result = vlmconvert("check", folder, "--baseline", good, "--json", tmp_path / "c.json")
        assert result.exit_code == code, result.output
        (kl,) = (item for item in report(tmp_path / "c.json").checks if item.name == "kl")
        assert kl.limit == 1e-5
        assert kl.passed == (folder == good)


@pytest.mark.exhaustive
def test_a_published_bad_build_is_refused_and_its_block_named(build, tmp_path):
    """Files and manifest fit each other; only the comparison with the last good build can tell, as for other garbage too."""
    good = build("--llm", "int4", "--vision", "fp32")
    few = ("--samples", 10)
    bad = garbage.copy(good, tmp_path / "bad")
    garbage.spoil_scale(bad)
    garbage.rehash(bad)
    assert vlmconvert("verify", bad).exit_code == 0
    options = ("--max-block-error", 0.01, "--json", tmp_path / "c.json")
    result = vlmconvert("check", bad, "--baseline", good, *few, *options)
    assert result.exit_code == 1, result.output
    assert report(tmp_path / "c.json").worst_block.startswith("language_model, layers.2 ")
    assert vlmconvert("check", good, "--baseline", good, *few, *options).exit_code == 0


@pytest.mark.slow
def test_a_larger_artifact_breaks_the_size_limit_only(build, tmp_path):
    small = copy(build(*FLOAT), tmp_path / "small")
    manifest = json.loads((small / "manifest.json").read_text())
    for component in manifest["components"]:
        for file in component["files"]:
            file["size"] //= 2
    (small / "manifest.json").write_text(json.dumps(manifest))
    arguments = ("check", build(*FLOAT), "--baseline", small, *FEW, "--json", tmp_path / "c.json")
    assert vlmconvert(*arguments).exit_code == 0
    assert vlmconvert(*arguments, "--max-size-ratio", 1.02).exit_code == 1
    size = report(tmp_path / "c.json").checks[-1]
    assert (size.name, size.passed) == ("size", False)
    assert size.value == pytest.approx(2, rel=1e-3)


def test_evaluations_of_both_sides_are_compared_without_running_either(build, tmp_path):
    before, after = (copy(build(*FLOAT), tmp_path / name) for name in ("before", "after"))
    evaluate(before, [1.0] * 18 + [0.0] * 2)
    evaluate(after, [1.0] * 9 + [0.0] * 11, error=0.3)
    (before / "openvino_language_model.bin").unlink()
    result = vlmconvert("check", after, "--baseline", before, "--json", tmp_path / "c.json")
    assert result.exit_code == 1, result.output
    found = report(tmp_path / "c.json")
    assert found.data == "20 samples of colours, from both evaluations"
    assert [item.name for item in found.checks] == ["exact_match", "size"]
    assert found.checks[0].value == 45
    assert found.checks[0].test.p_value == 2 / 2**9
    assert found.worst_block == "language_model, layers.1 (relative error 0.31, 0.01 in the baseline)"
    assert f"worst block: {found.worst_block}" in result.output


def test_graded_scores_are_bootstrapped(build, tmp_path):
    before, after = (copy(build(*FLOAT), tmp_path / name) for name in ("before", "after"))
    evaluate(before, [0.9, 0.6, 0.3] * 7, metric="vqa_accuracy")
    evaluate(after, [0.9, 0.6, 0.3] * 6 + [0.9, 0.6, 0.0], metric="vqa_accuracy")
    result = vlmconvert("check", after, "--baseline", before, "--max-drop", 2, "--json", tmp_path / "c.json")
    assert result.exit_code == 0, result.output
    found = report(tmp_path / "c.json").checks[0]
    assert (found.name, found.test.method, found.test.lost) == ("vqa_accuracy", "paired bootstrap", 1)
    assert not found.test.larger_than_chance
    assert "the drop is not larger than chance" in " ".join(result.output.split())


def test_an_evaluation_of_another_build_is_not_believed(build, tmp_path):
    before, after = (copy(build(*FLOAT), tmp_path / name) for name in ("before", "after"))
    evaluate(before, [1.0] * 10)
    evaluate(after, [0.0] * 10, stale=True)
    result = vlmconvert("check", after, "--baseline", before, *FEW)
    assert result.exit_code == 0, result.output
    assert "after: its evaluation is of another build and is not used" in result.output
    assert "30 samples of scenes, answered now" in result.output


@pytest.fixture
def manifest_alone(build, tmp_path):
    """A manifest with an accuracy over 30 scenes, away from its artifact."""
    data = json.loads((build(*FLOAT) / "manifest.json").read_text())
    figure = {"metric": "exact_match", "component": "artifact", "reference": 1.0, "value": 1.0, "threshold": 0.99}
    data["validation"] = [{**figure, "passed": True, "samples": 30}]
    path = tmp_path / "released.json"
    path.write_text(json.dumps(data))
    return path


def test_a_manifest_alone_is_compared_unpaired(build, corrupted, manifest_alone, tmp_path):
    result = vlmconvert(
        "check", build(*FLOAT), "--baseline", manifest_alone, "--max-drop", 5, "--json", tmp_path / "c.json"
    )
    assert result.exit_code == 0, result.output
    found = report(tmp_path / "c.json").checks[0]
    assert found.test is None
    assert "unpaired" in found.note
    assert vlmconvert("check", corrupted, "--baseline", manifest_alone).exit_code == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--max-kl", "0.1"), "--max-kl needs the baseline's graphs"),
        (("--max-latency-ratio", "1"), "--max-latency-ratio needs the baseline's graphs"),
        (("--data", "./photos"), "was measured on scenes, not on ./photos"),
        (("--samples", "0"), "--samples 0 is too small"),
        (("--junit", "nowhere/c.xml"), "--junit nowhere/c.xml cannot be written"),
    ],
)
def test_what_cannot_be_compared_is_one_sentence_and_exit_2(build, manifest_alone, options, message):
    result = vlmconvert("check", build(*FLOAT), "--baseline", manifest_alone, *options)
    assert result.exit_code == 2, result.output
    assert message in result.output


def test_a_missing_baseline_is_exit_2(build, tmp_path):
    result = vlmconvert("check", build(*FLOAT), "--baseline", tmp_path)
    assert result.exit_code == 2
    assert "holds no manifest.json" in result.output


def test_junit_takes_any_text(build, tmp_path):
    arguments = ("check", build(*FLOAT), "--baseline", build(*FLOAT), *FEW, "--json", tmp_path / "c.json")
    assert vlmconvert(*arguments).exit_code == 0
    odd = report(tmp_path / "c.json").model_copy(update={"artifact": 'a<b>&"c"\x00\x1b[0m\ud800', "data": "]]> é"})
    broken = odd.model_copy(update={"checks": [odd.checks[0].model_copy(update={"passed": False})]})
    for item in (odd, broken):
        root = ElementTree.fromstring(junit_xml(item).encode())
        assert root[0][0].get("classname") == 'check.a<b>&"c"\ufffd\ufffd[0m\ufffd'
        assert "]]> é" in root[0][0][0].text
