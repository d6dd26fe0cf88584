import hashlib
import json

import numpy as np
import pytest
from PIL import Image

from calibration.activations import read_activations, write_activations
from calibration.sources import CAPTION_PROMPT, Sample, SampleSet, load_samples, open_image
from calibration.sources.images import StoredImage
from manifests.errors import BadInputError


@pytest.fixture
def photos(tmp_path):
    for number in range(3):
        Image.new("RGB", (30 + number, 20), (number * 40, 0, 0)).save(tmp_path / f"{number}.png")
    return tmp_path


def test_folder_with_captions_beside_images(photos):
    (photos / "1.txt").write_text("a dark image\n")
    samples = {sample.id: sample for sample in load_samples(str(photos), 10).samples}
    assert sorted(samples) == ["0.png", "1.png", "2.png"]
    assert samples["1.png"].turns == ((CAPTION_PROMPT, "a dark image"),)


def test_folder_with_metadata(photos):
    rows = [{"file_name": "0.png", "caption": "black"}, {"file_name": "2.png", "question": "Which?", "answer": "red"}]
    (photos / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    turns = {sample.id: sample.turns for sample in load_samples(str(photos), 10).samples}
    assert turns == {"0.png": ((CAPTION_PROMPT, "black"),), "2.png": (("Which?", "red"),)}


def test_seed_chooses_and_digest_tells():
    first = load_samples("scenes", 4)
    assert first.digest == load_samples("scenes", 4).digest
    assert first.digest != load_samples("scenes", 4, seed=1).digest
    assert first.digest != load_samples("scenes", 5).digest


def test_images_of_one_size_are_calibrated_with_every_tile_count(photos, demo):
    from vlmconvert import load_processor
    from vlmconvert.families import load_family

    samples = load_samples(str(photos), 3)
    more = SampleSet(samples.source, None, 0, samples.samples * 2).with_sizes(
        load_family("mllama").image_sizes({"vision_config": {"image_size": 56, "max_num_tiles": 4}})
    )
    images = [sample.images for sample in more.samples]
    mask = load_processor(demo).image_processor(images=images, return_tensors="np")["aspect_ratio_mask"]
    assert mask.sum(axis=-1).ravel().tolist() == [1, 2, 3, 4, 1, 1]


def test_several_texts_are_references(photos):
    rows = [
        {"file_name": "0.png", "captions": ["black", "dark"]},
        {
            "file_name": "1.png",
            "question": "Which?",
            "answers": [{"answer": "red"}, {"answer": "maroon"}, {"answer": "maroon"}],
        },
        {"file_name": "2.png", "caption": "red"},
    ]
    (photos / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    samples = {sample.id: sample for sample in load_samples(str(photos), 10).samples}
    assert samples["0.png"].turns == ((CAPTION_PROMPT, "black"),)
    assert samples["0.png"].references == ("black", "dark")
    assert samples["1.png"].turns == (("Which?", "maroon"),)
    assert samples["1.png"].references == ("red", "maroon", "maroon")
    assert samples["2.png"].references == ("red",)


def test_digest_changes_with_further_references_only():
    # Conversions in a store are found by this digest: sizes, turns and pixels, one sample after the other.
    scenes = load_samples("scenes", 3)
    expected = hashlib.sha256()
    for sample in scenes.samples:
        expected.update(json.dumps([sample.images[0].size, sample.turns]).encode() + sample.images[0].tobytes())
    assert scenes.digest == expected.hexdigest()
    image = Image.new("RGB", (2, 2))
    digests = [
        SampleSet("", None, 0, (Sample("", (image,), (("Which?", "red"),), references),)).digest
        for references in ((), ("red",), ("red", "red"), ("red", "maroon"))
    ]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3


def test_a_sample_without_an_answer_has_no_reference(photos):
    (photos / "1.txt").write_text("")
    assert {sample.references for sample in load_samples(str(photos), 3).samples} == {()}


def test_texts_that_are_not_utf_8_are_refused(photos):
    (photos / "1.txt").write_bytes(b"caf\xe9")
    with pytest.raises(BadInputError, match="1.txt cannot be read .*: save it as UTF-8"):
        load_samples(str(photos), 1)
    (photos / "metadata.jsonl").write_bytes(b'\n{"file_name": "0.png", "caption": "caf\xe9"}')
    with pytest.raises(BadInputError, match="metadata.jsonl, line 2 is not a JSON object"):
        load_samples(str(photos), 1)


def test_images_are_decoded_when_asked_for(photos, monkeypatch):
    reads = []
    monkeypatch.setattr(StoredImage, "read", lambda image: reads.append(image))
    samples = load_samples(str(photos), 2)
    assert not reads
    assert samples.samples[0].images == [None]
    assert len(reads) == 1


def test_local_dataset_id(photos):
    rows = [{"file_name": f"{number}.png", "caption": f"image {number}"} for number in range(3)]
    (photos / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    from calibration.sources.hub import hub_samples

    samples = hub_samples(str(photos), 2, seed=0).samples
    assert len(samples) == 2
    assert all(sample.images[0].size[1] == 20 for sample in samples)
    assert all(sample.turns[0][1].startswith("image ") for sample in samples)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1"),
        ('{"caption": "x"}', "file_name"),
        ('{"file_name": "../secret.png", "caption": "x"}', "outside the folder"),
        ('{"file_name": "0.png"}', "no caption or answer"),
        ('{"file_name": "9.png", "caption": "x"}', "line 1: image .*9.png does not exist"),
        ('{"file_name": "\\u0000", "caption": "x"}', "cannot be the name of an image"),
        ('{"file_name": "0.png", "captions": [""]}', "no caption or answer"),
    ],
)
def test_bad_metadata_is_one_sentence(photos, line, message):
    (photos / "metadata.jsonl").write_text(line)
    with pytest.raises(BadInputError, match=message):
        load_samples(str(photos), 1)


def test_unknown_and_empty_sources_are_refused(tmp_path):
    with pytest.raises(BadInputError, match="neither a folder"):
        load_samples("./nowhere", 1)
    for source in ("a.json,b.tsv", "a,b", str(tmp_path / "photo.png")):
        with pytest.raises(BadInputError, match="neither a folder nor JSON or TSV files"):
            load_samples(source, 1)
    with pytest.raises(BadInputError, match="holds neither images nor metadata.jsonl"):
        load_samples(str(tmp_path), 1)
    with pytest.raises(BadInputError, match="too few"):
        load_samples("scenes", 0)


def test_images_are_upright_rgb_and_checked(tmp_path, monkeypatch):
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees
    Image.new("L", (40, 20)).save(tmp_path / "turned.jpg", exif=exif)
    image = open_image(tmp_path / "turned.jpg")
    assert (image.mode, image.size) == ("RGB", (20, 40))
    (tmp_path / "broken.png").write_bytes((tmp_path / "turned.jpg").read_bytes()[:60])
    with pytest.raises(BadInputError, match="cannot be read"):
        open_image(tmp_path / "broken.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    with pytest.raises(BadInputError, match="decompression bomb"):
        open_image(tmp_path / "turned.jpg")


def test_activations_are_copied_and_may_be_empty(tmp_path):
    buffer = np.arange(6, dtype=np.float32).reshape(2, 3)
    path = tmp_path / "0.safetensors"
    write_activations(path, {"view": buffer.T, "empty": np.zeros((1, 2, 0, 4), np.float32)})
    buffer[:] = -1
    values = read_activations({"x": (path, "view"), "past": (path, "empty")})
    assert values["x"].tolist() == [[0, 3], [1, 4], [2, 5]]
    assert values["past"].shape == (1, 2, 0, 4)
