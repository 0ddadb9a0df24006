"""Names -> objects."""

from __future__ import annotations

import textwrap
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from everseg import registry
from everseg.errors import ConfigError
from saying import must_say


def test_every_built_in_method_and_model_and_scenario_exists() -> None:
    for kind, table in registry.BUILTIN.items():
        for name in table:
            assert callable(registry.resolve(kind, name)), (kind, name)


def test_the_lists_say_the_first_line_of_each_docstring() -> None:
    """`everseg list` imports none of these modules, so the lines are stored in the table; they must not drift apart."""
    for kind, table in registry.BUILTIN.items():
        for name, entry in table.items():
            text = registry.resolve(kind, name).__doc__ or ""
            assert entry.summary == text.splitlines()[0], (
                f"{kind} {name}: write its docstring's line into the table"
            )


def test_modules_and_files_are_addressed_by_attribute(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text("class Mine: pass\n")
    assert registry.resolve("method", "pathlib:Path") is Path
    first = registry.resolve("method", f"{path}:Mine")
    assert first.__name__ == "Mine"
    assert registry.resolve("method", f"{path}:Mine") is first


@pytest.mark.parametrize("asked", [":Mein", ":Else", ""])
def test_a_file_of_methods_says_which_it_has(tmp_path: Path, asked: str) -> None:
    path = tmp_path / "several.py"
    path.write_text(
        "from everseg import Method\nfrom everseg.methods.ft import FineTuning\n"
        "class Mine(Method): pass\nclass Other(Mine): pass\nclass Helper: pass\ndef tool(): pass\n"
    )
    with pytest.raises(ConfigError) as caught:
        registry.resolve("method", f"{path}{asked}")
    must_say(caught.value, "several.py", "Mine, Other")
    assert ("'Mine'" in str(caught.value)) == (asked == ":Mein")
    assert not any(name in str(caught.value) for name in ("Method", "FineTuning", "Helper", "tool"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mibb", "unknown name 'mibb'; did you mean 'mib'?"),
        ("zzzz", "unknown name 'zzzz' (everseg list methods"),
        ("pathlib:Nothing", "'pathlib' has no 'Nothing'"),
        ("no_such_module_x:A", "no module named 'no_such_module_x'"),
        ("no_such_file.py:A", "no file 'no_such_file.py'"),
    ],
)
def test_what_does_not_exist_is_told(name: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        registry.resolve("method", name)
    assert message in str(caught.value)


def test_a_file_that_fails_says_why_and_can_be_corrected(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text("import no_such_module_y\n")
    with pytest.raises(ConfigError, match=r"mine\.py' .*ModuleNotFoundError"):
        registry.resolve("method", f"{path}:Mine")
    path.write_text(textwrap.dedent("class Mine:\n    pass\n"))
    assert registry.resolve("method", f"{path}:Mine").__name__ == "Mine"


def test_entry_points_come_after_the_built_in_names(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = [
        EntryPoint("theirs", "pathlib:Path", "everseg.methods"),
        EntryPoint("mib", "pathlib:PurePath", "everseg.methods"),
    ]

    def entry_points(group: str, name: str | None = None) -> list[EntryPoint]:
        return [e for e in installed if e.group == group and name in (None, e.name)]

    monkeypatch.setattr(registry, "entry_points", entry_points)
    assert registry.names("method")[-1] == "theirs"
    assert registry.names("method").count("mib") == 1
    assert registry.summaries("method")["theirs"] == ""
    assert registry.resolve("method", "theirs") is Path
    assert registry.resolve("method", "mib").__name__ == "MiB"
