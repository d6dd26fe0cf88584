"""COCO captions, and VQAv2 questions on COCO images, as the JSON files that the data sets ship."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from calibration.sources.images import StoredImage, image_in
from calibration.sources.samples import Sample, SampleSet, choose, sample_of
from manifests.errors import BadInputError
from manifests.files import read_json

__all__ = ["coco_samples"]

# In bytes; VQAv2's annotations of the training split have 382 MB.
_LARGEST = 500_000_000

# COCO_val2014_000000000042.jpg, and 000000000042.jpg since 2017.
_COCO_NAME = re.compile(r"(?:^|_)(\d{12})\.(?:jpe?g|png)$", re.IGNORECASE)


def coco_samples(files: list[Path], images: Path | None, count: int, seed: int) -> SampleSet:
    """Samples of a captions file, or of VQA questions with or without their annotations.

    A captions file gives one sample for each image that has captions; all its captions are references. A questions file
    gives one sample for each question, named by its question_id; the annotators' answers are the references, of which there
    are none without an annotations file.

    Args:
        files: a captions file; or a questions file, alone or with its annotations, in any order.
        images: the folder of the images, by default that of the first file. A captions file holds the images' file names;
            the image of a question is found by the twelve digits in its COCO name, in subfolders too.
        count: number of samples.
        seed: decides which samples are chosen, and their order.

    Raises:
        BadInputError: if a file is of another kind, an entry is broken, or an image is missing.
    """
    documents = {path: _read(path) for path in files}
    folder = images or files[0].parent
    if not folder.is_dir():
        raise BadInputError(f"{folder} is not a folder: give the folder of the images as file.json:FOLDER")
    questions = [path for path in files if "questions" in documents[path]]
    annotations = [path for path in files if "questions" not in documents[path] and "annotations" in documents[path]]
    match len(questions), len(annotations):
        case 1, 0 | 1 if len(documents) == len(questions) + len(annotations):
            samples = _asked(questions[0], annotations[0] if annotations else None, documents, folder, count, seed)
        case 0, 1 if len(documents) == 1 and "images" in documents[files[0]]:
            samples = _captioned(files[0], documents[files[0]], folder, count, seed)
        case _:
            raise BadInputError(
                f"{', '.join(map(str, files))}: neither COCO captions (images, annotations) nor VQA questions with their "
                "annotations: give captions.json or questions.json,annotations.json"
            )
    return SampleSet(",".join(path.name for path in files), None, seed, tuple(samples))


def _captioned(path: Path, document: dict[str, Any], folder: Path, count: int, seed: int) -> Iterator[Sample]:
    captions: dict[Any, list[str]] = {}
    entries = []
    for where, image in _entries(path, document, "images"):
        key = _field(image, "id", (int, str), where)
        if key in captions:
            raise BadInputError(f"{where}: id {key} occurs twice: remove one")
        captions[key] = []
        entries.append((key, _field(image, "file_name", str, where), where))
    for where, annotation in _entries(path, document, "annotations"):
        key = _field(annotation, "image_id", (int, str), where)
        if key not in captions:
            raise BadInputError(f"{where}: the file lists no image {key}: remove the entry")
        captions[key].append(_field(annotation, "caption", str, where).strip())
    described = [entry for entry in entries if captions[entry[0]]]
    if not described:
        raise BadInputError(f"{path} holds no captions: give a file with captions")
    for key, name, where in choose(described, count, seed):
        yield sample_of(str(key), image_in(folder, name, where), {"captions": captions[key]}, where)


def _asked(
    path: Path, answers_path: Path | None, documents: dict[Path, dict[str, Any]], folder: Path, count: int, seed: int
) -> Iterator[Sample]:
    answers: dict[int, list[str]] = {}
    if answers_path:
        for where, annotation in _entries(answers_path, documents[answers_path], "annotations"):
            given = _field(annotation, "answers", list, where)
            try:
                texts = [str(item["answer"]) for item in given]
            except (KeyError, TypeError) as error:
                raise BadInputError(f"{where} has an answer without text ({error}): fix the entry") from error
            answers[_field(annotation, "question_id", int, where)] = texts
    entries = []
    known = set()
    for where, question in _entries(path, documents[path], "questions"):
        key = _field(question, "question_id", int, where)
        if key in known:
            raise BadInputError(f"{where}: question_id {key} occurs twice: remove one")
        known.add(key)
        if answers_path and not answers.get(key):
            raise BadInputError(
                f"{where}: {answers_path} has no answers to question {key}: give files of the same split"
            )
        entries.append((key, _field(question, "image_id", int, where), _field(question, "question", str, where), where))
    if not entries:
        raise BadInputError(f"{path} holds no questions: give a file with questions")
    # Images are found by number, because questions may name another split than images: test-dev asks about test2015.
    names = sorted(folder.rglob("*"), reverse=True)
    images = {int(found[1]): name for name in names if (found := _COCO_NAME.search(name.name))}
    for key, image_id, text, where in choose(entries, count, seed):
        if image_id not in images:
            raise BadInputError(
                f"{where}: {folder} has no image COCO_..._{image_id:012d}.jpg: give the folder of its split"
            )
        picture = StoredImage.in_file(images[image_id], where)
        if answers_path:
            yield sample_of(str(key), picture, {"question": text, "answers": answers[key]}, where)
        else:
            yield Sample(str(key), (picture,), ((text, ""),))


def _read(path: Path) -> dict[str, Any]:
    document = read_json(path, "give a file as COCO or VQAv2 ships it", _LARGEST)
    if not isinstance(document, dict):
        raise BadInputError(f"{path} is not a JSON object: give a file as COCO or VQAv2 ships it")
    return document


def _entries(path: Path, document: dict[str, Any], key: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """The entries of the list `key`, each with its place for error messages; places are counted from 1."""
    entries = document[key]
    if not isinstance(entries, list):
        raise BadInputError(f"{path}: {key} is not a list: give a file as COCO or VQAv2 ships it")
    for number, entry in enumerate(entries, start=1):
        where = f"{path}, {key}, entry {number}"
        if not isinstance(entry, dict):
            raise BadInputError(f"{where} is not a JSON object: fix the entry")
        yield where, entry


def _field(entry: dict[str, Any], key: str, kind: type | tuple[type, ...], where: str) -> Any:
    value = entry.get(key)
    if not isinstance(value, kind) or value == "":
        names = " or ".join(item.__name__ for item in (kind if isinstance(kind, tuple) else (kind,)))
        raise BadInputError(f"{where} has no {key} of type {names}: fix the entry")
    return value
