"""The import picture of the package: rooms, arrows, circles, lines, functions, comments.

`python scripts/house.py` shows the working tree, `python scripts/house.py REVISION` a commit of it.
"""

from __future__ import annotations

import ast
import io
import subprocess
import sys
import tarfile
import tokenize
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCE = "src/everseg"


def sources(revision: str | None) -> dict[str, str]:
    """Path below src/everseg -> text."""
    if revision is None:
        folder = ROOT / SOURCE
        return {str(path.relative_to(folder)): path.read_text() for path in sorted(folder.rglob("*.py"))}
    packed = subprocess.run(
        ["git", "archive", "--format=tar", revision, SOURCE], cwd=ROOT, check=True, capture_output=True
    ).stdout
    found = {}
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        for member in archive.getmembers():
            if member.name.endswith(".py") and (file := archive.extractfile(member)):
                found[member.name.removeprefix(SOURCE + "/")] = file.read().decode()
    return found


def module_of(path: str) -> str:
    parts = ["everseg", *path.removesuffix(".py").split("/")]
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module: str) -> str:
    return [*module.split("."), "everseg"][1]


def arrows_of(modules: dict[str, str]) -> set[tuple[str, str]]:
    """Pairs (importer, imported), imports inside functions and for types included."""
    found = set()
    for module, text in modules.items():
        for node in ast.walk(ast.parse(text)):
            names: list[str] = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                whole = [f"{node.module}.{alias.name}" for alias in node.names]
                names = [name if name in modules else node.module for name in whole]
            found |= {(module, name) for name in names if name in modules and name != module}
    return found


def circles(arrows: set[tuple[str, str]]) -> list[list[str]]:
    """Sets of modules that reach one another (Tarjan's strongly connected components of two and more)."""
    after: dict[str, list[str]] = {}
    for one, other in sorted(arrows):
        after.setdefault(one, []).append(other)
    number: dict[str, int] = {}
    lowest: dict[str, int] = {}
    waiting: list[str] = []
    found = []

    def visit(module: str) -> None:
        number[module] = lowest[module] = len(number)
        waiting.append(module)
        for other in after.get(module, []):
            if other not in number:
                visit(other)
                lowest[module] = min(lowest[module], lowest[other])
            elif other in waiting:
                lowest[module] = min(lowest[module], number[other])
        if lowest[module] == number[module]:
            at = waiting.index(module)
            if len(waiting) - at > 1:
                found.append(sorted(waiting[at:]))
            del waiting[at:]

    for module in sorted(after):
        if module not in number:
            visit(module)
    return found


def comment_lines(text: str) -> int:
    """Lines with a comment, on their own or behind code; directives for tools do not count."""
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    tools = ("# noqa", "# type:", "# fmt:", "# pragma")
    return len({t.start[0] for t in tokens if t.type == tokenize.COMMENT and not t.string.startswith(tools)})


def code_lines(text: str) -> int:
    """Lines that are neither blank, nor a comment, nor part of a docstring."""
    skipped = set()
    for node in ast.walk(ast.parse(text)):
        if (
            isinstance(node, ast.Expr)
            and isinstance(node.value, ast.Constant)
            and isinstance(node.value.value, str)
        ):
            skipped |= set(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    lines = enumerate(text.splitlines(), 1)
    return sum(
        bool(line.strip()) and not line.strip().startswith("#") and n not in skipped for n, line in lines
    )


def main(revision: str | None = None) -> None:
    """Print the rooms, then the sums."""
    files = sources(revision)
    modules = {module_of(path): text for path, text in files.items()}
    arrows = arrows_of(modules)
    rooms: dict[str, Counter[str]] = {}
    for module, text in modules.items():
        room = rooms.setdefault(room_of(module), Counter())
        functions = [
            n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)
        ]
        room.update(
            modules=1,
            lines=len(text.splitlines()),
            code=code_lines(text),
            comments=comment_lines(text),
            functions=len(functions),
            private=sum(f.name.startswith("_") and not f.name.endswith("__") for f in functions),
        )
    print("| room | modules | lines | functions | private, % | comments, % of code |")
    print("|---|---|---|---|---|---|")
    total: Counter[str] = Counter()
    for name, room in [*sorted(rooms.items()), ("all", total)]:
        total.update(room if name != "all" else {})
        private = round(100 * room["private"] / max(1, room["functions"]))
        comments = 100 * room["comments"] / max(1, room["code"])
        print(
            f"| {name} | {room['modules']} | {room['lines']} | {room['functions']} | {private} | {comments:.1f} |"
        )
    between = {(room_of(a), room_of(b)) for a, b in arrows if room_of(a) != room_of(b)}
    found = circles(arrows)
    print(f"\narrows between modules: {len(arrows)}; between rooms: {len(between)}")
    print(f"circles of rooms: {[' '.join(c) for c in circles(between)] or 'none'}")
    print(f"circles of modules: {[' '.join(c) for c in found] or 'none'}")


if __name__ == "__main__":
    main(*sys.argv[1:2])
