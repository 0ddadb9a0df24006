"""The container file: linted everywhere, built and run where a container engine is at hand and asked for."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import time
import urllib.request
from pathlib import Path

import pytest

from everseg.cli.main import app
from everseg.deploy.serve import HOST

ROOT = Path(__file__).resolve().parents[2]
FILE = ROOT / "Containerfile"
ENGINE = next(filter(None, map(shutil.which, ("podman", "docker"))), None)
KNOWN = {"ARG", "FROM", "ENV", "COPY", "RUN", "USER", "STOPSIGNAL", "HEALTHCHECK", "ENTRYPOINT", "CMD"}


def instructions(text: str) -> list[tuple[str, str]]:
    """The instructions of a container file with their arguments, joined over continued lines."""
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    whole = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [(name, rest.strip()) for name, _, rest in (line.partition(" ") for line in whole.splitlines())]


def faults(found: list[tuple[str, str]]) -> list[str]:
    """What a linter would say."""
    said = [f"{name} is no instruction that we use" for name, _ in found if name not in KNOWN]
    given = dict(found)
    names = [name for name, _ in found]
    if names.count("FROM") != 1 or set(names[: names.index("FROM")]) - {"ARG"}:
        said.append("one FROM, and nothing but ARG before it")
    base = re.search(r"BASE=(\S+)", " ".join(rest for name, rest in found if name == "ARG"))
    if base is None or not re.search(r":[\w.-]*\d", base[1]) or "latest" in base[1]:
        said.append("the base is not of a stated version")
    if given.get("USER", "0").split(":")[0] in ("0", "root", ""):
        said.append("it runs as root")
    if "USER" in names and "RUN" in names[names.index("USER") :]:
        said.append("something is installed after the user was changed")
    for name in ("ENTRYPOINT", "CMD"):
        try:
            if not all(isinstance(word, str) for word in json.loads(given.get(name, "null"))):
                raise TypeError
        except (ValueError, TypeError):
            said.append(f"{name} is not in the form of a list: a shell would take the signals")
    if "--no-cache-dir" not in given.get("RUN", "--no-cache-dir"):
        said.append("pip's cache stays in the image")
    if re.search(r"curl|wget|sudo|https?://(?!127\.0\.0\.1)", " ".join(rest for _, rest in found)):
        said.append("something is fetched beside the packages")
    return said


def test_the_container_file_has_no_fault_and_the_linter_sees_some() -> None:
    found = instructions(FILE.read_text())
    assert faults(found) == []
    for before, after in (
        ("USER 10001", "USER root"), (":3.13-slim-bookworm", ":latest"), ('["everseg", "serve"]', "everseg serve"),
        ("--no-cache-dir ", ""), ("COPY dist", "ADD dist"), ("&& rm -r /wheels", "&& curl x"),
    ):  # fmt: skip
        changed = FILE.read_text().replace(before, after)
        assert changed != FILE.read_text()
        assert faults(instructions(changed)), after


def test_it_starts_what_there_is() -> None:
    given = dict(instructions(FILE.read_text()))
    assert json.loads(given["ENTRYPOINT"]) == ["everseg", "serve"]
    assert "serve" in {info.name or info.callback.__name__ for info in app.registered_commands}
    assert f"http://{HOST}:8000/health" in given["HEALTHCHECK"]
    extras = re.search(r"\[([\w,]+)\]", given["RUN"])
    assert extras is not None
    project = (ROOT / "pyproject.toml").read_text()
    assert all(f"\n{extra} = [" in project for extra in extras[1].split(","))


@pytest.mark.slow
@pytest.mark.skipif(ENGINE is None, reason="no container engine here (podman or docker)")
@pytest.mark.skipif(
    os.environ.get("EVERSEG_CONTAINER") != "1", reason="fetches a base image; EVERSEG_CONTAINER=1 runs it"
)
def test_it_is_built_and_answers() -> None:
    assert list((ROOT / "dist").glob("everseg-*.whl")), "python -m build makes the wheel first"
    subprocess.run([ENGINE, "build", "-t", "everseg-serve-test", "-f", str(FILE), str(ROOT)], check=True)
    bundle = ROOT / "tests/fixtures/bundle-format-1"
    run = [ENGINE, "run", "--rm", "-d", "--network", "host", "--read-only", "--tmpfs", "/tmp", "-v",
           f"{bundle}:/bundle:ro", "everseg-serve-test"]  # fmt: skip
    name = subprocess.run(run, check=True, capture_output=True, text=True).stdout.strip()
    try:
        until = time.monotonic() + 120
        while True:
            try:
                with urllib.request.urlopen(f"http://{HOST}:8000/health", timeout=5) as answer:
                    assert json.load(answer)["status"] == "ok"
                break
            except OSError:
                assert time.monotonic() < until
                time.sleep(1)
    finally:
        subprocess.run([ENGINE, "stop", name], check=False)
