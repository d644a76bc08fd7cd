"""What the pages say, done: Python runs, recipes resolve, commands parse, links lead somewhere."""

from __future__ import annotations

import dataclasses
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.main import get_command

from tropism import config
from tropism import sections as written
from tropism.cli.app import app
from tropism.cli.show import settings
from tropism.keys import RECIPE, STAGE
from tropism.methods import METHODS
from tropism.recipe import load
from tropism.teacher import Teacher

ROOT = Path(__file__).parent.parent
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS, *sorted((ROOT / "recipes").glob("*.md"))]
FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NAMED = re.compile(r"# (\w+\.(?:py|yaml))\n")
SECTIONS = {"model": config.Model, "success": config.Success, "data": config.Data, "sampling": config.Sampling}
SECTIONS |= {"train": config.Train, "eval": config.Eval, "data.told": config.Told, "data.sampled": config.Sampled}
KEYS = "".join((ROOT / "docs" / page).read_text("utf-8") for page in ("recipes.md", "keys.md", "rewards.md"))
"""Every key of a recipe stands on one of these pages."""


def blocks(page: Path) -> list[tuple[str, str]]:
    """(info string, text) of every fenced block."""
    return [(found[1].strip(), found[2]) for found in FENCE.finditer(page.read_text("utf-8"))]


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where a reader of the page stands: the repository's recipes, and an empty folder otherwise."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    known = set(sys.modules)
    yield tmp_path
    for module in set(sys.modules) - known:
        if getattr(sys.modules[module], "__file__", None) and str(tmp_path) in str(sys.modules[module].__file__):
            del sys.modules[module]


def files(page: Path, folder: Path) -> None:
    """The files that a page shows: `# guess.py` on a block's first line, or a name after its language."""
    for info, text in blocks(page):
        shown = NAMED.match(text)
        if shown or len(info.split()) == 2:
            (folder / (shown[1] if shown else info.split()[1])).write_text(text)


@pytest.mark.parametrize("page", [p for p in PAGES if "```python" in p.read_text("utf-8")], ids=name)
def test_the_python_of_a_page_runs_from_top_to_bottom(page, folder, capsys):
    files(page, folder)
    space: dict[str, Any] = {"__name__": "__main__"}
    for number, (info, text) in enumerate(blocks(page)):
        if info.split()[:1] == ["python"]:
            path = folder / f"block_{number}.py"  # a function needs a file that it comes from
            path.write_text(text)
            exec(compile(text, str(path), "exec"), space)
    capsys.readouterr()


@pytest.mark.parametrize("page", [p for p in PAGES if "```yaml" in p.read_text("utf-8")], ids=name)
def test_the_recipes_of_a_page_resolve(page, folder):
    shown = [text for info, text in blocks(page) if info == "yaml" and {"method", "stages"} & set(yaml.safe_load(text))]
    for text in shown:
        (folder / "shown.yaml").write_text(text)
        load("shown.yaml")
    assert shown


def commands(page: Path) -> list[list[str]]:
    """The words of every `tropism …` line in a block without a language."""
    lines = [line for info, text in blocks(page) if info in ("", "bash", "sh", "console") for line in text.split("\n")]
    return [
        shlex.split(line.removeprefix("$ "), comments=True)[1:] for line in lines if re.match(r"(\$ )?tropism ", line)
    ]


@pytest.mark.parametrize("page", [p for p in PAGES if commands(p)], ids=name)
def test_the_commands_of_a_page_are_ones_that_tropism_takes(page, folder):
    files(page, folder)
    for words in commands(page):
        command = get_command(app).commands[words[0]]
        parsed = command.make_context(words[0], words[1:]).params
        if "recipe" in parsed:
            load(parsed["recipe"], parsed["settings"] or [])


@pytest.mark.parametrize("page", PAGES, ids=name)
def test_commands_options_and_links_that_a_page_mentions_exist(page):
    text = page.read_text("utf-8")
    for word in re.findall(r"`tropism (\w+)", text):
        assert word in get_command(app).commands, word
    prose = FENCE.sub("", text)
    for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", prose):
        assert "://" in target or (page.parent / target).exists(), target
    assert page.parent != ROOT / "docs" or text.count("\n") < 150


# --------------------------------------------------------------------------------------------------------------- keys


def about(cls: type) -> dict[str, str]:
    """Field -> the text under it."""
    return {name: text for name, _, text in settings(cls)}


def default(field: dataclasses.Field[Any]) -> str:
    if field.default is dataclasses.MISSING:
        return "required" if field.default_factory is dataclasses.MISSING else "–"
    if field.default in ("", None, ()):
        return "–"
    listed = list(field.default) if isinstance(field.default, tuple) else field.default
    return str(listed).lower() if isinstance(listed, bool) else str(listed)


def sections() -> list[tuple[str, type, str]]:
    """(prefix, class, heading of the table)"""
    run = [
        ("", config.Recipe, "The run"),
        ("model.", config.Model, "The run"),
        ("model.lora.", config.Lora, "The run"),
        ("", config.Stage, "A stage"),
    ]
    stage = [(f"{key}.", cls, "A stage") for key, cls in SECTIONS.items() if key != "model"]
    methods = [("method.teacher.", Teacher, "A teacher's keys"), ("method.", METHODS["grpo"], "GRPO's keys")]
    return [
        *run,
        *stage,
        ("judge.", config.Judge, "A judge"),
        ("reward_models.", config.Learned, "A reward model"),
        *methods,
    ]


@pytest.mark.parametrize(("prefix", "cls", "heading"), sections(), ids=lambda v: getattr(v, "__name__", ""))
def test_every_key_of_a_recipe_is_on_its_page_with_its_default_and_its_text(prefix, cls, heading):
    page = KEYS.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    texts = about(cls)
    for field in dataclasses.fields(cls):
        row = f"| `{prefix}{field.name}` | {default(field)} | {texts.get(field.name, '')}"
        assert row in page, f"the section {heading} lacks this row, or says something else: {row}"


def test_no_row_of_the_page_is_about_a_key_that_is_not_there():
    rows = re.findall(r"^\| `([\w.]+)` \|", KEYS, re.MULTILINE)
    keys = {*RECIPE, *STAGE, "name"}
    keys |= {f"{prefix}{field.name}" for prefix, cls, _ in sections() if prefix for field in dataclasses.fields(cls)}
    assert set(rows) == keys
    shown = {cls for _, cls, _ in sections()} - set(METHODS.values())
    there = (vars(config) | vars(written)).values()
    assert shown | {config.Named} == {cls for cls in there if dataclasses.is_dataclass(cls)}


def test_every_method_stands_on_its_page_with_its_paper():
    rows = re.findall(r"^\| `(\w+)` \| .+ \| (.+) \|$", (ROOT / "docs" / "methods.md").read_text("utf-8"), re.MULTILINE)
    papers = {name: re.search(r"arXiv:[\d.]+\d", method.__doc__) for name, method in METHODS.items()}
    for name, paper in rows:
        assert (paper == papers[name][0]) if papers[name] else not paper.startswith("arXiv"), name
    assert {name for name, _ in rows} | {"sft"} == set(METHODS)
