"""README and docs: commands parse, snippets compile and fit what they call, links lead somewhere, and the site builds."""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import click
import pytest
import yaml
from markdown_it import MarkdownIt
from PIL import Image

from calibration.scenes import Split, draw_scene
from tests.conftest import vlmconvert
from vlmconvert import convert
from vlmconvert.commands.cli import main
from vlmconvert.options import Option
from vlmconvert.precisions import precision_options
from vlmconvert.recipes.recipe import read_recipe
from vlmconvert.targets import TARGETS, load_target

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").rglob("*.md")])
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
OURS = ("vlmconvert", "passes", "calibration", "manifests", "tests")
# Other projects' programs, whose command lines are theirs.
OTHERS = {"apt-get", "cd", "git", "jq", "mkdocs", "openssl", "sha256sum"}


class Fence(NamedTuple):
    page: Path
    line: int
    language: str
    info: str
    text: str

    def __str__(self):
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def tokens(page):
    return MarkdownIt("commonmark").enable("table").parse(page.read_text(encoding="utf-8"))


def fences(*languages) -> list[Fence]:
    found = []
    for page in PAGES:
        for token in tokens(page):
            if token.type == "fence":
                language, _, info = token.info.partition(" ")
                if language in languages:
                    found.append(Fence(page, token.map[0] + 1, language, info, token.content))
    return found


def commands(text: str) -> Iterator[list[str]]:
    """The commands of a shell block, each as its words; pipes and redirections are taken apart."""
    for line in text.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split = True
        words: list[str] = []
        skip = False
        for word in lexer:
            if skip:
                skip = False
            elif word in {"<", ">", ">>"}:
                skip = True
            elif word in {"|", "&&", "||", ";"}:
                yield words
                words = []
            elif words or not re.fullmatch(r"\w+=.*", word):
                words.append(word)
        if words:
            yield words


def parse(words: list[str], group: click.Command = main) -> None:
    """Parse a command line of click's with the real command, without running it."""
    while words and words[0] in {"--debug", "--offline"}:
        words = words[1:]
    context = click.Context(group, info_name="vlmconvert")
    command = group
    if isinstance(group, click.Group) and words and not words[0].startswith("-"):
        found = group.get_command(context, words[0])
        assert found is not None, f"there is no command {words[0]}"
        command, words = found, words[1:]
    any_path = patch.object(click.Path, "convert", lambda kind, value, *_: value)  # the files of examples do not exist
    with any_path, suppress(click.exceptions.Exit):  # after --help
        command.make_context(command.name, list(words), parent=context)


def check_python(words: list[str]) -> None:
    assert words[0] == "-m", words
    module, *rest = words[1:]
    if module == "vlmconvert":
        parse(rest)
    elif module.startswith("tests.benchmarks."):
        parse(rest, importlib.import_module(module).main)
    elif module == "pytest":
        for word in rest:
            assert word.startswith("-") or " " in word or (ROOT / word.partition("::")[0]).exists(), word
    else:
        assert module == "venv" or importlib.util.find_spec(module) is not None, module


def check_pip(words: list[str]) -> None:
    extras = PYPROJECT["project"]["optional-dependencies"]
    for word, after in zip(words, [*words[1:], ""], strict=True):
        if word in {"-c", "--constraint", "-r"}:
            assert (ROOT / after).is_file(), after
        for extra in re.findall(r"^(?:\.|vlmconvert)\[(.+)\]$", word):
            assert set(extra.split(",")) <= set(extras), word


def check_make(words: list[str]) -> None:
    targets = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    assert set(words) <= set(targets), words


def check_commands(text: str) -> None:
    for words in commands(text):
        check_command(words)


def check_dask(words: list[str]) -> None:
    parse(words[1:], importlib.import_module(f"distributed.cli.dask_{words[0]}").main)


def check_ray(words: list[str]) -> None:
    parse(words, importlib.import_module("ray.scripts.scripts").cli)


def check_srun(words: list[str]) -> None:
    check_command([word for word in words if word != "--overlap"])


CHECKS = {"pip": check_pip, "make": check_make, "dask": check_dask, "ray": check_ray, "srun": check_srun}


def check_command(words: list[str]) -> None:
    program, rest = Path(words[0]).name, [word for word in words[1:] if word != "&"]
    if program == "vlmconvert":
        parse(rest)
    elif program in {"python", "python3"}:
        check_python(rest)
    elif program in CHECKS:
        CHECKS[program](rest)
    elif program == "source" or words[0].endswith("/run"):
        pass
    else:
        assert program in OTHERS, f"{program} is no known program: say in this test how its command lines are checked"


@pytest.mark.parametrize("fence", fences("bash"), ids=str)
def test_commands_parse(fence):
    check_commands(fence.text)


@pytest.mark.parametrize(
    "line",
    [
        "vlmconvert mllama --no-such-option",
        "vlmconvert no-such-command",
        "vlmconvert mllama --llm int3",
        "vlmconvert check a",
        "make nothing",
        'pip install ".[nothing]"',
        "python -m tests.benchmarks.convert_mllama --no-such-option",
        "python -m pytest tests/nothing.py",
        "vlmconvert run a --prompt b | nothing",
    ],
)
def test_a_wrong_command_is_seen(line):
    with pytest.raises((AssertionError, click.ClickException)):
        check_commands(line)


def test_commands_are_taken_apart():
    text = 'A=1 one "two | three" \\\n  four  # five\n# six\nseven | eight < nine && ten\n'
    assert list(commands(text)) == [["one", "two | three", "four"], ["seven"], ["eight"], ["ten"]]


def help_lines(group: click.Command = main) -> Iterator[tuple[str, str]]:
    """The examples in the help of every command."""
    context = click.Context(group, info_name="vlmconvert")
    assert isinstance(group, click.Group)
    for command in [group, *(group.get_command(context, name) for name in group.list_commands(context))]:
        text = command.get_help(click.Context(command, info_name=command.name))
        for line in re.findall(r"^ +(vlmconvert .+)$", text.replace("\\\n", " "), re.MULTILINE):
            yield command.name, line


def test_the_examples_of_every_help_parse():
    lines = list(help_lines())
    assert {name for name, _ in lines} >= {"main", "mllama", "llava", "run", "evaluate", "check", "bench", "verify"}
    for _, line in lines:
        check_commands(line)


@pytest.fixture
def example_packages(monkeypatch):
    """The packages of `docs/extending` can be imported, though they are not installed."""
    for folder in ("docs/extending/example", "tests/plugin"):
        monkeypatch.syspath_prepend(ROOT / folder)


@pytest.mark.usefixtures("example_packages")
@pytest.mark.parametrize("fence", fences("python"), ids=str)
def test_python_compiles_and_fits_what_it_calls(fence):
    tree = ast.parse(fence.text)
    names = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                top = alias.name.partition(".")[0]
                names[alias.asname or top] = importlib.import_module(alias.name if alias.asname else top)
                importlib.import_module(alias.name)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            module = importlib.import_module(node.module)
            for alias in node.names:
                names[alias.asname or alias.name] = getattr(module, alias.name)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            resolve(node, names)
        if isinstance(node, ast.Call) and (called := resolve(node.func, names)) is not None:
            check_call(called, node)


def resolve(node: ast.expr, names: dict[str, object]) -> object:
    """What an imported name, or an attribute of an imported module, stands for; None for anything else."""
    if isinstance(node, ast.Name):
        return names.get(node.id)
    if isinstance(node, ast.Attribute) and inspect.ismodule(module := resolve(node.value, names)):
        return getattr(module, node.attr)
    return None


def target_options() -> Iterator[Option]:
    for name in TARGETS.names:
        yield from load_target(name).options


def check_call(called: object, node: ast.Call) -> None:
    """Bind the arguments of a call to the signature of what it calls, if that is ours."""
    if not getattr(called, "__module__", "").startswith(OURS) or not callable(called):
        return
    if isinstance(called, type) and issubclass(called, Exception):  # has no signature
        return
    if any(isinstance(argument, ast.Starred) for argument in node.args) or any(
        word.arg is None for word in node.keywords
    ):
        return
    words = {word.arg: word.value for word in node.keywords}
    signature = inspect.signature(called)
    signature.bind(*node.args, **words)
    if called is convert:
        options = {option.name for option in (*precision_options(), *target_options())}
        assert words.keys() - signature.parameters.keys() <= options


@pytest.mark.parametrize("fence", fences("toml", "yaml", "json"), ids=str)
def test_data_parses(fence):
    {"toml": tomllib.loads, "yaml": yaml.safe_load, "json": json.loads}[fence.language](fence.text)


def test_every_option_of_a_conversion_is_explained():
    text = "".join((ROOT / "docs" / name).read_text(encoding="utf-8") for name in ("options.md", "targets/ascend.md"))
    command = main.get_command(click.Context(main), "convert")
    names = {name for parameter in command.get_params(click.Context(command)) for name in parameter.opts}
    names -= {"checkpoint", "-h", "--help"}
    assert {name for name in names if f"`{name}`" not in text and f"`--no-{name[2:]}`" not in text} == set()


@pytest.fixture
def recipe(tmp_path):
    """The recipe that the docs show, as a file."""
    [shown] = [fence for fence in fences("toml") if {"target", "components"} <= tomllib.loads(fence.text).keys()]
    (tmp_path / "recipe.toml").write_text(shown.text, encoding="utf-8")
    return tmp_path / "recipe.toml"


@pytest.mark.usefixtures("elsewhere")
def test_the_recipe_is_one_for_the_demo(recipe, store):
    result = vlmconvert("mllama", "--recipe", recipe, "--dry-run", "--store", store)
    assert result.exit_code == 0, result.output
    for line in (line for component in read_recipe(recipe).components.values() for line in component.passes):
        assert line in result.output


def test_the_build_file_is_one_for_the_demo(recipe, demo, store):
    [shown] = [fence for fence in fences("toml") if "variants" in tomllib.loads(fence.text)]
    folder = recipe.parent
    (folder / "checkpoint").symlink_to(demo)
    (folder / "photos").mkdir()
    for index in range(64):
        draw_scene(Split.TRAIN, index).image.save(folder / "photos" / f"{index}.png")
    (folder / "variants.toml").write_text(shown.text, encoding="utf-8")
    result = vlmconvert("build", folder / "variants.toml", "-o", folder, "--dry-run", "--store", store)
    assert result.exit_code == 0, result.output
    assert "compress-int4-awq" in result.output


def titled() -> dict[str, list[Fence]]:
    """File -> the blocks that show it, in the order of the pages."""
    found = {}
    for fence in fences("python", "toml"):
        if title := re.search(r'title="([^"]+)"', fence.info):
            found.setdefault(title[1], []).append(fence)
    return found


@pytest.mark.parametrize("name", titled())
def test_an_excerpt_is_what_its_file_says(name):
    for fence in titled()[name]:
        assert fence.text in (ROOT / name).read_text(encoding="utf-8"), fence


def test_readmes_snippet_runs(build, tmp_path, monkeypatch, capsys):
    """On an artifact without compression, which is made faster than the one that it names."""
    [snippet] = [fence.text for fence in fences("python") if fence.page.name == "README.md"]
    folder = re.search(r'load\("([^"]+)"', snippet)[1]
    (tmp_path / folder).symlink_to(build("--llm", "fp16", "--vision", "fp16"))
    Image.new("RGB", (560, 560), "white").save(tmp_path / "scene.png")
    monkeypatch.chdir(tmp_path)
    exec(compile(snippet, "README.md", "exec"), {})
    assert capsys.readouterr().out.strip()


def slugs(page: Path) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    return {
        re.sub(r"[^\w\- ]", "", inline.content.lower()).replace(" ", "-")
        for token, inline in pairwise(tokens(page))
        if token.type == "heading_open"
    }


def links(page: Path) -> Iterator[str]:
    for token in tokens(page):
        for child in token.children or []:
            for kind in ("href", "src"):
                if value := child.attrGet(kind):
                    yield str(value)
    yield from re.findall(r'<(?:img|a)[^>]+(?:src|href)="([^"]+)"', page.read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for link in links(page):
        if re.match(r"https?://", link):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.is_relative_to(ROOT), link
        assert target.exists(), link
        assert not anchor or anchor in slugs(target), link


def names_of_tests(file: Path) -> set[str]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


def test_every_promise_names_tests_that_exist():
    """A row is a promise in plain words, and at least one test, each by its path and its name."""
    rows = [line for line in (ROOT / "docs/promises.md").read_text(encoding="utf-8").splitlines() if line[:2] == "| "]
    promises = [row.strip("| ").split(" | ") for row in rows if "| tests |" not in row]
    assert len(promises) > 20
    for promise, _, shown in promises:
        named = re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)`", shown)
        assert len(named) == len(shown.split("<br>")), promise
        for path, name in named:
            assert (ROOT / path).is_file(), path
            assert name in names_of_tests(ROOT / path), f"{path}::{name}"


def test_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_the_site_builds_and_loads_nothing_from_elsewhere(tmp_path):
    """Without a network: what a page needs is beside it."""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    unreachable = dict.fromkeys(("http_proxy", "https_proxy", "all_proxy"), "http://127.0.0.1:9")
    result = subprocess.run(
        command, cwd=ROOT, env=os.environ | unreachable, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    pages = sorted(tmp_path.rglob("*.html"))
    assert len(pages) > len(list((ROOT / "docs").rglob("*.md")))  # and the page for what is not found
    loaded = r'<(?:script|img|iframe)[^>]+src="(?:https?:)?//|<link[^>]+rel="(?:stylesheet|preconnect)"[^>]+href="(?:https?:)?//'
    for page in pages:
        assert not re.findall(loaded, page.read_text(encoding="utf-8")), page
