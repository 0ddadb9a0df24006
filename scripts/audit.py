"""Known holes in what everseg needs, and what it needs: for people who must answer for it.

`python scripts/audit.py` prints the tree of what is installed with the holes of `advisories.json`, then what the
bounds in `pyproject.toml` would let in. It ends with 1 if there is a hole in either.
`python scripts/audit.py --sbom FILE` writes the tree as CycloneDX JSON, the bill of materials of this installation.

The snapshot of advisories is made by hand and has a date. Nothing is fetched: two runs say the same.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import sys
import tomllib
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parents[1]
SNAPSHOT = Path(__file__).with_name("advisories.json")
OLD = 180
"""Days after which a snapshot is told to be old."""


@dataclass(frozen=True)
class Hole:
    """An advisory: which releases of which package, and why it does not reach everseg's users, if so."""

    id: str
    package: str
    affected: str
    summary: str
    accepted: str = ""

    def has(self, version: Version | str) -> bool:
        return SpecifierSet(self.affected, prereleases=True).contains(str(version))

    def __str__(self) -> str:
        return f"{self.id} ({self.affected}): {self.summary}"


def holes(snapshot: Mapping[str, Any]) -> list[Hole]:
    return [Hole(**entry) for entry in snapshot["advisories"]]


# ---------------------------------------------------------------- what is installed


@dataclass(frozen=True)
class Package:
    """An installed package and what it needs, by canonical name."""

    name: str
    version: str
    licence: str
    needs: tuple[str, ...]


def installed(root: str = "everseg") -> dict[str, Package]:
    """The tree below an installed package, with those of its extras that are installed."""
    found: dict[str, Package] = {}
    waiting = [(canonicalize_name(root), frozenset[str]())]
    seen = set()
    while waiting:
        name, extras = waiting.pop()
        if (name, extras) in seen:
            continue
        seen.add((name, extras))
        try:
            about = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue  # of an extra that is not installed
        asked = extras or frozenset(about.metadata.get_all("Provides-Extra") or () if name == root else ())
        needed = dict(_needs(about, asked))
        waiting += needed.items()
        earlier = found[name].needs if name in found else ()
        found[name] = Package(
            name, about.version, _licence(about.metadata), tuple(sorted({*earlier, *needed} - {name}))
        )
    return {
        name: Package(one.name, one.version, one.licence, tuple(need for need in one.needs if need in found))
        for name, one in sorted(found.items())
    }


def _needs(about: metadata.Distribution, extras: frozenset[str]) -> Iterator[tuple[str, frozenset[str]]]:
    for text in about.requires or ():
        one = Requirement(text)
        if one.marker is None or any(one.marker.evaluate({"extra": extra}) for extra in ("", *extras)):
            yield canonicalize_name(one.name), frozenset(one.extras)


def _licence(about: Any) -> str:
    """What the package says of its licence, in a line; "" if nothing."""
    if found := about.get("License-Expression"):
        return found
    classified = [
        line.rpartition(" :: ")[2]
        for line in about.get_all("Classifier") or ()
        if line.startswith("License ::")
    ]
    return "; ".join(classified) or (about.get("License") or "").strip().split("\n")[0][:80]


def tree(packages: Mapping[str, Package], known: list[Hole], root: str = "everseg") -> Iterator[str]:
    """Lines of the tree; what was shown before is shown without what it needs. Holes stand beside their package."""
    shown: set[str] = set()

    def lines(name: str, depth: int) -> Iterator[str]:
        one = packages[name]
        again = name in shown and bool(one.needs)
        bad = [hole for hole in known if canonicalize_name(hole.package) == name and hole.has(one.version)]
        notes = "".join(f"  {'known' if hole.accepted else 'HOLE'} {hole.id}" for hole in bad)
        yield f"{'  ' * depth}{name} {one.version}{' ...' if again else ''}{notes}"
        if not again:
            shown.add(name)
            for need in one.needs:
                yield from lines(need, depth + 1)

    yield from lines(root, 0)


# ---------------------------------------------------------------- what the bounds let in


def requirements(project: Mapping[str, Any]) -> list[Requirement]:
    """Every direct requirement: of the package, its extras, and its build. Of a package named twice all bounds hold."""
    extras = project["project"]["optional-dependencies"].values()
    texts = [
        *project["build-system"]["requires"],
        *project["project"]["dependencies"],
        *(t for of in extras for t in of),
    ]
    found: dict[str, Requirement] = {}
    for one in map(Requirement, texts):
        first = found.setdefault(canonicalize_name(one.name), one)
        first.specifier &= one.specifier
    return [one for name, one in found.items() if name != "everseg"]


def let_in(needed: list[Requirement], known: list[Hole]) -> Iterator[tuple[Requirement, Hole, str]]:
    """Requirement, hole, and a release with it that the requirement's bounds allow."""
    for one in needed:
        for hole in known:
            if canonicalize_name(hole.package) != canonicalize_name(one.name):
                continue
            bounds = [bound.version for bound in one.specifier if bound.operator in (">=", "==", "~=")]
            ends = re.findall(r"[<>=!~]=?\s*([\w.]+)", hole.affected)
            for version in [*(bounds or ["0"]), *ends]:
                if hole.has(version) and one.specifier.contains(version, prereleases=True):
                    yield one, hole, version
                    break


# ---------------------------------------------------------------- the bill of materials


def bill(packages: Mapping[str, Package], root: str = "everseg") -> dict[str, Any]:
    """The tree as CycloneDX 1.6. Equal installations give equal bytes, but for SOURCE_DATE_EPOCH where it is set."""
    parts = [_component(one, "application" if name == root else "library") for name, one in packages.items()]
    references = {name: part["bom-ref"] for name, part in zip(packages, parts, strict=True)}
    depends = [
        {"ref": references[name], "dependsOn": [references[need] for need in one.needs]}
        for name, one in packages.items()
    ]
    about: dict[str, Any] = {"component": next(part for part in parts if part["name"] == root)}
    if epoch := os.environ.get("SOURCE_DATE_EPOCH"):
        moment = datetime.datetime.fromtimestamp(int(epoch), datetime.UTC)
        about["timestamp"] = moment.strftime("%Y-%m-%dT%H:%M:%SZ")
    content = json.dumps([parts, depends], sort_keys=True)
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "serialNumber": f"urn:uuid:{uuid.uuid5(uuid.NAMESPACE_URL, content)}",
        "version": 1,
        "metadata": about,
        "components": [part for part in parts if part["name"] != root],
        "dependencies": depends,
    }


def _component(one: Package, kind: str) -> dict[str, Any]:
    address = f"pkg:pypi/{one.name}@{one.version.replace('+', '%2B')}"
    licences = {"licenses": [{"license": {"name": one.licence}}]} if one.licence else {}
    return {
        "type": kind,
        "bom-ref": address,
        "name": one.name,
        "version": one.version,
        "purl": address,
        **licences,
    }


# ---------------------------------------------------------------- the command


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--sbom", type=Path, metavar="FILE", help="write the bill of materials there, and nothing else"
    )
    parser.add_argument("--advisories", type=Path, default=SNAPSHOT, metavar="FILE", help="another snapshot")
    given = parser.parse_args(arguments)
    packages = installed()
    if not packages:
        sys.exit("everseg is not installed here: pip install -e .")
    if given.sbom:
        given.sbom.parent.mkdir(parents=True, exist_ok=True)
        given.sbom.write_text(json.dumps(bill(packages), indent=1) + "\n", encoding="utf-8")
        print(f"wrote {given.sbom}: {len(packages)} packages")
        return 0
    snapshot = json.loads(given.advisories.read_text(encoding="utf-8"))
    known = holes(snapshot)
    print("\n".join(tree(packages, known)))
    found = [
        f"installed {one.name} {one.version}: {hole}"
        for one in packages.values()
        for hole in known
        if canonicalize_name(hole.package) == one.name and hole.has(one.version) and not hole.accepted
    ]
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    found += [
        f"{one} lets in {version}: {hole}"
        for one, hole, version in let_in(requirements(project), known)
        if not hole.accepted
    ]
    accepted = [hole for hole in known if hole.accepted]
    print(
        f"\n{len(packages)} packages, {len(known)} advisories as known on {snapshot['date']} ({snapshot['source']})"
    )
    for hole in accepted:
        print(f"accepted: {hole.package} {hole}; {hole.accepted}")
    age = (datetime.date.today() - datetime.date.fromisoformat(snapshot["date"])).days
    if age > OLD:
        print(
            f"the snapshot is {age} days old: look the packages up again and renew {SNAPSHOT.name}",
            file=sys.stderr,
        )
    for line in found:
        print(f"HOLE {line}", file=sys.stderr)
    print("no known hole" if not found else f"{len(found)} holes")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
