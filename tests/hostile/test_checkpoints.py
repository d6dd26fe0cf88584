"""Every broken or hostile checkpoint is refused in one sentence, before the work, and nothing is written."""

from __future__ import annotations

import hashlib
import random
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import safe_open
from transformers import AutoConfig, AutoProcessor

from tests.conftest import exhaustive_but, vlmconvert
from tests.hostile.checkpoints import BROKEN, Broken, replace_file
from vlmconvert.families import demo_checkpoint

pytestmark = pytest.mark.slow

FLOAT16 = ("--llm", "fp16", "--vision", "fp16", "--no-validate")
BY_NAME = {broken.name: broken for broken in BROKEN}


@pytest.fixture(scope="module", autouse=True)
def demos_stay_as_they_are():
    """The checkpoints are made of links to the demos."""

    def digests() -> dict[Path, str]:
        files = [path for name in ("llava", "mllama") for path in demo_checkpoint(name).iterdir()]
        return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}

    before = digests()
    yield
    assert digests() == before


def sentence(output: str) -> str:
    """The last line, which is the only one that says what is wrong."""
    said = [line for line in output.splitlines() if line.startswith("vlmconvert:")]
    assert said == output.splitlines()[-1:], output
    assert "Traceback" not in output
    return said[0]


@pytest.mark.parametrize("broken", BROKEN, ids=[broken.name for broken in BROKEN])
def test_it_is_refused_in_one_sentence(broken: Broken, elsewhere, tmp_path, store):
    folder = broken.write(tmp_path / "checkpoint")
    before = sorted(tmp_path.iterdir())
    plan_only = () if broken.late else ("--dry-run",)
    result = vlmconvert(broken.family, folder, *FLOAT16, *plan_only, "-o", tmp_path / "out", "--store", store)
    assert result.exit_code == 2, result.output
    assert broken.message in sentence(result.output)
    assert sorted(tmp_path.iterdir()) == before


def test_there_are_many_and_each_has_a_name():
    assert len(BY_NAME) == len(BROKEN) > 300


COSTLY = [
    "config.json is a gigabyte",
    "weights with a header that is nested deeply",
    "a template with 10 GB of text",
    "processor_config.json with a huge image",
    "llava vision_config.image_size 100000000",
]


@pytest.mark.parametrize("name", exhaustive_but(COSTLY[2:4], COSTLY))
def test_it_takes_little_time_and_memory(name, tmp_path):
    folder = BY_NAME[name].write(tmp_path / "checkpoint")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = ["convert", folder, *FLOAT16, "--dry-run", "-o", tmp_path / "out", "--store", tmp_path / "store"]
    result = subprocess.run(
        [sys.executable, "-m", "vlmconvert", *map(str, command)], capture_output=True, text=True, timeout=300
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert result.returncode == 2, result.stderr
    sentence(result.stderr)
    # Time on the processor, since other processes may keep the machine busy.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 25
    assert after.ru_maxrss < 2 << 20  # kilobytes


def test_names_in_a_message_cannot_reach_the_terminal(tmp_path, store):
    folder = Broken("", "llava", lambda folder: None).write(tmp_path / "checkpoint")
    text = (folder / "config.json").read_text().replace('"llava"', '"\\u001b[2J\\r\\nvlmconvert: done\\u202e"')
    (folder / "config.json").write_text(text)
    result = vlmconvert("convert", folder, "-o", tmp_path / "out", "--store", store)
    assert result.exit_code == 2
    assert sentence(result.output).isprintable()


def spoil(folder: Path, rng: random.Random) -> None:
    """Change a few bytes of one file: of the weights, of their header."""
    path = rng.choice(sorted(folder.iterdir()))
    data = bytearray(path.read_bytes())
    place = rng.randrange(min(len(data), 16_000))
    how = rng.choice(("bit", "removed", "inserted"))
    if how == "bit":
        data[place] ^= 1 << rng.randrange(8)
    elif how == "removed":
        del data[place : place + rng.choice((1, 2, 10))]
    else:
        data[place:place] = bytes(rng.choices(b'0123456789-"{}[],:null', k=rng.choice((1, 2, 5))))
    replace_file(path, bytes(data))


def open_with_transformers(folder: Path) -> None:
    """Read everything that transformers would read to load the model, but the values of the weights."""
    AutoConfig.from_pretrained(folder, local_files_only=True)
    processor = AutoProcessor.from_pretrained(folder, local_files_only=True, backend="pil")
    assert processor.tokenizer("What is in the picture?")["input_ids"]
    with safe_open(folder / "model.safetensors", framework="pt") as weights:
        assert weights.keys()


@pytest.mark.parametrize("seed", exhaustive_but(range(12), range(24)))
def test_damage_at_random_is_refused_or_does_no_harm(seed, elsewhere, tmp_path, store):
    rng = random.Random(seed)
    family = rng.choice(("llava", "mllama"))
    folder = Broken("", family, lambda folder: None).write(tmp_path / "checkpoint")
    spoil(folder, rng)
    result = vlmconvert(family, folder, *FLOAT16, "--dry-run", "-o", tmp_path / "out", "--store", store)
    if result.exit_code == 0:
        open_with_transformers(folder)
    else:
        assert result.exit_code == 2, result.output
        sentence(result.output)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]
