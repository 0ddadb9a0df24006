"""What stands around the code: workflows of any fork, lower bounds, citation, hooks of a contributor's machine."""

from __future__ import annotations

import re
import subprocess
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version
from reading import ROOT, blocks

import everseg

GITHUB = ROOT / ".github"
WORKFLOWS = sorted((GITHUB / "workflows").glob("*.yml"))
FORMS = [path for path in sorted((GITHUB / "ISSUE_TEMPLATE").glob("*.yml")) if path.name != "config.yml"]
OTHERS = [*GITHUB.rglob("*.yml"), ROOT / ".pre-commit-config.yaml", ROOT / "CITATION.cff"]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
WRITES = {
    ("docs.yml", "publish"): {"pages": "write", "id-token": "write"},
    ("release.yml", "publish"): {"id-token": "write"},
}
"""Workflow and job -> what it may do beside reading the code. A new entry needs a good reason."""
SWITCHES = {("docs.yml", "publish"): "PUBLISH_DOCS", ("release.yml", "publish"): "PUBLISH_TO_PYPI"}
"""Workflow and job -> the repository variable that must be set before the job does anything."""


def document(path: Path) -> Any:
    """A YAML file, every scalar a string: `on` stays a word and 3.10 does not become 3.1."""
    return yaml.load(path.read_text(encoding="utf-8"), Loader=yaml.BaseLoader)


def jobs() -> Iterator[tuple[str, str, dict[str, Any]]]:
    for path in WORKFLOWS:
        for name, job in document(path)["jobs"].items():
            yield path.name, name, job


def steps() -> Iterator[tuple[str, dict[str, Any]]]:
    for workflow, name, job in jobs():
        for step in job.get("steps", []):
            yield f"{workflow}: {name}", step


# Workflows


@pytest.mark.parametrize("path", OTHERS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_yaml_file_parses(path: Path) -> None:
    assert isinstance(document(path), dict)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_may_only_read_and_ends(path: Path) -> None:
    workflow = document(path)
    assert workflow["permissions"] == {"contents": "read"}
    assert path.stem in workflow["concurrency"]["group"], "two workflows of one group stop each other"
    # a pull request from a fork must not run with this repository's rights
    assert not {"pull_request_target", "workflow_run", "issue_comment"} & set(workflow["on"])
    for name, job in workflow["jobs"].items():
        if "uses" not in job:
            assert 0 < int(job["timeout-minutes"]) <= 90, name


def test_only_named_jobs_write_and_only_where_a_variable_says_so() -> None:
    allowed: dict[tuple[str, str], dict[str, str]] = {}
    for workflow, name, job in jobs():
        if job.get("permissions", {"contents": "read"}) != {"contents": "read"}:
            allowed[workflow, name] = job["permissions"]
    assert allowed == WRITES
    for (workflow, name), switch in SWITCHES.items():
        assert f"vars.{switch} == 'true'" in document(GITHUB / "workflows" / workflow)["jobs"][name]["if"]
    assert set(SWITCHES) == set(WRITES)


def test_no_job_knows_a_secret_or_whose_repository_it_is() -> None:
    for path in OTHERS:
        text = path.read_text(encoding="utf-8")
        assert "secrets." not in text, path.name
        assert not re.search(r"github\.repository(_owner)?\b", text), f"{path.name}: works for one owner only"
        plain = re.sub(r"^\s*-? ?uses: .*$", "", text, flags=re.MULTILINE)
        assert not re.search(r"(github|gitlab)\.com/\w", plain), f"{path.name}: names a repository"


def test_foreign_actions_are_pinned_by_commit() -> None:
    used = [
        line for path in WORKFLOWS for line in re.findall(r"uses: (.*)", path.read_text(encoding="utf-8"))
    ]
    assert len(used) > 10
    for line in used:
        local = re.fullmatch(r"\./\.github/workflows/(\w+\.yml)", line)
        if local:
            assert "workflow_call" in document(GITHUB / "workflows" / local[1])["on"]
        else:
            assert re.fullmatch(r"[\w.-]+/[\w.-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", line), line
    assert len({line.split("@")[0] for line in used}) == len(set(used)), "one action, two versions"


def test_no_text_from_outside_reaches_a_shell() -> None:
    for where, step in steps():
        assert "${{" not in step.get("run", ""), f"{where}: pass it through env"
        if "checkout@" in step.get("uses", ""):
            assert step["with"]["persist-credentials"] == "false", where


def test_every_installation_takes_the_cpu_build() -> None:
    for path in WORKFLOWS:
        text = path.read_text(encoding="utf-8")
        if "pip install" in text or "bash .ci/" in text:
            assert document(path)["env"]["PIP_EXTRA_INDEX_URL"] == "https://download.pytorch.org/whl/cpu"


def test_workflows_call_what_is_there() -> None:
    named: set[str] = set()
    for _, step in steps():
        named |= set(re.findall(r"(?:bash|python) ((?:\.ci|scripts)/\S+)", step.get("run", "")))
    assert {".ci/run", ".ci/first", "scripts/site/build.py"} <= named
    assert [name for name in named if not (ROOT / name).is_file()] == []


def test_the_published_package_is_the_tested_one() -> None:
    release = document(GITHUB / "workflows" / "release.yml")
    assert list(release["on"]) == ["push"]
    assert release["on"]["push"] == {"tags": ["v*"]}
    publish = release["jobs"]["publish"]
    assert publish["needs"] == "tests"
    assert publish["environment"] == "pypi"
    assert release["jobs"]["tests"]["uses"] == "./.github/workflows/tests.yml"
    download, upload = publish["steps"]  # nothing else runs beside the right to publish
    package = document(GITHUB / "workflows" / "tests.yml")["jobs"]["package"]["steps"][-1]
    assert download["with"]["name"] == package["with"]["name"]
    assert upload["with"] == {"attestations": "true"}


def test_python_versions_are_the_same_everywhere() -> None:
    matrix = document(GITHUB / "workflows" / "tests.yml")["jobs"]["tests"]["strategy"]["matrix"]["python"]
    classifiers = PROJECT["project"]["classifiers"]
    classified = [m[1] for text in classifiers if (m := re.fullmatch(r".*Python :: (3\.\d+)", text))]
    assert matrix == classified
    assert PROJECT["project"]["requires-python"] == f">={matrix[0]}"
    assert PROJECT["tool"]["mypy"]["python_version"] == matrix[0]
    assert PROJECT["tool"]["ruff"]["target-version"] == f"py{matrix[0].replace('.', '')}"
    for where, step in steps():
        version = step.get("with", {}).get("python-version", matrix[0])
        assert version in matrix or version.startswith("${{"), where


def test_ci_first_types_the_first_command_of_the_readme() -> None:
    script = (ROOT / ".ci" / "first").read_text(encoding="utf-8")
    extract = re.search(r"^command=\$\((awk .*)\)$", script, re.MULTILINE)
    assert extract is not None
    done = subprocess.run(["bash", "-c", extract[1]], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == blocks(ROOT / "README.md", "sh")[0].code
    assert "pip install" in done.stdout
    assert "everseg demo" in done.stdout


# Lower bounds


def requirements() -> dict[str, Requirement]:
    """Every direct requirement by its name: of the package, its extras, and its build."""
    project = PROJECT["project"]
    texts = [*PROJECT["build-system"]["requires"], *project["dependencies"]]
    texts += [text for extra in project["optional-dependencies"].values() for text in extra]
    found: dict[str, Requirement] = {}
    for one in map(Requirement, texts):
        if one.name != "everseg":  # of a package that is named twice all bounds hold
            found.setdefault(one.name.lower(), one).specifier &= one.specifier
    return found


def lower_bound(requirement: Requirement) -> str | None:
    bounds = [one.version for one in requirement.specifier if one.operator == ">="]
    return bounds[0] if bounds else None


def security() -> str:
    page = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    return page.split("## Lower bounds\n")[1].split("\n## ")[0]


def rows(heading: str) -> list[list[str]]:
    """The table of the section on lower bounds that begins with these columns."""
    lines = security().split(heading)[1].splitlines()[2:]
    table = lines[: next((n for n, line in enumerate(lines) if not line.startswith("|")), len(lines))]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table]


def test_the_table_of_bounds_is_that_of_the_project() -> None:
    table = {name: bound for name, bound, _ in rows("| package | bound |")}
    needed = requirements()
    assert {name: lower_bound(needed[name]) for name in table if name in needed} == table
    for name, bound, excluded in rows("| package | bound |"):
        assert re.search(r"\b(CVE|PYSEC|GHSA)-", excluded), f"{name} {bound}: excludes which hole?"


def test_every_requirement_was_looked_up() -> None:
    """A new dependency belongs into the table, or into the sentence that says nothing was found."""
    table = {name for name, _, _ in rows("| package | bound |")}
    sentence = re.search(r"No advisory was found .*?:(.*?)\.\s", security(), re.DOTALL)
    assert sentence is not None
    clean = {name.strip() for name in sentence[1].split(",")}
    exceptions = {name for name, _, _, _ in rows("| package | advisory |")}
    assert table & clean == set()
    assert table | clean | exceptions == set(requirements())


@pytest.mark.parametrize(
    ("name", "least"), [("onnx", "1.21"), ("ray", "2.54"), ("pillow", "12.2"), ("torch", "2.10")]
)
def test_bounds_never_fall_below_a_known_hole(name: str, least: str) -> None:
    bound = lower_bound(requirements()[name])
    assert bound is not None
    assert Version(bound) >= Version(least)


def test_what_is_broken_and_not_excluded_is_not_called() -> None:
    broken = {
        full.rsplit(".", 1)[-1]: full
        for _, _, functions, _ in rows("| package | advisory |")
        for full in re.findall(r"`([\w.]+)`", functions)
    }
    # the short names that other code may carry too are looked for with their module
    patterns = {full if short in ("load", "script") else short for short, full in broken.items()}
    assert len(patterns) >= 4
    for path in (ROOT / "src").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert [name for name in patterns if re.search(rf"\b{re.escape(name)}\b", text)] == [], path.name
        assert not re.search(r"from torch\.(jit|export) import", text), path.name


# Citation, forms, hooks


def test_the_citation_is_of_this_version() -> None:
    citation = document(ROOT / "CITATION.cff")
    assert citation["cff-version"] == "1.2.0"
    assert citation["version"] == everseg.__version__
    assert citation["license"] == PROJECT["project"]["license"]
    assert {"message", "title", "authors"} <= set(citation)
    cited = {one["title"]: one for one in citation["references"]}
    mib = cited["Modeling the Background for Incremental Learning in Semantic Segmentation"]
    mdil = cited["Multi-Domain Incremental Learning for Semantic Segmentation"]
    assert (mib["authors"][0]["family-names"], mib["year"]) == ("Cermelli", "2020")
    assert (mdil["authors"][0]["family-names"], mdil["year"]) == ("Garg", "2022")


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_a_form_asks_for_something(path: Path) -> None:
    form = document(path)
    assert {"name", "description", "body"} <= set(form)
    asked = [item for item in form["body"] if item["type"] != "markdown"]
    assert any(item.get("validations", {}).get("required") == "true" for item in asked)
    assert len({item["id"] for item in asked}) == len(asked)
    assert all(item["attributes"]["label"] for item in asked)


def test_there_is_a_form_for_bugs_methods_and_labels() -> None:
    assert {path.stem for path in FORMS} == {"bug", "labels", "method"}
    assert "config.yml" in {path.name for path in (GITHUB / "ISSUE_TEMPLATE").iterdir()}


def test_the_hooks_have_the_versions_of_the_extra_dev() -> None:
    hooks = [hook for repo in document(ROOT / ".pre-commit-config.yaml")["repos"] for hook in repo["hooks"]]
    assert {"ruff-check", "ruff-format", "mypy", "codespell", "large-files"} == {hook["id"] for hook in hooks}
    dev = requirements()
    for hook in hooks:
        for text in hook.get("additional_dependencies", []):
            needed = Requirement(text)
            assert needed.specifier, f"{hook['id']}: any version"
            if needed.name in dev:
                assert needed.specifier == dev[needed.name].specifier, hook["id"]
    assert next(hook for hook in hooks if hook["id"] == "mypy")["language"] == "system"
