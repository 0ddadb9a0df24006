"""Comparison of the predictions of two models on the same images."""

from __future__ import annotations

import io
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from everseg.data.channels import picture_of, same_channels
from everseg.data.class_colours import colourise
from everseg.data.datasets.decode import read_image
from everseg.data.datasets.listing import image_files
from everseg.display import OnceADictionary, Picture, Piece, counted, percent, table
from everseg.errors import ConfigError
from everseg.inference.pictures import legend, shrink
from everseg.inference.predict import LoadedModel, load
from everseg.labels import IGNORED, Matching, match_names, spelling
from everseg.progress import Progress
from everseg.runs.commit import write_bytes, write_json, writing

CELL = (240, 320)
"""Largest height and width of a picture on the sheet, pixels."""
CAPTION = 22
GAP = 4


@dataclass(frozen=True)
class Became:
    """Pixels to which the first model gives class `a` and the second model class `b`."""

    a: str
    b: str
    share: float
    """Share of the pixels of the image, or of all images."""

    def __str__(self) -> str:
        return f"{self.a} -> {self.b} {percent(self.share)}"


@dataclass(frozen=True)
class ImageDifference:
    """Disagreement of two models on one image."""

    image: str
    """Name of the image, relative to the folder of images."""
    share: float
    """Share of the pixels that differ."""
    became: tuple[Became, ...]
    """The ten largest changes, largest first."""


@dataclass(frozen=True, repr=False)
class Difference(OnceADictionary):
    """Disagreement of two models on the same images."""

    a: str
    """The first model, as given."""
    b: str
    images: tuple[ImageDifference, ...]
    """All images, those with most disagreement first."""
    share: float
    """Share of all pixels that differ."""
    became: tuple[Became, ...]
    """The ten largest changes over all images, largest first."""
    only_a: tuple[str, ...]
    """Classes that only the first model knows."""
    only_b: tuple[str, ...]
    """Classes that only the second model knows."""
    sheet: Path | None
    """File with a picture of the images with most disagreement; None if it was not written."""
    largest: int = 8
    """Number of images in the table."""
    notes: tuple[str, ...] = ()
    """Names that differ in spelling, and how classes known to one model only affect the shares."""

    @classmethod
    def of(cls, found: Mapping[str, Any], largest: int) -> Difference:
        """Build the object from the content of diff.json."""
        images = tuple(
            ImageDifference(row["image"], row["share"], _changes(row["became"])) for row in found["images"]
        )
        return cls(
            found["a"],
            found["b"],
            images,
            found["share"],
            _changes(found["became"]),
            tuple(found["only_a"]),
            tuple(found["only_b"]),
            None if found["sheet"] is None else Path(found["sheet"]),
            largest,
            tuple(found["notes"]),
        )

    def shown(self) -> Iterator[Piece]:
        rows = [
            [one.image, percent(one.share), ", ".join(map(str, one.became[:3]))]
            for one in self.images[: self.largest]
        ]
        count = len(self.images)
        title = (
            f"{self.a} and {self.b}: pixels that differ, {percent(self.share)} % of {counted(count, 'image')}; "
            "ranked by them, all classes counted"
        )
        columns = ["image", "percent", "which class became which (percent of the image)"]
        yield table(columns, rows, title=title, right="percent")
        yield "over all images: " + (", ".join(map(str, self.became)) or "no difference")
        if self.sheet is not None:
            yield f"wrote {self.sheet} and diff.json beside it"
            yield Picture(self.sheet.read_bytes, "the images with most disagreement, and where they differ")

    def to_json(self) -> dict[str, Any]:
        whole = asdict(self)
        del whole["largest"]
        for key in ("became", "only_a", "only_b", "notes"):
            whole[key] = list(whole[key])
        whole["images"] = [{**row, "became": list(row["became"])} for row in whole["images"]]
        return {**whole, "sheet": None if self.sheet is None else str(self.sheet)}


def _changes(rows: Iterable[Mapping[str, Any]]) -> tuple[Became, ...]:
    return tuple(Became(**row) for row in rows)


def diff(
    a: str | Path,
    b: str | Path,
    images: str | Path,
    *,
    out: str | Path | None = None,
    largest: int = 8,
    domain: str | None = None,
    quiet: bool = False,
) -> Difference:
    """Predict every image with both models and compare their classes by name.

    Args:
        a: bundle, run folder or model folder; so is `b`.
        images: folder of images.
        out: folder for `diff.json` and the sheet `diff.png`. If it is None, neither file is written.
        largest: number of images on the sheet and in the table. The images with most disagreement are taken.
        domain: branch for all images; required if a model has several branches.

    Returns:
        The difference. Classes that both models know have the name that the first model uses.

    Raises:
        ConfigError: the models share no class, a name may mean two classes, or it is unclear which branch should
            predict the images.
        CheckpointError: a model cannot be read.
        DataError: an image cannot be read.
    """
    models = [load(path) for path in (a, b)]
    for model in models:
        model.check_alone()
        model.check_branch(domain)
    matched = _matched(models, domain)
    spaces = [model.spaces[_branch(model, domain)] for model in models]
    names = [*spaces[0].names, *matched.unmatched_wanted]
    empty = {space.names[space.background] for space in spaces if space.background is not None}
    background = next((i for i, name in enumerate(names) if name in empty), None)
    files = image_files(images, models[0].form.reading)
    rows, total, pixels = [], Counter[tuple[str, str]](), 0
    with Progress(quiet=quiet) as progress:
        progress.begin("comparing", len(files))
        for done, path in enumerate(files, 1):
            compared = _compare(models, names, path, domain)
            pixels += compared.a.size
            changed = compared.changed()
            total += changed
            name = path.relative_to(images).as_posix()
            rows.append(
                {
                    "image": name,
                    "share": _share(changed, compared.a.size),
                    **_became(changed, compared.a.size),
                }
            )
            progress.update(done)
        progress.end()
    rows.sort(key=lambda row: -row["share"])
    result = {
        "a": str(a), "b": str(b), "images": rows, "share": _share(total, pixels), **_became(total, pixels),
        "only_a": list(matched.unmatched_known), "only_b": list(matched.unmatched_wanted),
        "notes": _notes(matched, str(a), str(b)), "sheet": None,
    }  # fmt: skip
    if out is not None:
        out = Path(out)
        with writing(out):
            out.mkdir(parents=True, exist_ok=True)
        shown = [_compare(models, names, Path(images) / row["image"], domain) for row in rows[:largest]]
        write_bytes(out / "diff.png", _sheet(shown, rows, names, background, (Path(a).name, Path(b).name)))
        result["sheet"] = str(out / "diff.png")
        write_json(out / "diff.json", result)
    return Difference.of(result, largest)


@dataclass(frozen=True)
class _Compared:
    """Two predictions of one image. Their ids are positions in the common list of class names."""

    image: np.ndarray
    a: np.ndarray
    b: np.ndarray
    names: Sequence[str]

    def changed(self) -> Counter[tuple[str, str]]:
        """(class in a, class in b) -> pixels, where the two differ."""
        size = len(self.names)
        # One number per pair of classes, so that one call of `unique` counts all pairs.
        pairs = self.a.astype(np.int64) * size + self.b  # (H, W)
        found, counts = np.unique(pairs[self.a != self.b], return_counts=True)
        return Counter(
            {
                (self.names[p // size], self.names[p % size]): n
                for p, n in zip(found.tolist(), counts.tolist(), strict=True)
            }
        )


def _branch(model: LoadedModel, domain: str | None) -> str:
    return next(iter(model.spaces)) if domain is None else model.branch_of[domain]


def _matched(models: Sequence[LoadedModel], domain: str | None) -> Matching:
    """Match the classes of the second model with those of the first."""
    first, second = (model.spaces[_branch(model, domain)].names for model in models)
    found = match_names(second, first, what=("classes of the second model", "classes of the first model"))
    if not found.pairs:
        raise ConfigError(
            f"the two models share no class, so there is nothing to compare: {', '.join(first)} and {', '.join(second)}"
        )
    return found


def _notes(found: Matching, a: str, b: str) -> list[str]:
    notes = [
        f"class '{theirs}' of {b} is taken for '{ours}' of {a}" for theirs, ours in found.respelt.items()
    ]
    for which, lonely in ((a, found.unmatched_known), (b, found.unmatched_wanted)):
        if lonely:
            notes.append(
                f"only {which} knows: {', '.join(lonely)}; every pixel that it gives to them counts as different"
            )
    return notes


def _compare(
    models: Sequence[LoadedModel], names: Sequence[str], path: Path, domain: str | None
) -> _Compared:
    # Both models get the same pixels, so the reading settings come from the first model, with the larger bit depth.
    if not same_channels(models[0].form.channels, models[1].form.channels):
        raise ConfigError(
            "the models see images of different channels, so no image fits both; compare two models of the same data"
        )
    depth = max(model.form.bit_depth for model in models)
    image = read_image(path, replace(models[0].form.reading, bit_depth=depth))
    a, b = (_predicted(model, names, image, domain) for model in models)
    return _Compared(picture_of(image, models[0].form.channels), a, b, names)


def _predicted(model: LoadedModel, names: Sequence[str], image: np.ndarray, domain: str | None) -> np.ndarray:
    prediction = model.predict(image, branch=domain)
    there = {spelling(name): position for position, name in enumerate(names)}
    return np.array(
        [there[spelling(name)] for name in prediction.classes],
        np.uint8 if len(names) <= IGNORED else np.uint16,
    )[prediction.ids]


def _share(changed: Counter[tuple[str, str]], pixels: int) -> float:
    return sum(changed.values()) / max(1, pixels)


def _became(changed: Counter[tuple[str, str]], pixels: int) -> dict[str, Any]:
    """List the ten largest changes of class, largest first."""
    return {
        "became": [{"a": a, "b": b, "share": n / max(1, pixels)} for (a, b), n in changed.most_common(10)]
    }


def _sheet(
    shown: Sequence[_Compared],
    rows: Sequence[dict[str, Any]],
    names: Sequence[str],
    background: int | None,
    titles: tuple[str, str],
) -> bytes:
    """Draw the sheet: a row for each image, and a legend.

    A row shows the image, both predictions, and the second prediction where the two differ.
    """
    font = ImageFont.load_default(size=14)
    pictures = [_pictures(compared, background) for compared in shown]
    widths = [max(row[column].shape[1] for row in pictures) for column in range(4)]
    key = legend(list(names), background=background)
    width = sum(widths) + 5 * GAP + key.shape[1]
    height = sum(row[0].shape[0] + CAPTION for row in pictures) + CAPTION + GAP
    sheet = Image.new("RGB", (width, max(height, key.shape[0] + CAPTION)), "white")
    draw = ImageDraw.Draw(sheet)
    lefts = np.cumsum([GAP, *(w + GAP for w in widths)]).tolist()
    for left, room, title in zip(lefts, widths, ("image", *titles, "difference"), strict=False):
        draw.text((left, 3), shortened(title, room, font), fill=(20, 20, 20), font=font)
    top = CAPTION
    for row, told in zip(pictures, rows, strict=False):
        for left, picture in zip(lefts, row, strict=False):
            sheet.paste(Image.fromarray(picture), (left, top))
        top += row[0].shape[0]
        draw.text(
            (GAP, top + 2),
            f"{told['image']}: {percent(told['share'])} % differ",
            fill=(20, 20, 20),
            font=font,
        )
        top += CAPTION
    sheet.paste(Image.fromarray(key), (lefts[-1], CAPTION))
    buffer = io.BytesIO()
    sheet.save(buffer, format="PNG")
    return buffer.getvalue()


def shortened(text: str, room: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    """Leave out the middle of a text that is wider than `room` pixels: names of bundles differ at their ends."""
    for left_out in range(1, len(text)):
        if font.getlength(text) <= room:
            break
        kept = len(text) - left_out
        middle = f"{text[: (kept + 1) // 2]}...{text[len(text) - kept // 2 :]}"
        if font.getlength(middle) <= room:
            return middle
    return text


def _pictures(compared: _Compared, background: int | None) -> list[np.ndarray]:
    # Pixels on which both agree show a pale grey image, so that the colours of the others stand out.
    grey = np.repeat(compared.image.mean(axis=2, keepdims=True) * 0.4 + 140, 3, axis=2).astype(np.uint8)
    a, b = (colourise(ids, background=background) for ids in (compared.a, compared.b))
    differs = np.where((compared.a != compared.b)[..., None], b, grey)
    return [shrink(p, *CELL) for p in (compared.image, a, b, differs)]
