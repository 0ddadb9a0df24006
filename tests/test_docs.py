"""The documentation: its Python runs, its commands parse, its links lead somewhere."""

from __future__ import annotations

import itertools
import re
import shlex
from pathlib import Path
from typing import Any, cast

import pytest
import typer
from reading import PAGES, ROOT, blocks, page_id, prose

from everseg import errors, registry
from everseg.cli.main import app
from everseg.cli.output import listing
from everseg.config import loading as config_loading
from everseg.config import presets
from everseg.config import yaml as config_yaml
from everseg.config.fields import HARMLESS
from everseg.data.datasets import descriptor
from everseg.errors import ConfigError
from everseg.labels import POLICIES

INLINE = re.compile(r"`(everseg [a-z][^`\n]*)`")
LINK = re.compile(r"\[[^\]]+\]\(([^)\s]+)\)")
LAUNCHER = re.compile(r".*\s-m everseg\.cli\s|(?:\S*/)?everseg\s")
PLACEHOLDERS = {"PRESET": "demo-mib", "PRESET_OR_YAML": "demo-mib", "METHOD": "ft"}


def commands(path: Path) -> list[str]:
    """Every `everseg ...` command of a page, without launcher, comment, pipes and continuation lines."""
    found = []
    for block in blocks(path, "sh"):
        for line in block.code.replace("\\\n", " ").splitlines():
            for part in re.split(r"&&|\|\||;|\||>", re.sub(r"\s#.*", "", line)):
                match = LAUNCHER.match(part.strip())
                if match:
                    found.append(part.strip()[match.end() :])
    inline = INLINE.findall(prose(path))
    return found + [text.removeprefix("everseg ") for text in inline if "..." not in text]


@pytest.fixture(scope="module")
def plug_ins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the Python files that the pages print, those of docs/extending.md among them."""
    folder = tmp_path_factory.mktemp("docs")
    printed = [block for page in PAGES for block in blocks(page, "python") if block.file]
    for block in printed:
        (folder / str(block.file)).write_text(block.code)
    names = [block.file for block in printed]
    assert len(set(names)) == len(names), "two pages print a file of one name"
    assert {"my_data.py", "my_method.py", "my_model.py", "my_scenario.py"} <= set(names)
    return folder


def test_the_examples_of_extending_run_in_their_order(
    plug_ins: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for file in plug_ins.iterdir():
        (tmp_path / file.name).write_text(file.read_text())
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv("EVERSEG_CACHE", str(tmp_path / "cache"))
    scope: dict[str, object] = {"__name__": "docs"}
    for block in blocks(ROOT / "docs" / "extending.md", "python"):
        if not block.file:
            exec(compile(block.code, "docs/extending.md", "exec"), scope)
    package, run = cast(Any, scope["everseg"]), cast(Any, scope["run"])
    assert package.run(scope["settings"], quiet=True).table() == run.table()
    with pytest.raises(ConfigError, match="your own code"):
        package.evaluate(run.path, quiet=True)
    (command,) = [c for c in commands(ROOT / "docs" / "extending.md") if c.startswith("eval ")]
    scored = package.evaluate(run.path, overrides=command.split()[2:], quiet=True)
    assert scored.branches["default"].miou == run.steps[-1].miou


@pytest.mark.parametrize("path", PAGES, ids=page_id)
def test_python_examples_compile(path: Path) -> None:
    for block in blocks(path, "python"):
        compile(block.code, page_id(path), "exec")


@pytest.mark.parametrize("path", PAGES, ids=page_id)
def test_commands_parse(path: Path, plug_ins: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(plug_ins)
    for command in commands(path):
        check(command)


def check(command: str) -> None:
    """Verb, options, preset and keys of a command exist; its files need not."""
    words = [PLACEHOLDERS.get(word, word) for word in shlex.split(command)]
    words = [word for word in words if word not in ("[KEY=VALUE]", "--debug")]
    parser, names = typer.main.get_command(app), []
    while hasattr(parser, "commands"):
        assert words, f"everseg {command}: no verb"
        if words[0] in {option for p in parser.params for option in p.opts}:
            return  # --version and its like end there
        assert words[0] in parser.commands, f"everseg {command}: no verb '{words[0]}'"
        names.append(words[0])
        parser, words = parser.commands[words[0]], words[1:]
    if not words:
        return  # a verb mentioned in a text
    known = {option for p in parser.params for option in (*p.opts, *p.secondary_opts)}
    plain, options = [], [p for p in parser.params if not getattr(p, "is_flag", False)]
    valued = {option for p in options for option in p.opts}
    skip = False
    for word in words:
        if skip:
            skip = False
        elif word.startswith("-"):
            assert word in known, f"everseg {command}: no option '{word}'"
            skip = word in valued
        else:
            plain.append(word)
    verb = " ".join(names)
    keys = [word for word in plain if "=" in word and not word.startswith("=")]
    if verb in ("run", "show"):
        source = next(word for word in plain if "=" not in word)
        if source.endswith((".yaml", ".yml")):
            source = None
        else:
            assert presets.is_preset(source), f"everseg {command}: no preset '{source}'"
        config_loading.load(source, keys)
    elif verb == "eval":
        config_loading.load("demo-mib", keys)
    elif verb == "data check":
        config_loading.load({}, [key if key.startswith("data.") else f"data.{key}" for key in keys])
    elif verb == "list":
        assert listing(plain[0])


@pytest.mark.parametrize(
    "wrong",
    ["rum demo-mib", "run demo-mibb", "run demo-mib train.lrr=1", "run demo-mib --dry", "data chek x", "list thing",
     "eval runs/x data.rooot=y"],
)  # fmt: skip
def test_the_check_of_commands_sees_mistakes(wrong: str) -> None:
    with pytest.raises((AssertionError, ConfigError)):
        check(wrong)


def test_the_pages_print_commands() -> None:
    assert sum(len(commands(path)) for path in PAGES) > 30


@pytest.mark.parametrize("path", PAGES, ids=page_id)
def test_links_lead_to_files_and_headings(path: Path) -> None:
    for target in LINK.findall(prose(path)):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        place, _, anchor = target.partition("#")
        file = (path.parent / place).resolve() if place else path
        assert file.exists(), f"{page_id(path)}: {target} does not exist"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", prose(file), re.MULTILINE)
            slugs = {re.sub(r"[^\w\- ]", "", h.lower()).strip().replace(" ", "-") for h in headings}
            assert anchor in slugs, f"{page_id(path)}: {target} has no such heading"


@pytest.mark.parametrize("path", PAGES, ids=page_id)
def test_tests_that_the_pages_name_exist(path: Path) -> None:
    for file, _, name in re.findall(r"`(tests/[\w/]+\.py)(::(\w+))?`", path.read_text(encoding="utf-8")):
        assert (ROOT / file).is_file(), f"{page_id(path)}: no {file}"
        assert not name or f"def {name}(" in (ROOT / file).read_text(encoding="utf-8"), f"{file}::{name}"


@pytest.mark.parametrize("path", PAGES, ids=page_id)
def test_pages_hold_no_path_of_one_machine(path: Path) -> None:
    found = re.findall(r"(?<![\w.])/(?:work|tmp|root|home)\b\S*", path.read_text(encoding="utf-8"))
    assert found == []


@pytest.mark.parametrize("path", PAGES, ids=page_id)
def test_yaml_examples_are_valid(path: Path, plug_ins: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(plug_ins)
    for number, block in enumerate(blocks(path, "yaml")):
        given = config_yaml.parse(block.code, f"{page_id(path)}, YAML block {number}").value
        if "classes" in given:
            descriptor.parse({k: v for k, v in given.items() if k != "root"}, page_id(path))
        else:
            config_loading.load(given)


def test_the_policy_table_says_what_the_code_does() -> None:
    """Rows of docs/data.md: raw pixel, then train and test of each policy; equal ones share a column."""
    page = (ROOT / "docs" / "data.md").read_text(encoding="utf-8")
    head = re.search(r"^\| raw pixel \|(.*)$", page, re.MULTILINE)
    assert head is not None
    columns = [
        re.findall(r"`([\w-]+)`", cell) for cell in head[1].split("|") if cell.strip().endswith("train")
    ]
    older = ["plop"]  # the name of both of PLOP's in older runs
    assert sorted([*itertools.chain(*columns), *older]) == sorted(POLICIES)
    for row, role in (
        ("background", "background"),
        ("void", "void"),
        ("earlier classes", "old"),
        ("later classes", "future"),
    ):
        cells = [
            cell.strip(" *") for cell in re.search(rf"^\| {row} \|(.*)\|$", page, re.MULTILINE)[1].split("|")
        ]
        for number, name in ((number, name) for number, names in enumerate(columns) for name in names):
            policy = POLICIES[name]
            train, test = cells[2 * number : 2 * number + 2]
            assert train == str(getattr(policy.train, role)), (name, row)
            assert test == ("own id" if role == "old" else str(getattr(policy.test, role))), (name, row)


def test_the_exit_codes_are_those_of_the_errors() -> None:
    page = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    codes = {
        int(code) for row in re.findall(r"^\| ([\d, ]+) \|", page, re.MULTILINE) for code in row.split(",")
    }
    known = {
        cls.exit_code
        for cls in vars(errors).values()
        if isinstance(cls, type) and issubclass(cls, errors.EversegError)
    }
    assert known | {0, 130, 143} == codes


def test_the_harmless_settings_are_listed() -> None:
    page = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")
    section = page.split("## Settings that may change")[1].split("##")[0]
    assert set(re.findall(r"`([a-z_.*]+)`", section)) == HARMLESS


def test_which_method_quotes_the_measured_tables() -> None:
    """Old, new and time of the second step from results/methods.md, time of an iteration from methods.md."""

    def rows(page: str, cells: int) -> dict[str, list[str]]:
        text = (
            (ROOT / "docs" / page)
            .read_text(encoding="utf-8")
            .split("## The five classes one after the other")[0]
        )
        lines = re.findall(r"^\| (.*) \|$", text, re.MULTILINE)
        table = [[re.sub(r"\*\*|[`\\]", "", cell).strip() for cell in line.split(" | ")] for line in lines]
        return {row[0]: row[1:] for row in table if len(row) == cells}

    measured, cost = rows("results/methods.md", 8), rows("methods.md", 4)
    quoted = rows("which-method.md", 5)
    assert len(quoted) > 8
    for method, (old, new, step, iteration) in quoted.items():
        if method in ("method", "---"):
            continue
        figures = measured[method]
        assert [old, new] == [figures[0].split(" ")[0], figures[1].split(" ")[0]], method
        assert step == f"{figures[4].split(' ')[0]} s", method
        assert iteration == (cost[method][0] if method in cost else "no iterations"), method


@pytest.mark.parametrize("path", PAGES, ids=page_id)
def test_pictures_are_small_and_have_a_text_instead(path: Path) -> None:
    for text, place in re.findall(r"!\[([^\]]*)\]\(([^)]+)\)", prose(path)):
        file = path.parent / place
        assert len(text) > 30, f"{page_id(path)}: {place} needs a text that says what it shows"
        assert file.stat().st_size <= 150_000, f"{page_id(path)}: {place}"
        if file.suffix == ".svg":
            assert "<title" in file.read_text(encoding="utf-8"), place


def test_every_method_has_its_formula() -> None:
    page = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    for name in registry.BUILTIN["method"]:
        assert f"\n### {name}\n\n```text\n" in page, name
