import base64
import io
import json

import pytest
from PIL import Image

from calibration.sources import CAPTION_PROMPT, load_samples
from manifests import lines as lines_module
from manifests.errors import BadInputError


def encoded(width: int) -> str:
    buffer = io.BytesIO()
    Image.new("RGB", (width, 20), "red").save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode()


IMAGES = [f"{key}\t{encoded(10 + place)}" for place, key in enumerate(["a", "bü", "c"])]


@pytest.fixture
def write(tmp_path):
    def write(images, annotations):
        paths = tmp_path / "images.tsv", tmp_path / "texts.tsv"
        for path, lines in zip(paths, (images, annotations), strict=True):
            path.write_bytes("".join(line + "\n" for line in lines).encode())
        return f"{paths[0]},{paths[1]}"

    return write


def test_captions_and_questions(write):
    rows = {
        "a": ["A bus.", {"caption": "A red bus."}],
        "bü": [
            {"question": "Which colour?", "answers": [{"answer": "red"}] * 9 + [{"answer": "pink"}], "question_id": 5},
            {"question": "How many?", "answer": "2"},
        ],
        "c": {"captions": ["A dog.", "A cat."]},
    }
    source = write(["", *IMAGES], [f"{key}\t{json.dumps(value)}" for key, value in rows.items()])
    found = load_samples(source, 10)
    samples = {sample.id: sample for sample in found.samples}
    assert found.source == "images.tsv,texts.tsv"
    assert {key: (sample.turns[-1], sample.references) for key, sample in samples.items()} == {
        "a": ((CAPTION_PROMPT, "A bus."), ("A bus.", "A red bus.")),
        "5": (("Which colour?", "red"), ("red",) * 9 + ("pink",)),
        "bü-1": (("How many?", "2"), ("2",)),
        "c": ((CAPTION_PROMPT, "A dog."), ("A dog.", "A cat.")),
    }
    assert {key: sample.images[0].size[0] for key, sample in samples.items()} == {"a": 10, "5": 11, "bü-1": 11, "c": 12}
    assert load_samples(source, 2, seed=1).digest == load_samples(source, 2, seed=1).digest
    assert len({load_samples(source, 1, seed=seed).samples[0].id for seed in range(20)}) == 4


def test_a_string_is_a_caption_and_lines_may_end_in_crlf(write):
    source = write([line + "\r" for line in IMAGES], ['a\t"A bus."\r'])
    (sample,) = load_samples(source, 1).samples
    assert sample.references == ("A bus.",)
    assert sample.images[0].size == (10, 20)


@pytest.mark.parametrize(
    ("images", "annotations", "message"),
    [
        (IMAGES, [], "texts.tsv is empty"),
        (IMAGES, ["a"], "texts.tsv, line 1 does not consist of a key, a tab and a value"),
        (IMAGES, ["", "\tx"], "texts.tsv, line 2 does not consist of a key, a tab and a value"),
        (IMAGES, ["a\t{"], "texts.tsv, line 1 has no questions or captions as JSON"),
        (IMAGES, ['a\t[{"question": "x", "answer": "y"}, "z"]'], "some entries have a question and some have none"),
        (IMAGES, ['a\t"x"', "a\t5"], "texts.tsv, line 2 has no caption or answer"),
        (IMAGES, ['d\t"x"'], "texts.tsv, line 1: .*images.tsv has no image d"),
        ([*IMAGES, IMAGES[0]], ['a\t"x"'], "images.tsv, line 4: image a is in line 1 too"),
        (["b\tx", "a"], ['a\t"x"'], "images.tsv, line 2 does not consist of a key"),
        (["b\tx", "a\t*broken*"], ['a\t"x"'], "images.tsv, line 2: image a cannot be read"),
        (["a\tabcd"], ['a\t"x"'], "images.tsv, line 1: image a cannot be read"),
    ],
)
def test_what_is_broken_is_named(write, images, annotations, message):
    with pytest.raises(BadInputError, match=message):
        load_samples(write(images, annotations), 10)


def test_bombs_long_lines_and_keys_that_are_not_text(write, monkeypatch, tmp_path):
    source = write(IMAGES, ['a\t"x"'])
    with monkeypatch.context() as patch:
        patch.setattr(Image, "MAX_IMAGE_PIXELS", 50)
        with pytest.raises(BadInputError, match="images.tsv, line 1: image a .*decompression bomb"):
            load_samples(source, 1)
    with monkeypatch.context() as patch:
        patch.setattr(lines_module, "LONGEST_LINE", 8)
        with pytest.raises(BadInputError, match="images.tsv, line 1 is longer than"):
            load_samples(source, 1)
    (tmp_path / "texts.tsv").write_bytes(b'\xff\t"x"\n')
    with pytest.raises(BadInputError, match="texts.tsv, line 1: the key is not UTF-8"):
        load_samples(source, 1)


def test_it_takes_two_files_that_exist(tmp_path):
    with pytest.raises(BadInputError, match="not a pair of TSV files"):
        load_samples("images.tsv", 1)
    with pytest.raises(BadInputError, match="texts.tsv does not exist"):
        load_samples(f"{tmp_path}/images.tsv,{tmp_path}/texts.tsv", 1)
