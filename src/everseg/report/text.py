"""Text made safe for the terminal (floor 6)."""

from __future__ import annotations


def printable(text: object) -> str:
    """Show control characters (of file and class names) as escapes instead of sending them to the terminal."""
    return "".join(
        c if c.isprintable() or c == "\n" else c.encode("unicode_escape", "replace").decode()
        for c in str(text)
    )
