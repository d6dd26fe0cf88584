"""Nothing that is read can run code: a look at every call in the packages, and checkpoints that bring code along."""

from __future__ import annotations

import ast
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.checkpoints import write_checkpoint
from tests.conftest import exhaustive_but, vlmconvert
from tests.garbage import copy
from vlmconvert.families import demo_checkpoint

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
PACKAGES = ("vlmconvert", "passes", "calibration", "manifests")

# Modules whose data can hold code, or that run other programs.
MODULES = {"cloudpickle", "dill", "marshal", "pickle", "shelve", "subprocess"}
# Functions that run the text or the bytes that they are given.
FUNCTIONS = {"eval", "exec", "compile", "__import__", "os.system", "os.popen", "yaml.load", "yaml.unsafe_load"}
# Functions that are safe with one value of an argument alone.
WANTED = {"torch.load": ("weights_only", True)}
# Values of arguments that no call may have.
FORBIDDEN = {"allow_pickle": True, "shell": True, "trust_remote_code": True, "weights_only": False}


def faults(source: str) -> Iterator[str]:
    """Calls and imports in a module by which data could run code."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        else:
            names = []
        yield from (f"import {name}" for name in names if name.partition(".")[0] in MODULES)
        if isinstance(node, ast.Call):
            yield from call_faults(node)


def call_faults(node: ast.Call) -> Iterator[str]:
    name = ast.unparse(node.func)
    said = {word.arg: word.value.value for word in node.keywords if isinstance(word.value, ast.Constant)}
    if name in FUNCTIONS:
        yield f"{name}(...)"
    if name in WANTED and (argument := WANTED[name])[0] not in said:
        yield f"{name} without {argument[0]}={argument[1]}"
    yield from (f"{name}({key}={said[key]})" for key, value in FORBIDDEN.items() if said.get(key) is value)
    # Unless it is told not to, transformers asks the user whether to run the checkpoint's code.
    automatic = name.rpartition("transformers.")[2].startswith("Auto") and name.endswith(".from_pretrained")
    if automatic and said.get("trust_remote_code") is not False:
        yield f"{name} without trust_remote_code=False"


@pytest.mark.parametrize("package", PACKAGES)
def test_no_module_can_run_what_it_reads(package):
    files = sorted((ROOT / package).rglob("*.py"))
    assert files
    found = {str(file.relative_to(ROOT)): list(faults(file.read_text(encoding="utf-8"))) for file in files}
    assert {file: lines for file, lines in found.items() if lines} == {}


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from pickle import loads",
        "import subprocess",
        "eval(text)",
        "exec(text)",
        "os.system(text)",
        "yaml.load(text)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "np.load(path, allow_pickle=True)",
        "run(text, shell=True)",
        "Model.from_pretrained(folder, trust_remote_code=True)",
        "AutoConfig.from_pretrained(folder)",
        "transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)",
    ],
)
def test_what_could_run_code_is_seen(code):
    assert list(faults(code))


@pytest.mark.parametrize(
    "code", ["model.eval()", "re.compile(text)", "torch.load(path, weights_only=True)", "ast.literal_eval(text)"]
)
def test_what_cannot_is_not(code):
    assert list(faults(code)) == []


# Where a checkpoint can name classes of its own: file -> keys of `auto_map`.
NAMES = {
    "config.json": ("AutoConfig", "AutoModel", "AutoModelForImageTextToText", "AutoModelForVision2Seq"),
    "processor_config.json": ("AutoProcessor", "AutoImageProcessor", "AutoVideoProcessor"),
    "preprocessor_config.json": ("AutoProcessor", "AutoImageProcessor"),
    "tokenizer_config.json": ("AutoTokenizer", "AutoProcessor"),
    "generation_config.json": ("AutoModelForCausalLM",),
}
# transformers imports these files by their names, without an entry in a config.
MODULE_FILES = ("malice.py", "custom_generate/generate.py", "modeling_mllama.py", "__init__.py")


def bring_code(folder: Path, sign: Path) -> None:
    """Let every config name classes in Python files that leave a sign when they are run."""
    for name in MODULE_FILES:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(f"import pathlib\npathlib.Path({str(sign)!r}).write_text('run')\n")
    for name, keys in NAMES.items():
        if (folder / name).is_file():
            content = json.loads((folder / name).read_text())
            content["auto_map"] = dict.fromkeys(keys, "malice.Malice")
            content["auto_map"]["AutoTokenizer"] = ["malice.Malice", None]
            content["custom_generate"] = "custom_generate"
            (folder / name).write_text(json.dumps(content))


@pytest.fixture
def checkpoint(tmp_path):
    """A function that writes the checkpoint of a family."""

    def write(family: str) -> Path:
        if family in {"llava-next", "llava-next-video"}:
            return write_checkpoint(tmp_path / family, family)
        return copy(demo_checkpoint(family), tmp_path / family)

    return write


@pytest.mark.parametrize(
    "family",
    exhaustive_but(["llava", "llava-next-video"], ["llava", "mllama", "llava-next", "llava-next-video"]),
)
def test_a_checkpoint_that_brings_code_is_converted_without_it(family, checkpoint, store, tmp_path, monkeypatch):
    """It is converted, validated, and asked; or refused. Whatever is answered to a question of transformers is yes."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    sign = tmp_path / "sign"
    folder = checkpoint(family)
    bring_code(folder, sign)
    options = ("--llm", "fp16", "--vision", "fp16", "--validation-samples", "1", "--store", store)
    result = vlmconvert("convert", folder, *options, "-o", tmp_path / "out")
    assert result.exit_code in {0, 1, 2}, result.output
    if result.exit_code < 2:
        shutil.rmtree(folder)
        assert not list((tmp_path / "out").rglob("*.py"))
        bring_code(tmp_path / "out", sign)
        vlmconvert("run", tmp_path / "out", "--prompt", "What is it?", "--max-new-tokens", "1")
    assert not sign.exists()
    assert "Traceback" not in result.output


def test_transformers_would_run_the_code(checkpoint, tmp_path, monkeypatch):
    """Or the test above could not fail."""
    from transformers import AutoConfig, dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("sys.path", [*sys.path])  # the cache is added to it
    folder = checkpoint("mllama")
    bring_code(folder, tmp_path / "sign")
    with pytest.raises(AttributeError, match="Malice"):
        AutoConfig.from_pretrained(folder, trust_remote_code=True, local_files_only=True)
    assert (tmp_path / "sign").exists()
