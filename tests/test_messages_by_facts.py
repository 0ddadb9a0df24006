"""Tests ask messages for their facts, not for their sentences.

A sentence in a test makes every better wording a red test, and says less about what matters: the key, the file, the
number, the names of the classes, the command to run. One or two telling words beside them tell this error from others.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from saying import must_say

TESTS = Path(__file__).parent
FILES = sorted(TESTS.rglob("*.py"))

WORDS = 4
"""Ordinary words in a row that a test may expect of a message: enough for "is not a folder", too few for a sentence."""

MESSAGES = re.compile(r"\b(out|err|stderr|error|message|caught|problems?|notes?|refusal)\b")
"""What a test calls a text for people: as in `"..." in err`, `err == "..."`, `err.startswith("...")`."""

FACTS = re.compile(
    r"'[^']*'|\"[^\"]*\"|`[^`]*`"  # what is quoted: a name, a value
    r"|\beverseg [a-z -]*"  # a command to run
    r"|\\[a-zA-Z]|\.[*+]\??|\[[^]]*\]|[|,;:(){}]"  # patterns; the punctuation between two facts
)
WORD = re.compile(r"[A-Za-z]+(?:['-][a-z]+)?[.!?^$]*")


def longest(text: str) -> str:
    """The longest row of ordinary words in a literal; digits, dots, underscores and quotes make a word a fact."""
    rows, row = [""], []
    for word in [*FACTS.sub(" 0 ", text).replace("\\", "").split(), "0"]:
        if WORD.fullmatch(word):
            row.append(word)
        else:
            rows.append(" ".join(row))
            row = []
    return max(rows, key=lambda words: len(words.split()))


def literals(node: ast.AST) -> Iterator[tuple[int, str]]:
    """Lines and texts of the literals in an expression; a value within an f-string is a fact: 0 stands for it."""
    if isinstance(node, ast.Constant):
        if isinstance(node.value, str):
            yield node.lineno, node.value
    elif isinstance(node, ast.JoinedStr):
        yield (
            node.lineno,
            "".join(str(v.value) if isinstance(v, ast.Constant) else " 0 " for v in node.values),
        )
    else:
        for part in ast.iter_child_nodes(node):
            yield from literals(part)


def bind(target: ast.AST, value: ast.AST, bound: dict[str, list[ast.AST]]) -> None:
    """Note which expressions a name stands for; in a tuple of names each has its column."""
    if isinstance(target, ast.Name):
        bound.setdefault(target.id, []).append(value)
    elif isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
        for name, part in zip(target.elts, value.elts, strict=False):
            bind(name, part, bound)


def rows(table: ast.AST) -> list[ast.AST]:
    """What a loop over a written list goes through; [] = it is not written there."""
    if isinstance(table, ast.Call) and isinstance(table.func, ast.Attribute) and table.func.attr == "items":
        return rows(table.func.value)
    if isinstance(table, ast.Dict):
        return [ast.Tuple([k, v]) for k, v in zip(table.keys, table.values, strict=True) if k is not None]
    found = table.elts if isinstance(table, ast.List | ast.Tuple | ast.Set) else []
    return [
        (ast.Tuple(one.args) if len(one.args) > 1 else one.args[0])
        if isinstance(one, ast.Call) and ast.unparse(one.func) == "pytest.param"
        else one
        for one in found
    ]


def names_of(function: ast.FunctionDef) -> dict[str, list[ast.AST]]:
    """Names in a test -> what they stand for: its parameters, its loops, what it assigns."""
    bound: dict[str, list[ast.AST]] = {}
    for node in ast.walk(function):
        if isinstance(node, ast.Assign) and not isinstance(node.value, ast.Call):
            for target in node.targets:
                bind(target, node.value, bound)
    for node in ast.walk(function):
        if isinstance(node, ast.For | ast.comprehension):
            tables = bound.get(node.iter.id, []) if isinstance(node.iter, ast.Name) else [node.iter]
            if isinstance(node.iter, ast.Call) and isinstance(node.iter.func, ast.Attribute):
                owner = node.iter.func.value
                tables = bound.get(owner.id, []) if isinstance(owner, ast.Name) else [node.iter]
            for table in list(tables):
                for row in rows(table):
                    bind(node.target, row, bound)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "pytest.mark.parametrize":
            names = [one.strip() for _, text in literals(node.args[0]) for one in text.split(",")]
            target = ast.Tuple([ast.Name(name) for name in names]) if len(names) > 1 else ast.Name(names[0])
            for row in rows(node.args[1]):
                bind(target, row, bound)
    return bound


def expected(tree: ast.AST) -> Iterator[ast.AST]:
    """Expressions that a message must match, hold or say."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield from (keyword.value for keyword in node.keywords if keyword.arg == "match")
            if ast.unparse(node.func) == "must_say":
                yield from node.args[1:]
            elif (
                isinstance(node.func, ast.Attribute)
                and node.func.attr in ("startswith", "endswith")
                and MESSAGES.search(ast.unparse(node.func.value))
            ):
                yield from node.args
        elif isinstance(node, ast.Compare):
            left, right = node.left, node.comparators[0]
            if isinstance(node.ops[0], ast.In | ast.NotIn) and MESSAGES.search(ast.unparse(right)):
                yield left
            elif isinstance(node.ops[0], ast.Eq) and MESSAGES.search(ast.unparse(left)):
                yield right


def sentences(source: str) -> list[str]:
    """Lines of a file of tests that expect more than WORDS ordinary words in a row, with these words."""
    found = set()
    tree = ast.parse(source)
    for function in (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)):
        bound = names_of(function)
        for node in expected(function):
            names = {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}
            for place in [node, *(value for name in names for value in bound.get(name, []))]:
                found |= {(line, longest(text)) for line, text in literals(place)}
    return [f"line {line}: {words!r}" for line, words in sorted(found) if len(words.split()) > WORDS]


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(TESTS)))
def test_messages_are_matched_by_their_facts(path: Path) -> None:
    assert sentences(path.read_text(encoding="utf-8")) == [], (
        f"more than {WORDS} ordinary words in a row: match the key, the file, the number or a telling word; several "
        "facts are asked for by must_say(error, fact, fact) of tests/saying.py"
    )


LONG = "the run is already finished"
RAISES = "def test():\n    with pytest.raises(ConfigError, match={}):\n        x()"


@pytest.mark.parametrize(
    ("source", "bad"),
    [
        (RAISES.format(repr(LONG)), True),
        (RAISES.format(repr(r"train\.lr: expected a number above 0")), False),
        (RAISES.format(repr(r"x\.yaml.*is not a folder.*everseg data prepare idd DIR")), False),
        (RAISES.format("rf'{name}: " + LONG + "'"), True),
        (RAISES.format(f"re.escape('{LONG}')"), True),
        (RAISES.format("'road, sky, tree, car, bus'"), False),
        (RAISES.format("\"'road and sky and tree and car' is no class\""), False),
        (f"def test():\n    assert '{LONG}' in err", True),
        (f"def test():\n    assert '{LONG}' in str(caught.value)", True),
        (f"def test():\n    assert err == '{LONG}'", True),
        (f"def test():\n    assert problems[0].startswith('{LONG}')", True),
        (f"def test():\n    assert '{LONG}' in page", False),
        (f"def test():\n    must_say(err, 'x.yaml', '{LONG}')", True),
        (f"def test():\n    for name, said in (('a', 'b'), ('{LONG}', 'b')):\n        assert said in err", False),
        (f"def test():\n    for name, said in (('a', 'b'), ('b', '{LONG}')):\n        assert said in err", True),
        (f"def test():\n    all(said in err for said in ('{LONG}', 'b'))", True),
        (f"def test():\n    a = {{'x': '{LONG}'}}\n    for k, v in a.items():\n        must_say(err, v)", True),
        (f"@pytest.mark.parametrize('said', ['{LONG}'])\n" + RAISES.format("said"), True),
        (f"@pytest.mark.parametrize(('x', 'said'), [('{LONG}', 'y')])\n" + RAISES.format("said"), False),
        (f"@pytest.mark.parametrize('x, said', [pytest.param('y', '{LONG}', id='z')])\n" + RAISES.format("said"), True),
    ],
)  # fmt: skip
def test_a_sentence_is_seen_wherever_it_comes_from(source: str, bad: bool) -> None:
    assert bool(sentences(source)) is bad


def test_one_line_must_say_all_facts_as_whole_words() -> None:
    text = "error: train.lr: expected > 0, got -0.1\nerror: train.batch: 20 images"
    must_say(text, "-0.1", "train.lr")
    must_say(ValueError(text), "train.batch", 20)
    must_say(text.splitlines(), "20 images")
    for facts in (("train.lr", "20"), ("train.batch", "2"), ("rain.lr",), ("train.lr", "0.2")):
        with pytest.raises(AssertionError, match=re.escape(facts[-1])):
            must_say(text, *facts)
    with pytest.raises(AssertionError, match="no fact"):
        must_say(text)
