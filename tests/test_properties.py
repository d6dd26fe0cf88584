"""Properties that hold for any manifest, recipe, pass line and safetensors header, tried with Hypothesis."""

from __future__ import annotations

import copy
import json
import string
import tempfile
import tomllib
from dataclasses import fields
from pathlib import Path

import jsonschema
import numpy as np
import pytest
import safetensors
import tomlkit
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from safetensors.numpy import save

from manifests.errors import BadInputError
from manifests.io import MANIFEST_NAME, SCHEMA_FILE, read_manifest, write_manifest
from passes.base import PASSES, load_pass, parse_pass
from passes.header import FLOAT_DTYPES, read_header
from tests.fuzz import targets
from vlmconvert.recipes.recipe import parse_recipe, recipe_text

pytestmark = pytest.mark.slow

# The same examples each time; `make fuzz` looks for new ones.
always = settings(derandomize=True, deadline=None, max_examples=200)

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
# Values of the type that was there.
LIKE = {
    bool: st.booleans(),
    int: st.integers(0, 2**63),
    float: st.floats(-1e9, 1e9),
    str: st.text(string.printable, min_size=1),
}
# What TOML has, too.
TOML = st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False) | st.text(string.printable)
SHA256 = "0" * 64
FILE = {"path": "openvino_language_model.bin", "size": 3, "sha256": SHA256}
MANIFEST = {
    "schema_version": "1.3",
    "name": "demo",
    "family": "mllama",
    "target": "openvino",
    "source": {
        "model": "demo", "revision": None, "architecture": "MllamaForConditionalGeneration", "dtype": "BF16", "files": [FILE],
    },
    "components": [
        {
            "name": "language_model", "role": "language_model", "format": "openvino", "precision": "int8", "files": [FILE],
            "inputs": [{"name": "input_ids", "dtype": "i64", "shape": ["?", 1]}], "outputs": [], "state": [], "logits": "last",
            "weights": {"int8": 3}, "blocks": {"layers.0": "0" * 8}, "passes": ["split"], "fallbacks": [],
            "layers": {"lm_head.weight": "fp16"}, "requires": None,
        }
    ],
    "assets": [],
    "calibration": {"source": "scenes", "revision": None, "samples": 3, "digest": SHA256, "seed": 0},
    "validation": [
        {
            "metric": "kl", "component": "artifact", "reference": None, "value": 0.1, "threshold": 1.0, "passed": True,
            "samples": 5,
        }
    ],
    "environment": {"openvino": "1"},
    "settings": {"options": {"logits": "last"}, "calibration": None},
    "run_plan": None,
}  # fmt: skip
RECIPE = {
    "target": "openvino",
    "options": {"logits": "last"},
    "calibration": {"source": "scenes", "samples": 3},
    "components": {"language_model": {"passes": ["split", "compress-int8{symmetric=false}"], "layers": {"*": "fp16"}}},
}


def places(value, path=()):
    """The path of every entry in nested dicts and lists."""
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in entries:
        yield (*path, key)
        yield from places(inner, (*path, key))


@st.composite
def changed(draw, document, values):
    """A document with a few entries removed, replaced, or added."""
    document = copy.deepcopy(document)
    for _ in range(draw(st.integers(0, 3))):
        *path, last = draw(st.sampled_from(list(places(document))))
        owner = document
        for key in path:
            owner = owner[key]
        match draw(st.sampled_from(("vary", "vary", "vary", "remove", "replace", "add"))):
            case "remove":
                del owner[last]
            case "replace":
                owner[last] = draw(values)
            case "vary":
                owner[last] = draw(LIKE.get(type(owner[last]), values))
            case "add" if isinstance(owner, dict):
                owner[draw(st.text(string.printable))] = draw(values)
        if not list(places(document)):
            break
    return document


@always
@given(changed(MANIFEST, JSON))
def test_a_manifest_is_refused_or_written_as_it_was_read(document):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / MANIFEST_NAME).write_text(json.dumps(document), encoding="utf-8")
        try:
            manifest = read_manifest(folder)
        except BadInputError:
            return
        path = write_manifest(manifest, folder)
        jsonschema.validate(json.loads(path.read_text(encoding="utf-8")), json.loads(SCHEMA_FILE.read_text()))
        assert read_manifest(folder) == manifest
        for component in manifest.components:
            for file in component.files:
                assert (folder / file.path).resolve().is_relative_to(folder.resolve())


@always
@given(changed(RECIPE, TOML))
def test_a_recipe_is_refused_or_its_text_is_the_same_recipe(document):
    document = tomllib.loads(tomlkit.dumps(document))  # what tomlkit cannot write is no recipe's fault
    try:
        recipe = parse_recipe(document, "recipe.toml")
    except BadInputError:
        return
    assert parse_recipe(tomllib.loads(recipe_text(recipe)), "again") == recipe


VALUES = {
    "bool": st.booleans(),
    "int": st.integers(),
    "float": st.floats(allow_nan=False),
    "str": st.text("abcxyz019-_./", min_size=1),
}


@always
@given(st.data(), st.sampled_from(PASSES.names))
def test_the_line_of_a_pass_is_read_back(data, name):
    kind = load_pass(name)
    options = {field.name: data.draw(VALUES[str(field.type)]) for field in fields(kind)}
    try:
        item = kind(**options)
    except BadInputError:
        assume(False)
    assert parse_pass(str(item)) == item


@always
@given(
    st.from_regex(r"[a-z0-9-]{1,20}(\{[ -~]{0,40}\})?|split\{.*\}|compress-int8\{symmetric=.*\}", fullmatch=True)
    | st.text()
)
def test_any_line_is_refused_or_a_pass(line):
    try:
        item = parse_pass(line)
    except BadInputError:
        return
    assert parse_pass(str(item)) == item


TENSORS = st.dictionaries(
    st.text(min_size=1),
    st.tuples(st.sampled_from(("float32", "float16")), st.lists(st.integers(0, 3), max_size=3)),
    min_size=1,
    max_size=4,
)


def accepted(data):
    """Whether safetensors' own reader takes a file's bytes."""
    try:
        safetensors.deserialize(data)
    except safetensors.SafetensorError:
        return False
    return True


@always
@given(TENSORS.filter(lambda tensors: "__metadata__" not in tensors))
def test_a_header_is_read_as_safetensors_reads_it(tensors):
    content = save({name: np.ones(shape, dtype) for name, (dtype, shape) in tensors.items()})
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "w.safetensors").write_bytes(content)
        found = read_header(Path(name), "w.safetensors", FLOAT_DTYPES)
        for tensor, values in safetensors.deserialize(content):
            info = found.pop(tensor)
            assert (info.dtype, list(info.shape)) == (values["dtype"], values["shape"])
            assert content[info.offset : info.offset + info.byte_size] == bytes(values["data"])
        assert not found


@always
@given(TENSORS.filter(lambda tensors: "__metadata__" not in tensors), st.data())
def test_no_damaged_header_is_taken_that_safetensors_refuses(tensors, data):
    content = bytearray(save({name: np.ones(shape, dtype) for name, (dtype, shape) in tensors.items()}))
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(
            st.sampled_from(b'0123456789"[]{},:-\0\x7f \xff')
        )
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "w.safetensors").write_bytes(content)
        try:
            read_header(Path(name), "w.safetensors")
        except BadInputError:
            return
    assert accepted(bytes(content))


@pytest.mark.parametrize("name", targets.TARGETS)
def test_what_is_fuzzed_takes_its_seeds_and_any_damage_to_them(name):
    target, seeds = targets.TARGETS[name]

    @always
    @given(st.sampled_from(seeds), st.integers(0, 2**32), st.binary(max_size=6))
    def damaged(seed, place, inserted):
        place %= len(seed) + 1
        target(seed[:place] + inserted + seed[place + len(inserted) // 2 :])

    for seed in seeds:
        target(seed)
    damaged()
