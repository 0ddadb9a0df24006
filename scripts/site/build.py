"""Build the documentation site: the pages as they stand, and the reference written from the code.

Usage: python scripts/site/build.py [--out FOLDER] [--serve]

The site is FOLDER/html (default build/site/html); it asks the network for nothing and can be read as files.
Needs the extra `docs`.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path

import reference

import everseg

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
MARK = ".everseg-site"
"""The file that tells a folder of ours."""


def clear(folder: Path) -> None:
    """Make room for the site: an empty folder, or one that an earlier call has made, which goes.

    Raises:
        SystemExit: it holds anything else, and stays as it is.
    """
    if folder.is_dir() and any(folder.iterdir()):
        if not (folder / MARK).is_file():
            raise SystemExit(
                f"{folder} holds files that this script did not make; give --out a new or an empty folder, or delete it"
            )
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / MARK).write_text(
        "Made by scripts/site/build.py, which deletes this folder before it builds again.\n"
    )


def gather(folder: Path) -> None:
    """Copy what the site is made of, laid out as in the repository, so that the pages' links hold."""
    clear(folder)
    pages = folder / "pages"
    shutil.copytree(ROOT / "docs", pages / "docs")
    for page in ROOT.glob("*.md"):
        shutil.copy(page, pages)
    reference.write(pages / "reference")
    for name in ("iframe-worker.js", "sidebar.js", "extra.css"):
        shutil.copy(HERE / name, pages)
    settings = (ROOT / "zensical.toml").read_text(encoding="utf-8")
    (folder / "zensical.toml").write_text(settings.replace("VERSION", everseg.__version__), encoding="utf-8")
    for name in ("src", "scripts"):
        (folder / name).symlink_to(ROOT / name)


def build(folder: Path, verb: str = "build") -> subprocess.CompletedProcess[str]:
    """Gather the pages and build; a broken link or any other warning makes the exit code 1."""
    gather(folder)
    command = [sys.executable, "-m", "zensical", verb, *(["--strict"] if verb == "build" else [])]
    done = subprocess.run(command, cwd=folder, check=False, text=True, capture_output=verb == "build")
    if verb == "build" and not done.returncode:
        order_search(folder / "html")
    return done


def order_search(site: Path) -> None:
    """Let the search lead to explanations first.

    Attributes of results are entries of their own in the index, named "forgetting" or "new", and would come before
    every page that explains the word. Their text goes to the entry of their class. The reference comes after the pages.
    """
    index = json.loads((site / "search.json").read_text(encoding="utf-8"))
    entries: dict[str, dict[str, str]] = {}
    for item in index["items"]:
        owner = entries.get(item["location"].rpartition(".")[0])
        if owner is not None and ("attribute<" in item["title"] or "property<" in item["title"]):
            owner["text"] += f" {item['text']}"
        else:
            entries[item["location"]] = item
    index["items"] = sorted(entries.values(), key=lambda item: item["location"].startswith("reference/"))
    text = json.dumps(index, ensure_ascii=False)
    (site / "search.json").write_text(text, encoding="utf-8")
    # What a page that is read as a file takes instead.
    (site / "search.js").write_text(f"var __index = {text};", encoding="utf-8")


def main() -> None:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=ROOT / "build" / "site", metavar="FOLDER")
    parser.add_argument(
        "--serve", action="store_true", help="show it at a local address, rebuilt when a page changes"
    )
    given = parser.parse_args()
    done = build(given.out, "serve" if given.serve else "build")
    if done.returncode:
        raise SystemExit(
            f"{done.stdout or ''}{done.stderr or ''}\nthe site was not built (needs: pip install 'everseg[docs]')"
        )
    sys.stdout.write(f"open {given.out / 'html' / 'index.html'}\n")


if __name__ == "__main__":
    main()
