import pytest
from transformers import AutoProcessor

from calibration.scenes import COUNTS, Split, draw_scene
from calibration.sources import load_samples


def test_same_arguments_same_scene():
    first, second = draw_scene(Split.TEST, 7), draw_scene(Split.TEST, 7)
    assert first.image.tobytes() == second.image.tobytes()
    assert (first.questions, first.caption) == (second.questions, second.caption)


def test_splits_and_seeds_never_share_a_scene():
    pixels = {
        (split, seed, index): draw_scene(split, index, seed).image.tobytes()
        for split in Split
        for seed in (0, 1)
        for index in range(40)
    }
    assert len(set(pixels.values())) == len(pixels)


def test_a_split_cannot_be_left():
    for index, seed in ((-1, 0), (0, 1 << 40), (1 << 40, 0)):
        with pytest.raises(ValueError, match="outside"):
            draw_scene(Split.TRAIN, index, seed)


def test_answers_are_true_of_the_caption():
    for index in range(200):
        scene = draw_scene(Split.TEST, index)
        items = [part.removeprefix("a ") for part in scene.caption.replace(" and ", ", ").split(", ")]
        for question in scene.questions:
            words = question.text.rstrip("?").split()
            if question.kind == "count":
                assert question.answer == COUNTS[len(items) - 1]
            elif question.kind == "colour":
                assert [item for item in items if item.endswith(words[-1])] == [f"{question.answer} {words[-1]}"]
            elif question.kind == "shape":
                assert [item for item in items if item.startswith(words[-1])] == [f"{words[-1]} {question.answer}"]
            elif question.kind == "exists":
                assert question.answer == ("yes" if " ".join(words[-2:]) in items else "no")


def test_all_tile_counts_and_aspect_ratios_occur(demo):
    processor = AutoProcessor.from_pretrained(demo, backend="pil")
    images = [sample.images for sample in load_samples("scenes", 100).samples]
    ratios = processor.image_processor(images=images, return_tensors="np")["aspect_ratio_ids"]
    assert set(ratios.ravel().tolist()) == set(range(1, 9))
