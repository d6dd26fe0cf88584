import random
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from PIL import Image

from manifests.bench import BENCH_NAME
from manifests.errors import BadInputError
from manifests.evaluation import EVALUATION_FOLDER, IMAGES_FOLDER, read_predictions
from manifests.io import read_manifest, write_manifest
from manifests.model import SizeBudget, SizePoint
from tests.conftest import vlmconvert
from vlmconvert.report.figures import format_change, format_figure
from vlmconvert.report.gallery import thumbnail
from vlmconvert.report.losses import loss_chart
from vlmconvert.report.page import render_report
from vlmconvert.report.scatter import confidence, pareto_front, ticks
from vlmconvert.report.variants import common_yardstick, read_variants

VOID = {"br", "img", "meta", "wbr"}
HOSTILE = '<script>alert("1")</script><img src=x onerror=alert(2)> & "quoted" \'too\''


class Page(HTMLParser):
    """Collects tags, their attributes and all text; fails on tags that are not closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str, str]] = []
        self.text = ""
        self.feed(html)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attributes]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += [(tag, name, value or "") for name, value in attributes]

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def html(artifacts) -> str:
    return render_report(artifacts)


def test_page_is_whole_and_loads_nothing(html):
    page = Page(html)
    targets = [
        value for _tag, name, value in page.attributes if name in {"src", "href", "xlink:href", "srcset", "data"}
    ]
    assert targets
    assert all(target.startswith(("data:image/", "#")) for target in targets)
    assert not {"link", "script", "iframe", "object", "base"} & set(page.tags)
    assert "url(" not in html
    assert "@import" not in html
    assert not [name for _tag, name, _value in page.attributes if name.startswith("on")]


def test_links_lead_somewhere(html):
    page = Page(html)
    ids = {value for _tag, name, value in page.attributes if name == "id"}
    assert {value[1:] for tag, name, value in page.attributes if (tag, name) == ("a", "href")} <= ids


def test_figures_of_every_record_are_there(html):
    text = " ".join(Page(html).text.split())
    for expected in (
        "MllamaForConditionalGeneration",
        "mllama-int4-awq",
        "3.57 MB",
        "98.5 %",
        "\N{MINUS SIGN}0.8 pp",
        "1 failed",
        "compress-int4-awq{group_size=64,symmetric=false,ratio=1.0,all_layers=false,scale_estimation=true,data_free=false}",
        "3 layers in 8 bit, no group size divides 40",
        "layers.7",
        "one question, one image, 64 new tokens",
        "mllama in PyTorch",
        "a rather different answer",
        "5 (12.5 %)",
        "openvino_language_model.bin",
    ):
        assert expected in text, expected
    assert "relative error 10 %, cosine 0.998000" in html


def test_same_records_same_page(artifacts, html):
    assert render_report(artifacts) == html


def test_text_of_models_and_data_is_escaped(write_artifact):
    folder = write_artifact(
        "hostile",
        "int4",
        "int8",
        (1_000_000, 1_000_000),
        3,
        alter=lambda item: item.model_copy(
            update={
                "id": HOSTILE + item.id,
                "prompt": HOSTILE,
                "answer": item.answer if item.answer in item.references else HOSTILE,
                "references": [HOSTILE],
            }
        ),
    )
    page = Page(render_report([folder]))
    assert "script" not in page.tags
    assert page.text.count(HOSTILE) > 3
    assert not [name for _tag, name, _value in page.attributes if name.startswith("on")]
    assert all(value.startswith("data:image/") for tag, name, value in page.attributes if name == "src")


def test_artifact_without_evaluation_is_shown_from_its_manifest(artifacts):
    html = render_report(artifacts[-1:])
    assert "200 held-out scenes of the conversion" in html
    assert 'id="size-and-accuracy"' in html
    for section in ("blocks", "latency", "disagreements"):
        assert f'id="{section}"' not in html


def test_evaluation_is_preferred_where_all_have_one(artifacts):
    yardstick = common_yardstick(read_variants(artifacts[:4]))
    assert yardstick is not None
    assert yardstick.data == "40 samples of scenes"
    mixed = common_yardstick(read_variants(artifacts))
    assert mixed is not None
    assert mixed.data == "200 held-out scenes of the conversion"


def test_gallery_has_each_sample_once_and_the_worst_first(html):
    questions = re.findall(r'<p class="caption">(\d+)(?: · same answer as the checkpoint: ([\d, ]+))?</p>', html)
    assert [name for name, _agreeing in questions] == ["0", "1", "2", "3", "4", "5", "38", "39"]
    assert dict(questions)["2"] == "1, 2"


def test_gallery_is_as_long_as_asked(artifacts):
    assert render_report(artifacts, most_samples=2).count("<img ") == 2
    empty = render_report(artifacts, most_samples=0)
    assert "<img " not in empty
    assert "Every answer" not in empty


def test_thumbnails_come_from_the_evaluation_or_are_drawn_again(write_artifact):
    folder = write_artifact("pictures", "int4", "int8", (1_000_000, 1_000_000), 2)
    variant = read_variants([folder])[0]
    images = folder / EVALUATION_FOLDER / IMAGES_FOLDER
    first = next(iter(read_predictions(folder / EVALUATION_FOLDER)))
    drawn = thumbnail(variant, 0, first)
    assert drawn is not None
    assert drawn.startswith("data:image/png;base64,")
    images.mkdir()
    Image.effect_noise((900, 600), 80).save(images / "0.png")
    stored = thumbnail(variant, 0, first)
    assert stored is not None
    assert stored.startswith("data:image/jpeg;base64,")
    assert len(stored) < 60_000


@pytest.mark.parametrize("name", ["../images/secret", "nothing", "test-0-99999999999999", "x" * 5000, "\0"])
def test_sample_without_an_image_has_none(write_artifact, name):
    folder = write_artifact("names", "int4", "int8", (1_000_000, 1_000_000), 2)
    first = next(iter(read_predictions(folder / EVALUATION_FOLDER)))
    assert thumbnail(read_variants([folder])[0], 0, first.model_copy(update={"image": name})) is None


def test_evaluation_of_another_build_is_refused(write_artifact):
    folder = write_artifact("stale", "int4", "int8", (1_000_000, 1_000_000), 2)
    write_manifest(read_manifest(folder).model_copy(update={"name": "built again"}), folder)
    with pytest.raises(BadInputError, match="another build"):
        render_report([folder])


def test_figures_are_read_as_their_metric():
    assert format_figure(0.985, "exact_match") == "98.5\N{NO-BREAK SPACE}%"
    assert format_figure(0.853, "cider") == "0.853"
    assert format_figure(0.00034, "kl") == "0.00034"
    assert format_change(0.9702, 0.985, "vqa") == "-1.5 pp"
    assert format_change(0.98499, 0.985, "exact_match") == "0.0 pp"
    assert format_change(0.9, 0.853, "cider") == "+0.047"


def test_command_writes_the_page(artifacts, tmp_path):
    output = tmp_path / "new" / "report.html"
    result = vlmconvert("report", *artifacts, "-o", output)
    assert result.exit_code == 0, result.output
    assert str(output) in result.output.replace("\n", "")
    assert output.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert [path.name for path in output.parent.iterdir()] == ["report.html"]


def test_artifacts_are_compared_in_the_terminal(artifacts, tmp_path):
    result = vlmconvert("report", *artifacts, "--compare", "-o", tmp_path / "report.html")
    assert result.exit_code == 0, result.output
    table = result.output
    for column in ("size", "KL", "perplexity", "ms per token"):
        assert column in table
    for folder in artifacts:
        assert folder.name in table
    variants = read_variants(artifacts)
    known = [f"{item.perplexity:.4g}" for item in variants if item.perplexity is not None]
    known += [f"{item.per_token_ms:.3g}" for item in variants if item.per_token_ms is not None]
    assert known
    assert all(figure in table for figure in known)


def test_bad_input_is_one_sentence(artifacts, write_artifact, tmp_path):
    damaged = write_artifact("damaged", "int4", "int8", (1_000_000, 1_000_000), 2)
    (damaged / BENCH_NAME).write_text("{}")
    for arguments, message in (
        ((tmp_path,), "holds no manifest.json"),
        ((artifacts[0], artifacts[0]), "is given twice"),
        ((damaged,), "is not a benchmark"),
        ((artifacts[0], "-o", tmp_path), "is a folder"),
        ((artifacts[0], "--samples", "-1"), "too small"),
    ):
        result = vlmconvert("report", *arguments)
        assert result.exit_code == 2, result.output
        assert message in result.output.replace("\n", " ")
        assert "Traceback" not in result.output
    with pytest.raises(BadInputError):
        render_report([Path("nowhere")])


def test_help_has_examples():
    result = vlmconvert("report", "--help")
    assert result.exit_code == 0
    assert "vlmconvert report out-fp16 out-int8" in result.output


@pytest.mark.parametrize(
    ("points", "front"),
    [
        ([(1, 0.5)], [0]),
        ([(1, 0.5), (2, 0.6), (3, 0.6), (3, 0.9)], [0, 1, 3]),
        ([(3, 0.9), (1, 0.95)], [1]),
        ([(2, 0.5), (2, 0.7), (1, 0.7)], [2]),
        ([(1, 0.5), (1, 0.5)], [0, 1]),
        ([(5, 0.1), (4, 0.2), (3, 0.3)], [2]),
    ],
)
def test_pareto_front(points, front):
    assert pareto_front(points) == front


def test_pareto_front_is_what_no_point_beats():
    rng = random.Random(0)
    points = [(rng.randint(1, 20), rng.randint(1, 20)) for _ in range(60)]
    unbeaten = {
        index
        for index, (size, score) in enumerate(points)
        if not any(
            other_size <= size and other_score >= score and (other_size, other_score) != (size, score)
            for other_size, other_score in points
        )
    }
    assert set(pareto_front(points)) == unbeaten


@pytest.mark.parametrize(
    ("low", "high"), [(0, 6.9e6), (0.93, 0.99), (0.985, 0.985), (0, 0), (-3, 17), (1e-9, 1.1e-9), (0, 11.3e9)]
)
def test_ticks_cover_the_range(low, high):
    values = ticks(low, high)
    assert 2 <= len(values) <= 7
    assert values[0] <= low + 1e-12
    assert values[-1] >= high - 1e-12
    assert values == sorted(set(values))


def test_confidence_is_wilson():
    # R: binom::binom.wilson(197, 200) and (200, 200)
    assert confidence(0.985, 200) == pytest.approx((0.95682, 0.99489), abs=1e-4)
    assert confidence(1.0, 200) == pytest.approx((0.98116, 1.0), abs=1e-4)


def test_sizes_are_drawn_against_divergences(artifacts, tmp_path):
    page = Page(render_report(artifacts))
    assert "Size and loss" in page.text
    assert "expected to lose" not in page.text
    points = [SizePoint(size=2_000_000 + 500_000 * index, kl=0.01 * 0.5**index) for index in range(6)]
    manifest = read_manifest(artifacts[2])
    fitted = manifest.model_copy(update={"size_budget": SizeBudget(limit=3_600_000, kl=0.001, curve=points)})
    folder = tmp_path / "fitted"
    folder.mkdir()
    write_manifest(fitted, folder)
    chart = loss_chart(read_variants([*artifacts, folder]), None)
    assert len(chart.curves) == len(points) - 1
    assert all(x1 < x2 and y1 < y2 for x1, y1, x2, y2 in chart.curves)
    assert all(0 <= value <= 100 for line in chart.curves for value in line)
    assert [mark.number for mark in chart.marks] == [f"{number}" for number in range(1, len(artifacts) + 2)]
    assert "expected to lose" in Page(render_report([*artifacts, folder])).text
    assert loss_chart(read_variants(artifacts[:1]), None) is None
