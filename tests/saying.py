"""What a message has to say, in facts: the key, the file, the number, one telling word; never the whole sentence."""

from __future__ import annotations

import re
from collections.abc import Iterable


def _whole(fact: str) -> str:
    """Pattern of a fact: 2 is not in 20, car is not in cars."""
    return (
        (r"(?<!\w)" if fact[:1].isalnum() else "")
        + re.escape(fact)
        + (r"(?!\w)" if fact[-1:].isalnum() else "")
    )


def must_say(text: str | BaseException | Iterable[str], *facts: object) -> None:
    """Some line of the text says all facts, in any order and as whole words.

    One line, because an error tells each of its problems in a line of its own: one fact of this problem and another of
    that one are no match.
    """
    lines = (str(text) if isinstance(text, str | BaseException) else "\n".join(text)).splitlines()
    wanted = [str(fact) for fact in facts]
    assert wanted, "no fact is no test"
    absent = [[fact for fact in wanted if not re.search(_whole(fact), line)] for line in lines]
    least = min(absent, key=len, default=wanted)
    assert least == [], f"no line says {least} beside the other facts:\n" + "\n".join(lines)
