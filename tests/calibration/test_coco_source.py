import json

import pytest
from PIL import Image

from calibration.sources import CAPTION_PROMPT, load_samples
from manifests.errors import BadInputError

IMAGES = [{"id": 42, "file_name": "COCO_val2014_000000000042.jpg"}, {"id": 7, "file_name": "000000000007.jpg"}]
CAPTIONS = [
    {"id": 1, "image_id": 42, "caption": "A red bus. "},
    {"id": 2, "image_id": 7, "caption": "A dog."},
    {"id": 3, "image_id": 42, "caption": "A bus on a street."},
]
QUESTIONS = [
    {"question_id": 42000, "image_id": 42, "question": "Which colour is the bus?"},
    {"question_id": 42001, "image_id": 42, "question": "Is this a bus?"},
    {"question_id": 7000, "image_id": 7, "question": "Which animal?"},
]
PEOPLE = {42000: ["crimson"] + ["red"] * 9, 42001: ["yes"] * 10, 7000: ["dog"] * 6 + ["puppy"] * 4}
ANSWERS = [
    {"question_id": key, "image_id": key // 1000, "answers": [{"answer": text, "answer_id": 1} for text in people]}
    for key, people in PEOPLE.items()
]


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "val2014"
    folder.mkdir()
    for number, image in enumerate(IMAGES):
        Image.new("RGB", (30 + number, 20), "red").save(folder / image["file_name"])
    return folder


@pytest.fixture
def write(tmp_path):
    def write(name, **document):
        path = tmp_path / name
        path.write_text(json.dumps(document))
        return path

    return write


def test_all_captions_of_an_image_are_its_references(images, write):
    extra = {"id": 8, "file_name": "without-a-caption.jpg"}
    path = write("captions.json", images=[*IMAGES, extra], annotations=CAPTIONS)
    found = load_samples(f"{path}:{images}", 10)
    samples = {sample.id: sample for sample in found.samples}
    assert found.source == "captions.json"
    assert {key: sample.references for key, sample in samples.items()} == {
        "42": ("A red bus.", "A bus on a street."),
        "7": ("A dog.",),
    }
    assert samples["42"].turns == ((CAPTION_PROMPT, "A red bus."),)
    assert samples["42"].images[0].size == (30, 20)
    assert [sample.id for sample in load_samples(f"{path}:{images}", 1, seed=3).samples] == [
        sample.id for sample in load_samples(f"{path}:{images}", 2, seed=3).samples[:1]
    ]
    assert {load_samples(f"{path}:{images}", 1, seed=seed).samples[0].id for seed in range(8)} == {"42", "7"}


def test_images_beside_the_file(images, write):
    path = write("val2014/captions.json", images=IMAGES, annotations=CAPTIONS)
    assert len(load_samples(str(path), 10).samples) == 2


@pytest.mark.parametrize("folder", ["val2014", "."])
def test_questions_with_the_answers_of_ten_people(images, write, tmp_path, folder):
    questions, answers = write("questions.json", questions=QUESTIONS), write("answers.json", annotations=ANSWERS)
    for files in (f"{questions},{answers}", f"{answers},{questions}"):
        samples = {sample.id: sample for sample in load_samples(f"{files}:{tmp_path / folder}", 10).samples}
        assert {key: list(sample.references) for key, sample in samples.items()} == {
            str(key): people for key, people in PEOPLE.items()
        }
        # The answer that most people gave, as VQA's multiple_choice_answer.
        assert samples["42000"].turns == (("Which colour is the bus?", "red"),)
        assert samples["7000"].images[0].size == (31, 20)


def test_questions_without_answers(images, write):
    path = write("questions.json", questions=QUESTIONS, data_subtype="test-dev2015")
    samples = load_samples(f"{path}:{images}", 10).samples
    assert sorted(sample.id for sample in samples) == ["42000", "42001", "7000"]
    assert {sample.references for sample in samples} == {()}


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        ([{}], "neither COCO captions"),
        ([{"annotations": ANSWERS}], "neither COCO captions"),
        ([{"questions": QUESTIONS}, {"questions": QUESTIONS}], "neither COCO captions"),
        ([{"questions": QUESTIONS}, {"info": {}}], "neither COCO captions"),
        ([{"images": {}, "annotations": CAPTIONS}], "images is not a list"),
        ([{"images": [1], "annotations": CAPTIONS}], "0.json, images, entry 1 is not a JSON object"),
        ([{"images": [{"id": 1}], "annotations": []}], "images, entry 1 has no file_name"),
        ([{"images": [*IMAGES, IMAGES[0]], "annotations": []}], "images, entry 3: id 42 occurs twice"),
        ([{"images": IMAGES, "annotations": []}], "holds no captions"),
        ([{"images": IMAGES, "annotations": [{"image_id": 42}]}], "annotations, entry 1 has no caption"),
        ([{"images": IMAGES, "annotations": [{"image_id": 9, "caption": "x"}]}], "the file lists no image 9"),
        (
            [{"images": [{"id": 1, "file_name": "../0.json"}], "annotations": [{"image_id": 1, "caption": "x"}]}],
            "images, entry 1: image '../0.json' lies outside the folder",
        ),
        (
            [{"images": [{"id": 1, "file_name": "1.jpg"}], "annotations": [{"image_id": 1, "caption": "x"}]}],
            "images, entry 1: image .*1.jpg does not exist",
        ),
        ([{"questions": []}], "holds no questions"),
        ([{"questions": [{"question_id": "x"}]}], "questions, entry 1 has no question_id"),
        ([{"questions": [QUESTIONS[0], QUESTIONS[0]]}], "question_id 42000 occurs twice"),
        (
            [{"questions": QUESTIONS}, {"annotations": ANSWERS[:2]}],
            "no answers to question 7000: give files of the same split",
        ),
        (
            [{"questions": QUESTIONS}, {"annotations": [{"question_id": 1, "answers": ["x"]}]}],
            "has an answer without text",
        ),
        ([{"questions": [{**QUESTIONS[0], "image_id": 5}]}], "has no image COCO_..._000000000005.jpg"),
    ],
)
def test_what_is_broken_is_named(images, write, documents, message):
    files = [write(f"{number}.json", **document) for number, document in enumerate(documents)]
    with pytest.raises(BadInputError, match=message):
        load_samples(f"{','.join(map(str, files))}:{images}", 10)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "cannot be read as JSON"),
        ("[1]", "is not a JSON object"),
        ("\udcff", "cannot be read as JSON"),
        ("[" * 100_000, "cannot be read as JSON"),
    ],
)
def test_files_that_are_not_json(tmp_path, text, message):
    path = tmp_path / "captions.json"
    path.write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(BadInputError, match=message):
        load_samples(str(path), 1)


def test_missing_files_and_folders(tmp_path, write):
    with pytest.raises(BadInputError, match="captions.json is missing"):
        load_samples(str(tmp_path / "captions.json"), 1)
    path = write("captions.json", images=IMAGES, annotations=CAPTIONS)
    with pytest.raises(BadInputError, match="is not a folder: give the folder of the images"):
        load_samples(f"{path}:{tmp_path / 'nowhere'}", 1)


def test_broken_images_and_bombs(images, write, monkeypatch):
    path = write("captions.json", images=IMAGES[:1], annotations=CAPTIONS[:1])
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(BadInputError, match="captions.json, images, entry 1: .*decompression bomb"):
        load_samples(f"{path}:{images}", 1)
    (images / IMAGES[0]["file_name"]).write_bytes(b"no image")
    with pytest.raises(BadInputError, match="captions.json, images, entry 1: .*cannot be read"):
        load_samples(f"{path}:{images}", 1)
