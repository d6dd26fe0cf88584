"""Conversations about photos, several of them, a video, or without any, and scenes."""

from __future__ import annotations

from itertools import pairwise

from calibration.scenes import Split
from calibration.sources import load_samples
from calibration.sources.mixed import _FOLDER


def kind(sample):
    if not sample.id.startswith("mixed-"):
        return "scene"
    return "video" if sample.video else len(sample.pictures)


def test_all_kinds_take_turns():
    kinds = [kind(sample) for sample in load_samples("mixed", 64).samples]
    assert {"video", "scene", 0, 1, 2} <= set(kinds)
    assert kinds[2:57:3] == ["scene"] * 19
    assert kinds[1:57:3] == [0] * 19
    # A larger set begins with a smaller one, and one without end is filled with scenes.
    more = load_samples("mixed", 200).samples
    assert [sample.id for sample in more[:64]] == [sample.id for sample in load_samples("mixed", 64).samples]
    assert {kind(sample) for sample in more[100:]} == {"scene"}


def test_nothing_is_in_two_splits_or_in_a_set_twice():
    splits = [load_samples("mixed", 60, split=split).samples for split in (Split.CALIBRATION, Split.TEST)]
    texts = [[(sample.turns, sample.id) for sample in samples] for samples in splits]
    assert all(len(set(found)) == len(found) for found in texts)
    assert not set(texts[0]) & set(texts[1])
    photos = [
        {picture.where for sample in samples if kind(sample) != "scene" for picture in sample.pictures}
        for samples in splits
    ]
    assert photos[1]
    assert not photos[0] & photos[1]


def test_seed_decides_the_order():
    first, again, other = (load_samples("mixed", 12, seed) for seed in (0, 0, 1))
    assert first.digest == again.digest != other.digest


def test_every_photo_has_a_source_and_is_used():
    listed = (_FOLDER / "SOURCES.md").read_text()
    used = (_FOLDER / "conversations.jsonl").read_text()
    photos = sorted(_FOLDER.glob("*.jpg"))
    assert sum(path.stat().st_size for path in photos) <= 1_500_000
    for path in photos:
        assert path.name in used
        assert any(
            path.stem in line.split("|")[1].replace(" ", "").split(",") for line in listed.splitlines() if "|" in line
        )


def test_a_video_moves():
    (sample, *_) = (sample for sample in load_samples("mixed", 64).samples if sample.video)
    assert len({frame.size for frame in sample.video}) == 1
    assert all(first.tobytes() != second.tobytes() for first, second in pairwise(sample.video))
    still = sample.without_video()
    assert not still.video
    assert still.images == [sample.video[4]]
    assert still.without_video() is still
