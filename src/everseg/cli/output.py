"""What the commands share: names for `everseg list`, output, messages and exit codes."""

from __future__ import annotations

import errno
import json
import os
import re
import sys
import textwrap
import traceback
import warnings
from collections.abc import Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated, Any

import typer

from everseg.display import Result, Table, printable
from everseg.errors import MORE, ConfigError, EversegError, near_miss
from everseg.files import system_text

if TYPE_CHECKING:
    from everseg.config.presets import Entry
    from everseg.labels import LabelPolicy

Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings to change; see `everseg show`.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", help="No progress.")]
Step = Annotated[int | None, typer.Option("--step", min=0, help="Which finished step; default the last.")]
Builder = Annotated[
    str | None,
    typer.Option("--model", metavar="FILE.py:NAME", help="Your own architecture, if the model has one."),
]

LISTS: dict[str, str] = {
    "methods": "method", "datasets": "dataset", "models": "model", "scenarios": "scenario",
}  # fmt: skip
WIDTH = 80
"""Columns of a terminal that lines made here fit into."""
OF_THE_SYSTEM = {
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.ENAMETOOLONG, errno.EXDEV,
    errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EIO, errno.ELOOP, errno.ENOTDIR, errno.ESTALE,
}  # fmt: skip
"""Error numbers with which the operating system refuses something that no program can change."""
OUT_OF_MEMORY = (
    "there is no memory left; end other programs, or use less: train.batch, data.crop, data.workers"
)


def pairs(option: str, given: Sequence[str]) -> dict[str, str]:
    """Read the values of an option that takes NAME=VALUE and may stand several times.

    Raises:
        ConfigError: a value has another form, or a name comes twice.
    """
    found: dict[str, str] = {}
    for text in given:
        name, sign, value = text.partition("=")
        if not sign or not name or not value:
            raise ConfigError(f"{option} {text}: expected NAME=VALUE, such as {option} proposals=maps")
        if name in found:
            raise ConfigError(f"{option}: {name} is given twice")
        found[name] = value
    return found


def listing(what: str) -> list[tuple[str, str]]:
    """List the names of a kind, each with one line of help (maybe empty)."""
    if what in LISTS:
        from everseg import registry

        return list(registry.summaries(LISTS[what]).items())
    if what == "presets":
        from everseg.config import presets

        return [(entry.name, entry.title) for entry in presets.entries()]
    if what == "tasks":
        from everseg.scenarios.tasks import known_tasks

        return [
            (f"{data} {task}", "")
            for data in ("voc", "ade", "camvid", "demo")
            for task in known_tasks(data)
        ]  # fmt: skip
    if what == "policies":
        from everseg.labels import POLICIES

        return [(name, _policy_text(name)) for name in POLICIES]
    known = [*LISTS, "presets", "tasks", "policies"]
    raise ConfigError(f"list: unknown '{what}'{near_miss(what, known)} (one of {', '.join(known)})")


def preset_list(entries: Sequence[Entry], contains: str = "") -> str:
    """Format presets as text: the name, and where it has them protocol and policy, below the heading they share.

    Args:
        contains: a preset whose name has no such text was found by another spelling, which stands behind it.
    """
    lines: list[str] = []
    width = max(len(entry.name) for entry in entries)
    for number, entry in enumerate(entries):
        if not number or entry.title != entries[number - 1].title:
            lines += [*([""] if number else []), entry.title]
        other = next((name for name in entry.also if contains in name), "")
        same = f"  (= {other})" if contains not in entry.name else ""
        beside = f"{entry.protocol}, {entry.policy}" if entry.protocol else entry.policy
        lines.append(f"  {entry.name:{width}}  {beside}{same}")
    return "\n".join(lines)


def preset_groups() -> str:
    """Summarise the presets in a screen or two: what each group is about, and what its names are made of."""
    from everseg.config import presets

    groups = presets.groups()
    lines = []
    for group in groups:
        lines += [group.title]
        rows = {"names": (f"{group.names}, such as {group.example}",), **group.parts}
        for what, values in rows.items():
            lines += textwrap.wrap(
                ", ".join(values), WIDTH, initial_indent=f"  {what:<11}", subsequent_indent=" " * 13,
                break_on_hyphens=False, break_long_words=False,
            )  # fmt: skip
        lines += [""]
    lines += ["Networks of later papers, behind a preset of new classes: voc-15-1-mib@swin-b"]
    lines += [f"  {name:<13}{about}" for name, about in presets.networks().items()]
    lines += [""]
    total = sum(group.number for group in groups)
    return "\n".join(
        [
            *lines,
            f"{total} presets. Not every task is published with every method.",
            "  everseg list presets voc-15-5   those with voc-15-5 in their name",
            "  everseg list presets --all      all of them",
            "  everseg show voc-15-5-mib       what one of them does",
        ]
    )


def _policy_text(name: str) -> str:
    """Say what a label policy does with each kind of pixels, and which others do the same."""
    from everseg.labels import POLICIES, policy_name

    policy = POLICIES[name]
    parts = [f"{role}: {_pixels_text(role, getattr(policy, role))}" for role in ("train", "test")]
    if policy_name(name, "voc") != name:
        parts.append(f"older name of {policy_name(name, 'voc')}, on ADE20K of {policy_name(name, 'ade')}")
    elif same := [other for other in POLICIES if other != name and POLICIES[other] == policy]:
        parts.append(f"the same table as {' and '.join(same)}")
    if name == "plop-ade":
        parts.append("raw 0 of ADE20K is the background, so it counts")
    return "; ".join(parts)


def _pixels_text(role: str, policy: LabelPolicy) -> str:
    from everseg.labels import IGNORED

    called = {"old": "earlier classes", "future": "later classes"}
    found: dict[str, list[str]] = {}
    for kind, train_id in vars(policy).items():
        # In tests the classes that the model knows keep their ids, whatever the table says of others.
        own = (role, kind) == ("test", "old")
        fate = "own id" if own else "ignored" if train_id == IGNORED else "background"
        found.setdefault(fate, []).append(called.get(kind, kind))
    return ", ".join(f"{' + '.join(kinds)}: {fate}" for fate, kinds in found.items())


def speaks() -> bool:
    """Tell whether this process prints results: of several processes only the first does."""
    return os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"


def console_of_stdout() -> Any:
    """Make a rich console as wide as the terminal, or 160 columns wide for files and pipes."""
    from rich.console import Console

    return Console(highlight=False, markup=False, width=None if sys.stdout.isatty() else 160)


def write_json(value: Any) -> None:
    """Print JSON on stdout."""
    sys.stdout.write(json.dumps(value, indent=1, default=str) + "\n")


def say(text: str) -> None:
    """Print a result."""
    sys.stdout.write(printable(text) + "\n")


def note(text: str) -> None:
    """Print a message on stderr."""
    sys.stderr.write(printable(text) + "\n")


def give(result: Result, as_json: bool = False) -> None:
    """Print the result of a command: notes on stderr, the rest or JSON on stdout. Only the first process prints."""
    if not speaks():
        return
    for text in result.notes:
        note(f"note: {text}")
    if as_json:
        write_json(result.to_json())
        return
    for piece in result.shown():
        if isinstance(piece, str):
            say(piece)
        elif isinstance(piece, Table):
            # Into a file or pipe as plain text: a console would fill every line with blanks.
            if sys.stdout.isatty():
                console_of_stdout().print(piece)
            else:
                say(f"{piece}\n")


def guarded(app: typer.Typer, arguments: list[str], debug: bool) -> int:
    """Run the command line. Every failure becomes one message on stderr and an exit code.

    Returns:
        The exit code; -1 if the program that reads stdout has gone.
    """
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: note(f"warning: {message}")
            code = _called(app, arguments)
        sys.stdout.flush()
    except BrokenPipeError:
        return -1
    except (KeyboardInterrupt, typer.Abort) as error:
        if isinstance(
            error.__cause__, EOFError
        ):  # Typer turns every EOFError into an interrupt, also an unexpected one
            return _unexpected(error.__cause__, debug)
        return _failed("interrupted", 130, debug)
    except typer.Exit as stop:
        return stop.exit_code
    except EversegError as error:
        return _failed(f"{error}\n{learn_more(error.topic)}", error.exit_code, debug)
    except OSError as error:
        if error.errno in OF_THE_SYSTEM:
            what = system_text(error, None if error.filename is None else str(error.filename))
            return _failed(f"{what}\n{learn_more('checkpoint')}", 4, debug)
        return _unexpected(error, debug)
    except MemoryError:
        return _failed(f"{OUT_OF_MEMORY}\n{learn_more('checkpoint')}", 4, debug)
    except Exception as error:
        if callable(getattr(error, "format_message", None)):  # a usage error of the command-line library
            return _failed(_usage(error), int(getattr(error, "exit_code", 2)), debug)
        if isinstance(error, RuntimeError) and _NO_MEMORY.search(
            str(error)
        ):  # PyTorch's own words, of CPU and GPU
            return _failed(f"{OUT_OF_MEMORY}\n{learn_more('checkpoint')}", 4, debug)
        return _unexpected(error, debug)
    if code == 130:  # Typer turned an interrupt into this code
        return _failed("interrupted", 130, False)
    return code if isinstance(code, int) else 0


def _called(app: typer.Typer, arguments: list[str]) -> Any:
    """Run the command line. Where the reader of a pipe is gone, its library would end the process itself, with 1."""
    try:
        return app(arguments, standalone_mode=False, prog_name="everseg")
    except SystemExit as stop:
        if isinstance(stop.__context__, BrokenPipeError):
            raise stop.__context__ from None
        raise


_NO_MEMORY = re.compile(
    "out of memory|can(not|'t) allocate memory|not enough memory|bad_alloc|alloc_failed|can't start new thread"
    "|could not create a primitive",  # oneDNN, which says no more
    re.IGNORECASE,
)


def learn_more(topic: str) -> str:
    """Say where to read a section of docs/errors.md: on the website if the package names one, else `everseg docs`."""
    from importlib import metadata

    with suppress(metadata.PackageNotFoundError):
        for entry in metadata.metadata("everseg").get_all("Project-URL") or []:
            label, _, url = entry.partition(",")
            if label.strip().lower() == "documentation":
                return f"{MORE}{url.strip().rstrip('/')}/docs/errors.html#{topic}"
    return f"{MORE}everseg docs errors#{topic}"


def _usage(error: Any) -> str:
    text = error.format_message()
    context = getattr(error, "ctx", None)
    option = getattr(error, "option_name", None)
    if option and hasattr(error, "possibilities"):
        known = [name for one in context.command.params for name in one.opts] if context is not None else []
        text = f"no such option: {option}" + near_miss(option, known)
    return f"{text} (see: {context.command_path} --help)" if context is not None else text


def _failed(text: str, code: int, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    note(f"error: {text}")
    return code


def _unexpected(error: BaseException, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    hint = (
        ""
        if debug
        else "; a fault of everseg, or of your own code if the run uses any: the same command with --debug shows where"
    )
    note(f"error: {type(error).__name__}: {error}{hint}")
    return 1
