"""`everseg docs`, and the last line of every error, which leads there."""

from __future__ import annotations

import ast
import inspect
import re
from email.message import Message
from importlib import metadata
from pathlib import Path

import pytest

from everseg import errors
from everseg.cli import docs as cli_docs
from everseg.cli import output as cli_support
from everseg.cli.main import app, main
from everseg.errors import EversegError
from saying import must_say

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
KINDS = [
    cls for cls in vars(errors).values() if inspect.isclass(cls) and issubclass(cls, EversegError)
]  # fmt: skip


def everseg(capsys: pytest.CaptureFixture, *arguments: str) -> tuple[int, str, str]:
    with pytest.raises(SystemExit) as stop:
        main(list(arguments))
    captured = capsys.readouterr()
    return int(stop.value.code or 0), captured.out, captured.err


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_every_kind_of_error_has_its_section(kind: type[EversegError]) -> None:
    text = cli_docs.section(PAGE, kind.topic, "errors")
    if kind is not errors.Interrupted:
        assert f"Exit code {kind.exit_code}" in text
    assert len({cls.topic for cls in KINDS}) == len(KINDS)


def written(node: ast.AST) -> str | None:
    """A literal's text, with "..." where a value stands."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join("..." if isinstance(part, ast.FormattedValue) else part.value for part in node.values)
    return None


def test_the_messages_of_the_page_are_those_of_the_code() -> None:
    files = (ROOT / "src" / "everseg").rglob("*.py")
    code = "\n".join(
        text for file in files for node in ast.walk(ast.parse(file.read_text())) if (text := written(node))
    )
    told = re.findall(r"^\| `([^`]+)`[^|]*\| [^|]+ \| [^|]+ \|$", PAGE, re.MULTILINE)
    assert len(told) > 15
    assert [message for message in told if message not in code] == []


class SomeError(EversegError):
    exit_code = 4
    topic = "checkpoint"


@pytest.mark.parametrize("kind", [errors.ConfigError, errors.DataError, SomeError])
def test_an_error_ends_with_the_command_that_explains_it(
    kind: type[EversegError], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise kind("a.png\nb.png")

    monkeypatch.setattr("everseg.reports.outline.load", fail)
    code, out, err = everseg(capsys, "show", "demo-mib")
    assert (code, out) == (kind.exit_code, "")
    assert err == f"error: a.png\nb.png\nmore: everseg docs errors#{kind.topic}\n"
    code, out, _ = everseg(capsys, *err.splitlines()[-1].removeprefix("more: everseg ").split())
    assert code == 0
    assert f"Exit code {kind.exit_code}" in out


def test_where_the_package_names_its_site_the_line_is_an_address(monkeypatch: pytest.MonkeyPatch) -> None:
    told = Message()
    told["Project-URL"] = "Source, https://example.org/source"
    monkeypatch.setattr(metadata, "metadata", lambda _: told)
    assert cli_support.learn_more("data") == "more: everseg docs errors#data"
    told["Project-URL"] = "Documentation, https://example.org/everseg/"
    assert cli_support.learn_more("data") == "more: https://example.org/everseg/docs/errors.html#data"

    def missing(_: str) -> None:
        raise metadata.PackageNotFoundError

    monkeypatch.setattr(metadata, "metadata", missing)
    assert cli_support.learn_more("data") == "more: everseg docs errors#data"


def test_a_full_disk_leads_there_too(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device", "runs/x")

    monkeypatch.setattr("everseg.reports.outline.load", full)
    code, _, err = everseg(capsys, "show", "demo-mib")
    assert code == 4
    must_say(err.splitlines()[0], "error:", "disk full", "runs/x", "MB free")
    assert err.splitlines()[1].startswith("more: ")


def test_without_a_page_it_lists_all(capsys: pytest.CaptureFixture) -> None:
    code, out, _ = everseg(capsys, "docs")
    assert code == 0
    for name in ("quickstart", "errors", "results/camvid"):
        assert re.search(rf"^ *{name} ", out, re.MULTILINE), name
    assert len(cli_docs.shipped_pages()) == len(list((ROOT / "docs").rglob("*.md")))


@pytest.mark.parametrize("spelt", ["errors#gate", "errors.md#gate", "docs/errors.md#gate"])
def test_a_section_is_shown_alone(spelt: str, capsys: pytest.CaptureFixture) -> None:
    code, out, _ = everseg(capsys, "docs", spelt)
    assert code == 0
    assert "Exit code 6" in out
    assert "Exit code 5" not in out
    assert "Exit code 75" not in out


@pytest.mark.parametrize(
    ("spelt", "said"),
    [
        ("errrs", ["'errrs'", "'errors'", "everseg docs"]),
        ("errors#dat", ["page 'errors'", "section 'dat'", "'data'"]),
        ("errors#zzz", ["section 'zzz'", "errors, config, data, checkpoint,"]),
        ("../README", ["page '../README'"]),
    ],
)
def test_wrong_names_are_told_the_nearest(spelt: str, said: list[str], capsys: pytest.CaptureFixture) -> None:
    code, out, err = everseg(capsys, "docs", spelt)
    assert (code, out) == (2, "")
    must_say(err, *said)


def test_a_terminal_without_unicode_gets_the_source(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(cli_docs, "unicode_output", lambda: False)
    _, out, _ = everseg(capsys, "docs", "errors#gate")
    assert out.startswith("## Gate\n")
    assert "`everseg extend --keep-at-least`" in out


def test_headings_in_code_are_none() -> None:
    text = "# A\n```sh\n# not one\n```\n## B c, d\nx\n# E\n"
    assert [(level, name) for level, name, _ in cli_docs.headings(text)] == [(1, "a"), (2, "b-c-d"), (1, "e")]
    assert cli_docs.section(text, "b-c-d", "p") == "## B c, d\nx\n"
    assert cli_docs.section(text, "a", "p") == "# A\n```sh\n# not one\n```\n## B c, d\nx\n"


def test_an_installation_without_pages_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """The wheel puts them below share/everseg/docs."""
    package = tmp_path / "lib" / "site-packages" / "everseg"
    package.mkdir(parents=True)
    monkeypatch.setattr(cli_docs, "__file__", str(package / "cli" / "docs.py"))
    monkeypatch.setattr(cli_docs.sysconfig, "get_path", lambda *_: str(tmp_path))
    code, _, err = everseg(capsys, "docs", "errors")
    assert code == 2
    must_say(err, "pages", "not installed")
    installed = tmp_path / "share" / "everseg" / "docs"
    installed.mkdir(parents=True)
    (installed / "errors.md").write_text("# Installed\n")
    code, out, _ = everseg(capsys, "docs", "errors")
    assert code == 0
    assert "Installed" in out


def test_the_verb_is_there() -> None:
    assert any(command.callback is cli_docs.docs for command in app.registered_commands)


def test_an_option_of_several_commands_is_declared_once() -> None:
    seen: dict[str, list[str]] = {}
    for path in sorted(Path(cli_docs.__file__).parent.glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            text = ast.unparse(node) if isinstance(node, ast.Subscript) else ""
            if text.startswith("Annotated[") and "typer.Option" in text:
                seen.setdefault(text, []).append(f"{path.name}:{node.lineno}")
    assert len(seen) > 40
    twice = {text: places for text, places in seen.items() if len(places) > 1}
    assert twice == {}, "give it a name, in cli/output.py where several modules need it"
