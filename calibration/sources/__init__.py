"""Sources of samples: one module for each kind of source; `load_samples` recognises the kind."""

from __future__ import annotations

import os
from pathlib import Path

from calibration.scenes import Split
from calibration.sources.coco import coco_samples
from calibration.sources.folder import folder_samples
from calibration.sources.hub import hub_samples
from calibration.sources.images import StoredImage, open_image
from calibration.sources.mixed import held_out_texts, mixed_samples
from calibration.sources.samples import CAPTION_PROMPT, Sample, SampleSet, scene_sample
from calibration.sources.tsv import tsv_samples
from manifests.errors import BadInputError

__all__ = ["BUILT_IN", "CAPTION_PROMPT", "Sample", "SampleSet", "held_out_texts", "load_samples", "open_image"]

# Names of the sources that come with vlmconvert.
BUILT_IN = ("mixed", "scenes")
_KINDS = "mixed, scenes, a folder, captions.json:IMAGES, questions.json,annotations.json:IMAGES, images.tsv,annotations.tsv or a datasets id"


def load_samples(source: str, count: int, seed: int = 0, split: Split = Split.CALIBRATION) -> SampleSet:
    """Load `count` samples.

    An image is decoded when it is needed; here, only the headers of the chosen images are read.

    Args:
        source: where the samples come from:
            `scenes`: images that vlmconvert draws (`calibration.scenes`).
            `mixed`: conversations about photos, several of them, or a video, conversations without any, and scenes
            (`calibration.sources.mixed`).
            FOLDER: a folder with `metadata.jsonl` (lines with file_name, and caption or question and answer), or of
            images with a caption in a `.txt` of the same name.
            `captions.json:IMAGES`: COCO captions.
            `questions.json,annotations.json:IMAGES`: VQAv2; `questions.json:IMAGES` has no answers.
            `images.tsv,annotations.tsv`: base64 images and JSON texts by key.
            `id` or `id:split`: a data set that the `datasets` library loads.
            Without IMAGES, the images are beside the JSON file.
        count: number of samples; a source with fewer gives all that it has.
        seed: decides which samples are chosen, and their order.
        split: split of the samples that come with vlmconvert, if the source is `scenes` or `mixed`.

    Raises:
        BadInputError: if the source is unknown, empty or unreadable.
    """
    if count < 1:
        raise BadInputError(f"{count} samples are too few: use at least 1")
    if source == "scenes":
        return SampleSet(source, None, seed, tuple(scene_sample(split, index, seed) for index in range(count)))
    if source == "mixed":
        return SampleSet(source, None, seed, tuple(mixed_samples(count, seed, split)))
    samples = _find_samples(source, count, seed)
    for sample in samples.samples:
        for picture in sample.pictures:
            if isinstance(picture, StoredImage):
                picture.check()
    return samples


def _find_samples(source: str, count: int, seed: int) -> SampleSet:
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder_samples(folder, count, seed)
    drive, rest = os.path.splitdrive(source)  # the colon in C: on Windows does not separate files and images
    names, _, images = rest.partition(":")
    names = f"{drive}{names}"
    files = [Path(name).expanduser() for name in names.split(",")]
    match sorted({path.suffix.lower() for path in files}):
        case [".json"]:
            return coco_samples(files, Path(images).expanduser() if images else None, count, seed)
        case [".tsv"] if len(files) == 2 and not images:
            return tsv_samples(files[0], files[1], count, seed)
        case [".tsv"]:
            raise BadInputError(f"{source} is not a pair of TSV files: give images.tsv,annotations.tsv")
    if source.startswith((".", "/", "~")) or "," in source or folder.exists():
        raise BadInputError(f"data source {source} is neither a folder nor JSON or TSV files: give {_KINDS}")
    return hub_samples(source, count, seed)
