"""The findings of a data set check, and how they are shown."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from everseg.data.class_colours import colour_word
from everseg.data.datasets.options import read_skiplist, skiplist_line
from everseg.data.writing import write_atomically
from everseg.display import Piece, Result, counted, escaped, printable, share, table
from everseg.errors import ConfigError
from everseg.files import MOST_LIST, UnreadableError, json_of, read_regular

Level = Literal["error", "warning", "note"]
_WRITTEN = 3
"""Findings that say the same of different samples are written out up to twice so many, else so many."""
LEVELS: tuple[Level, ...] = ("error", "warning", "note")

REMEDIES: dict[str, str] = {
    "layout": "Correct the folders or lists named, then check again: the files were not looked at yet.",
    "empty-split": "Check the list or folder of this split.",
    "unreadable-image": "Fetch or export these files again, or leave them out of the lists.",
    "unreadable-mask": "Fetch or export these files again, or leave them out of the lists.",
    "size-mismatch": "Export the mask again at the size of its image.",
    "colour-mask": "Name the colours of the classes (palette) in the data set's description, or export id masks.",
    "lossy-mask": "Export the masks again as PNG; the ids cannot be brought back from a lossy file.",
    "bad-mask": "Export masks that hold one id of 0-255 per pixel, or describe their colours or ids.",
    "unreadable-sample": "Correct these samples, or leave them out.",
    "same-image": "Remove the image from one of the splits: scores on images seen in training mean nothing.",
    "same-split": "Nothing to do if this is meant; scores of the two are the same.",
    "tiny-image": "Look whether these files are damaged.",
    "all-void": "Nothing can be learnt or scored here; annotate these images or leave them out.",
    "class-missing": "Remove the class from the description, or check the ids of the masks.",
    "class-untrained": "The class cannot be learnt: move images into training, or remove the class.",
    "class-left-out": "Nothing to do if this is meant; no pixel is lost.",
    "map": "Make the missing maps (saliency: everseg data saliency), or leave data.extra out.",
    "file-left-out": "Nothing to do if this is meant; else name the files that count.",
    "object": "Look at these objects in the labelling tool; all others of their images are drawn.",
    "class-rare": "Scores of so rare a class are unstable; add images if you can.",
    "list": "Clean the list when convenient.",
    "unpaired": "Add the missing files, or leave the others out: on_missing: skip, or a skip list.",
    "binary-mask": "If the objects are stored as this value, declare it as a class and set ignore: null in the "
    "data.yaml (classes: {0: background, 255: object}).",
    "palettes-differ": "Labels would be scrambled: everseg data init describes such masks by their colours; or "
    "export them again with one palette.",
    "one-value": "There is nothing to learn: look whether the export lost the objects.",
    "void-share": "If these pixels are objects, describe them (everseg data init asks); if they are without "
    "annotation, write void_share: SHARE into the data.yaml, the largest share of the pixels that may be.",
    "no-data": "If these pixels are without annotation, write ignore: ID into the data.yaml and take the class away; "
    "if they are the class, write no_data: class.",
    "no-data-image": "Where an image shows nothing, a network learns from black or filled pixels; mark them as ignored "
    "in the masks if their labels were not meant.",
    "near-same-image": "Look at both: scores on images seen in training mean nothing.",
    "twin-image": "Nothing to do if this is meant; these images count twice.",
    "other-format": "Rename these files when convenient; they are read by their content.",
    "trailing-bytes": "Look whether these files were joined with something else; the picture itself is whole.",
    "print-colours": "The colours come out other than they look; convert these images to RGB.",
    "alpha": "Transparency is dropped.",
    "palette-colours": "Indexed masks; their labels go by the colours of their palettes, not by index.",
    "turned": "Turned as their EXIF orientation says, as viewers show them; their masks fit.",
    "turned-square": "Look at the overlay; exif: ignore leaves all images as they are stored.",
    "turned-same-size": "Mirrored or upside down, image and mask have one size either way. Look at the overlay; exif: "
    "ignore leaves all images as they are stored.",
    "large-image": "Cut into windows as they are read: tiles: {size: 512, overlap: 64} in the data.yaml.",
    "interpolated-mask": "Masks that were resized with interpolation hold such ids; resize with nearest neighbour.",
    "few-images": "Add images; so few cannot show what a class looks like.",
    "one-image": "Add images: batch norm cannot be trained on one.",
    "changed-file": "If nobody changed these files on purpose, restore them; else write the lock file again.",
    "sampled": "Check all samples before a long run.",
}


@dataclass(frozen=True)
class Finding:
    """One fault, or one remark."""

    level: Level
    code: str
    """Kind of the finding, a key of `REMEDIES`."""
    split: str
    """Split name; "" if it concerns the data set."""
    sample: str
    """Sample id; "" if it concerns the split or the data set."""
    message: str
    remedy: str


@dataclass(frozen=True)
class ClassRow:
    """How often a class occurs."""

    id: int
    name: str
    images: Mapping[str, int]
    """Split name -> images with at least one pixel of the class."""
    pixels: Mapping[str, int]
    """Split name -> pixels."""
    colours: tuple[tuple[int, int, int], ...] = ()
    """The class's colours in the masks; () where they are grey."""


def _places(group: Sequence[Finding]) -> Iterator[str]:
    """Give a line for each finding of one kind.

    Of many that say the same of different samples, some are written out, and the samples of the others are named.
    """
    alike: dict[str, list[Finding]] = {}
    for one in group:
        alike.setdefault(one.message.replace(one.sample, "") if one.sample else one.message, []).append(one)
    for same in alike.values():
        few = same if len(same) <= 2 * _WRITTEN else same[:_WRITTEN]
        for one in few:
            yield f"  {_place(one)}{_indented(one.message)}"
        if others := same[len(few) :]:
            names = ", ".join(_place(one).removesuffix(": ") for one in others)
            yield f"  the same of {counted(len(others), 'more sample')}: {names}"


@dataclass(frozen=True, repr=False)
class Report(Result):
    """The result of a data set check."""

    dataset: str
    findings: tuple[Finding, ...]
    images: Mapping[str, int] = field(default_factory=dict)
    """Split name -> samples looked at."""
    classes: tuple[ClassRow, ...] = ()
    digests: Mapping[tuple[str, str], tuple[str, str]] = field(default_factory=dict)
    """(split, sample) -> SHA-256 of image and mask, of the samples that can be read."""
    notes: tuple[str, ...] = ()
    """Which files were written."""
    void: Mapping[str, int] = field(default_factory=dict)
    """Split name -> pixels without annotation."""

    @property
    def ok(self) -> bool:
        """True if there is no error; warnings and notes may remain."""
        return not any(finding.level == "error" for finding in self.findings)

    def summary(self) -> str:
        """List all findings by kind, errors first, then the class table and the verdict; many lines."""
        lines = [f"{self.dataset}: " + ", ".join(f"{count} {name}" for name, count in self.images.items())]
        for level in LEVELS:
            groups: dict[tuple[str, str], list[Finding]] = {}
            for finding in self.findings:
                if finding.level == level:
                    groups.setdefault((finding.code, finding.remedy), []).append(finding)
            for (code, what_to_do), group in groups.items():
                lines += ["", f"{level.upper()} {code} ({len(group)}): {what_to_do}"]
                lines += _places(group)
        lines += ["", *self._table()] if self.classes else [""]
        return printable("\n".join([*lines, self.verdict]))

    @property
    def verdict(self) -> str:
        """State how many findings there are, and whether training can begin."""
        count = {level: sum(finding.level == level for finding in self.findings) for level in LEVELS}
        verdict = "ready to train" if self.ok else "correct the errors before training"
        return (
            ", ".join(counted(count[level], level) for level in ("error", "warning", "note"))
            + f": {verdict}."
        )

    def shown(self) -> Iterable[Piece]:
        yield self.summary()

    def _repr_html_(self) -> str:
        """Show findings and classes as HTML tables, because the terminal text relies on a fixed-width font."""
        place = [_place(one).removesuffix(": ") for one in self.findings]
        found = table(
            ["", "kind", "where", "what", "what to do"],
            [
                (f.level, f.code, where, f.message, f.remedy)
                for f, where in zip(self.findings, place, strict=True)
            ],
        )
        total = {name: self._pixels(name) for name in self.images}
        columns = [f"{name} {what}" for name in self.images for what in ("images", "pixels", "share")]
        rows: list[tuple[Any, ...]] = []
        for row in self.classes:
            cells = [(row.images[n], row.pixels[n], _share(row.pixels[n], total[n])) for n in self.images]
            own = " / ".join(map(_colour, row.colours[:3]))
            rows.append((row.id, row.name, own, *(cell for part in cells for cell in part)))
        if any(self.void.values()):
            parts = [("", self.void.get(n, 0), _share(self.void.get(n, 0), total[n])) for n in self.images]
            rows.append(("", "without annotation", "", *(cell for part in parts for cell in part)))
        occur = table(["id", "class", "in the masks", *columns], rows, right="|".join(["id", *columns]))
        lines = [*(f"note: {text}" for text in self.notes), f"{self.dataset}: {self.verdict}"]
        tables = [one._repr_html_() for one in (found, occur) if one.rows]
        said = [f"<p>{escaped(line)}</p>" for line in self.sentences()]
        return "\n".join([*(f"<p>{escaped(line)}</p>" for line in lines), *tables, *said])

    def to_json(self) -> dict[str, Any]:
        """The report as plain dictionaries, lists, strings and numbers, ready for `json.dumps`."""
        return {
            "dataset": self.dataset,
            "ok": self.ok,
            "images": dict(self.images),
            "findings": [asdict(finding) for finding in self.findings],
            "classes": [
                {
                    "id": row.id,
                    "name": row.name,
                    "colours": [list(colour) for colour in row.colours],
                    "images": dict(row.images),
                    "pixels": dict(row.pixels),
                }
                for row in self.classes
            ],
            "void": dict(self.void),
        }

    def _table(self) -> list[str]:
        shown = {row.id: " / ".join(map(_colour, row.colours[:3])) for row in self.classes}
        width = max(18, *(len(row.name) for row in self.classes))
        wide = max(map(len, shown.values()))
        splits, total = list(self.images), {name: self._pixels(name) for name in self.images}
        lines = [
            "images and pixels per class",
            f"  {'id':>3} {'class':<{width}} {'in the masks' if wide else '':<{wide and max(wide, 12)}}"
            + "".join(f"{s:>32}" for s in splits),
        ]
        for row in self.classes:
            cells = "".join(
                f"{row.images[s]:>8} {row.pixels[s]:>15} {_share(row.pixels[s], total[s]):>7}" for s in splits
            )
            lines.append(
                f"  {row.id:>3} {row.name:<{width}} {shown[row.id]:<{wide and max(wide, 12)}}{cells}"
            )
        if any(self.void.values()):
            cells = "".join(f"{'':>8} {self.void[s]:>15} {_share(self.void[s], total[s]):>7}" for s in splits)
            lines.append(f"  {'':>3} {'without annotation':<{width}} {'':<{wide and max(wide, 12)}}{cells}")
        return [*lines, "", *self.sentences(), ""]

    def sentences(self) -> list[str]:
        """Say of every split what a person can see to be wrong: which class covers how much, and by which colour."""
        lines = []
        for name in self.images:
            total = self._pixels(name)
            rows = sorted((r for r in self.classes if r.pixels[name]), key=lambda r: -r.pixels[name])
            parts: list[str] = []
            for row in rows[:3]:
                how = _colour(row.colours[0]) if row.colours else f"id {row.id}"
                part = _share(row.pixels[name], total)
                parts.append(
                    f"{row.name} {part} ({how})"
                    if parts
                    else f"{row.name} covers {part} of the pixels ({how})"
                )
            if parts:
                void = self.void.get(name, 0)
                rest = f"; {_share(void, total)} are without annotation" if void else ""
                lines.append(f"In {name}, {', '.join(parts)}{rest}. Is that what the pictures show?")
        return lines

    def _pixels(self, split: str) -> int:
        return sum(row.pixels[split] for row in self.classes) + self.void.get(split, 0)


def _colour(colour: tuple[int, int, int]) -> str:
    return f"{colour_word(colour)} {','.join(map(str, colour))}"


def _share(pixels: int, total: int) -> str:
    return share(pixels / total if total else None)


def finding(level: Level, code: str, split: str, sample: str, message: str) -> Finding:
    """Make a finding with the remedy for its kind."""
    return Finding(level, code, split, sample, message, REMEDIES[code])


def _place(finding: Finding) -> str:
    place = "/".join(part for part in (finding.split, finding.sample) if part)
    return f"{place}: " if place else ""


def _indented(message: str) -> str:
    return message.replace("\n", "\n    ")


Digests = dict[tuple[str, str], tuple[str, str]]


def write_skiplist(path: Path, report: Report) -> int:
    """Write every sample with an error, one per line. The lines of an existing skip list are kept.

    Returns:
        Number of samples in the file.

    Raises:
        ConfigError: a file exists there that is not a skip list.
        OSError: the disk is full, or the file cannot be written.
    """
    kept = sorted(read_skiplist(path)) if path.exists() else []
    bad = [(f.split, f.sample) for f in report.findings if f.level == "error" and f.sample]
    places = list(dict.fromkeys([*kept, *bad]))
    text = "".join(f"{skiplist_line(*place)}\n" for place in places)
    write_atomically(path, text.encode("utf-8", "surrogateescape"))
    return len(places)


def write_lock(path: Path, report: Report) -> None:
    """Write the SHA-256 of image and mask of every sample that can be read.

    Raises:
        OSError: the disk is full, or the file cannot be written.
    """
    rows = [[split, sample, *digests] for (split, sample), digests in report.digests.items()]
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows).encode())


def read_lock(path: Path) -> Digests:
    """Read what `write_lock` wrote.

    Raises:
        ConfigError: the file cannot be read, or is not a lock file.
    """
    try:
        lines = read_regular(path, MOST_LIST).splitlines()
    except UnreadableError as error:
        raise ConfigError(f"--lock: {path} cannot be read ({error})") from None
    found: Digests = {}
    for number, line in enumerate(lines, 1):
        try:
            row = json_of(line)
        except UnreadableError:
            row = None
        if type(row) is not list or len(row) != 4 or not all(isinstance(text, str) for text in row):
            raise ConfigError(
                f"--lock: {path}, line {number}: was not written by data check --lock; name another file"
            )
        split, sample, image, mask = row
        found[split, sample] = image, mask
    return found
