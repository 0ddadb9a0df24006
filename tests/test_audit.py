"""The audit of what everseg needs: a hole is told and fails, installed or let in; the bill of materials."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

ROOT = Path(__file__).resolve().parents[1]
spec = importlib.util.spec_from_file_location("audit", ROOT / "scripts" / "audit.py")
assert spec is not None
assert spec.loader is not None
audit = importlib.util.module_from_spec(spec)
sys.modules["audit"] = audit  # dataclasses look their module up
spec.loader.exec_module(audit)
SNAPSHOT: dict[str, Any] = json.loads(audit.SNAPSHOT.read_text(encoding="utf-8"))


def snapshot(folder: Path, **entry: str) -> Path:
    path = folder / "advisories.json"
    hole = {
        "id": "CVE-2026-0001",
        "package": "numpy",
        "affected": ">=0",
        "summary": "a hole of this test",
        **entry,
    }
    path.write_text(json.dumps({"date": "2026-11-29", "source": "this test", "advisories": [hole]}))
    return path


def test_nothing_known_is_installed_or_let_in(capsys: pytest.CaptureFixture[str]) -> None:
    assert audit.main([]) == 0, capsys.readouterr().err
    out = capsys.readouterr().out
    assert re.search(r"^  torch \d", out, re.MULTILINE)
    assert f"{len(SNAPSHOT['advisories'])} advisories as known on {SNAPSHOT['date']}" in out


def test_a_hole_in_what_is_installed_is_told_and_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert audit.main(["--advisories", str(snapshot(tmp_path))]) == 1
    said = capsys.readouterr()
    assert re.search(r"numpy [\d.]+  HOLE CVE-2026-0001", said.out)
    assert re.search(r"HOLE installed numpy .*a hole of this test", said.err)
    assert audit.main(["--advisories", str(snapshot(tmp_path, accepted="never called"))]) == 0
    assert "never called" in capsys.readouterr().out


def test_a_hole_that_a_bound_lets_in_is_told_and_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The release that is installed may be free of it."""
    assert audit.main(["--advisories", str(snapshot(tmp_path, affected="==2.0"))]) == 1
    assert "HOLE numpy>=2.0 lets in 2.0" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("bounds", "affected", "is_let_in"),
    [
        (">=2", "<3", True), (">=3", "<3", False), ("", "<3", True), (">=1,<2", ">=2", False),
        (">=2.5", ">=2,<2.4", False),
        ("==2.0", "<3", True), (">=2", ">=2.1,<2.3", True), ("<5", ">=4", True), (">=2,<3", ">=3,<3.2", False),
    ],
)  # fmt: skip
def test_what_bounds_let_in_is_judged_by_their_lowest_release_and_by_where_a_hole_begins(
    bounds: str, affected: str, is_let_in: bool
) -> None:
    """Who installs today gets the newest; an old environment may keep every release that the bounds allow."""
    found = list(audit.let_in([Requirement(f"x{bounds}")], [audit.Hole("CVE-1", "x", affected, "")]))
    assert bool(found) == is_let_in


def test_the_snapshot_is_whole() -> None:
    seen = set()
    for entry in SNAPSHOT["advisories"]:
        assert re.fullmatch(r"(CVE-\d{4}-\d+|PYSEC-\d{4}-\d+|GHSA(-\w{4}){3})", entry["id"])
        assert (entry["package"], entry["id"]) not in seen
        seen.add((entry["package"], entry["id"]))
        assert SpecifierSet(entry["affected"])
        assert entry["summary"]
    assert len(seen) >= 50


def test_the_advisories_of_the_page_are_in_the_snapshot() -> None:
    page = (ROOT / "SECURITY.md").read_text(encoding="utf-8").split("## Lower bounds")[1]
    known = {entry["id"]: entry for entry in SNAPSHOT["advisories"]}
    for row in re.findall(r"^\| (\S+) \|.*$", page, re.MULTILINE):
        line = next(line for line in page.splitlines() if line.startswith(f"| {row} |"))
        for name in re.findall(r"(?:CVE|PYSEC)-\d{4}-\d+", line):
            assert known[name]["package"] == row
    accepted = page.split("| package | advisory |")[1]
    assert {name for name, entry in known.items() if "accepted" in entry} == set(
        re.findall(r"CVE-\d{4}-\d+", accepted)
    )


def test_the_bill_of_materials_names_every_package_once_and_what_it_needs(tmp_path: Path) -> None:
    for name in ("a.json", "b.json"):
        assert audit.main(["--sbom", str(tmp_path / "sbom" / name)]) == 0
    first, second = ((tmp_path / "sbom" / name).read_bytes() for name in ("a.json", "b.json"))
    assert first == second
    bill = json.loads(first)
    assert (bill["bomFormat"], bill["specVersion"]) == ("CycloneDX", "1.6")
    assert re.fullmatch(r"urn:uuid:[0-9a-f-]{36}", bill["serialNumber"])
    references = [part["bom-ref"] for part in [bill["metadata"]["component"], *bill["components"]]]
    assert len(set(references)) == len(references) > 10
    assert {entry["ref"] for entry in bill["dependencies"]} == set(references)
    assert {need for entry in bill["dependencies"] for need in entry["dependsOn"]} <= set(references)
    named = {part["name"]: part for part in bill["components"]}
    assert named["numpy"]["purl"] == f"pkg:pypi/numpy@{named['numpy']['version']}"
    assert named["torch"]["licenses"]
    roots = {entry["ref"]: entry["dependsOn"] for entry in bill["dependencies"]}
    assert named["torch"]["bom-ref"] in roots[bill["metadata"]["component"]["bom-ref"]]


def test_the_bill_is_dated_only_where_the_build_says_when(monkeypatch: pytest.MonkeyPatch) -> None:
    packages = audit.installed()
    assert "timestamp" not in audit.bill(packages)["metadata"]
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "0")
    assert audit.bill(packages)["metadata"]["timestamp"] == "1970-01-01T00:00:00Z"
