"""Guess the layout of a data set from the names of its folders and files."""

from __future__ import annotations

import os
import re
import unicodedata
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from everseg.data.datasets import annotated, coco, segments
from everseg.data.datasets.camvid import SEQUENCES
from everseg.data.datasets.decode import ENDINGS, PICTURE_ENDINGS, UNLIMITED, open_picture, stored_ids
from everseg.data.datasets.file_names import SPLITS, walk, walk_pictures, without_ending
from everseg.data.datasets.listing import packed
from everseg.data.datasets.street_labels import CITYSCAPES, CITYSCAPES_CLASSES, VOID
from everseg.data.proposal.lists import Lists, find_lists
from everseg.data.proposal.naming import names_beside
from everseg.data.proposal.unreadable import explained
from everseg.display import counted
from everseg.errors import DataError, some
from everseg.files import UnreadableError, json_of, read_regular, real_path
from everseg.labels import find_name, is_void_name

MASK_WORDS = (
    "segmentationclass", "groundtruth", "ground_truth", "annotations", "annotation", "annots", "annot", "masks", "mask",
    "labels", "label", "gtfine", "gt", "masks_machine", "segmentationclasspng", "segmentation", "seg", "targets",
    "target", "ann",
)  # fmt: skip
IMAGE_WORDS = (
    "jpegimages", "leftimg8bit", "images", "image", "imgs", "img", "photos", "pictures", "frames", "rgb", "inputs",
    "input",
)  # fmt: skip
SUFFIXES = tuple(
    between + word
    for word in ("mask", "masks", "label", "labels", "labelids", "labeltrainids", "seg", "segmentation", "gt",
                 "annotation", "l", "color", "colour", "class", "target", "label_ground-truth_semantic")
    for between in "_-."
) + PICTURE_ENDINGS  # fmt: skip
"""Endings that masks have beside their images, in lower case; `.jpg`: the mask of a.jpg is a.jpg.png."""
SKIPPED = ("segmentationobject", "segmentationobjectpng", "segmentationobjectvisualization",
           "segmentationclassvisualization", "masks_human", "masks_instances", "overlay", "overlays", "visualization",
           "__macosx")  # fmt: skip
"""Folders of pictures that are neither images nor masks of classes: labels drawn over images, or objects by number."""
OBJECTS = re.compile(
    r".*[_.-](label_ground-truth|(label_ground-truth[_-])?(instances?|instance_?ids?|panoptic))",
    re.IGNORECASE,
)
"""Stems of masks of objects by number: Segments.ai's bitmaps, Cityscapes' instanceIds and the like."""
NUMBERED = tuple(ending for kind in ("PNG", "TIFF", "BMP") for ending in ENDINGS[kind])
"""Endings of files that can hold numbers."""
MAX_FILES = 2_000_000


@dataclass(frozen=True)
class Guess:
    """A layout that fits."""

    layout: str
    """What it is, for people."""
    keys: dict[str, Any] = field(default_factory=dict)
    """Keys of the data.yaml, without classes and labels."""
    masks: tuple[str, ...] = ()
    """Mask files below the root; () where the reader knows its classes."""
    images: int = 0
    notes: tuple[str, ...] = ()
    """Pictures and lists that are not used."""


@dataclass(frozen=True)
class _Folder:
    """Pictures below one folder."""

    path: str
    template: str
    """The path with {split} in the place of a split's name."""
    split: str
    """train, val, test, or ""."""
    name: str
    """How the folder calls its split."""
    files: tuple[str, ...]
    """Paths below the folder, with their endings."""

    @property
    def stems(self) -> set[str]:
        return {unicodedata.normalize("NFC", os.path.splitext(f)[0]) for f in self.files}  # noqa: PTH122

    @property
    def names(self) -> set[str]:
        """Stems of files that are named after others, too: a of a.jpg.png."""
        return {unicodedata.normalize("NFC", without_ending(f)) for f in self.files}


def guess(root: Path, *, follow_links: bool = False) -> Guess:
    """Find out how the images and masks below a folder are laid out.

    Args:
        follow_links: also look into links to folders. Otherwise the notes, or the error, name such links.

    Raises:
        DataError: no pictures, or no masks that could belong to them. The message states what was found and how to
            write a data.yaml.
    """
    links = [] if follow_links else _linked_folders(root)
    unseen = f"links to folders are not followed: {some(links, 5)}; --follow-links follows them"
    try:
        found = _guess(root, follow_links)
    except DataError as error:
        if not links:
            raise
        raise DataError(f"{error}. {unseen}") from None
    return replace(found, notes=(*found.notes, unseen)) if links else found


def _guess(root: Path, follow_links: bool) -> Guess:
    known = _known(root)
    if known is not None:
        return known
    masks = _voc_masks(root, follow_links)
    if masks and (root / "labelmap.txt").is_file():
        return _lists(root, "CVAT's masks with labelmap.txt", masks, follow_links)
    if masks and (root / "JPEGImages").is_dir():
        return _lists(root, "Pascal VOC's folders", masks, follow_links)
    annotations = coco.find_annotations(root, follow_links=follow_links)
    if annotations:
        return Guess(
            f"COCO annotations ({some([str(p.relative_to(root)) for p in annotations], 3)})",
            {"layout": "coco"},
        )
    if any((root / name).is_file() for name in ("dataset_dict.json", "state.json")) or any(
        root.glob(PARQUET)
    ):
        return Guess("a set of the datasets library", {"layout": "hf"})
    if segments.find_releases(root, follow_links=follow_links):
        return _of_release(root, follow_links)
    tool = annotated.find_tool(root)
    if tool is not None and (found := _of_tool(root, tool, follow_links)) is not None:
        return found
    try:
        return _plain(root, follow_links)
    except DataError as error:
        raise DataError("\n  ".join([str(error), *explained(root)])) from None


PARQUET = "**/*.parquet"
TOOL_NAMES = {
    "labelme": "labelme's JSON", "supervisely": "Supervisely's JSON", "v7": "V7 Darwin's JSON",
    "label-studio": "Label Studio's JSON", "label-studio-png": "Label Studio's pictures of brushes",
    "yolo": "YOLO's polygons",
}  # fmt: skip


def _of_release(root: Path, follow_links: bool) -> Guess:
    """The layout of Segments.ai's release; plain folders where masks of classes are there and its bitmaps are not."""
    try:
        data = segments.build(root, on_missing="skip", follow_links=follow_links)
    except DataError as error:
        try:
            return _plain(root, follow_links)
        except DataError:
            raise error from None
    images = sum(len(split) for split in data.splits.values())
    return Guess("a release of Segments.ai", {"layout": "segments"}, (), images)


def _of_tool(root: Path, tool: str, follow_links: bool) -> Guess | None:
    """The layout of a tool's export; None where the folder holds masks for as many images."""
    data = annotated.build(root, tool=tool, on_missing="skip", follow_links=follow_links)
    images = sum(len(split) for split in data.splits.values())
    try:
        masks = _plain(root, follow_links)
    except DataError:
        masks = None
    if masks is not None and masks.images >= images and tool != "label-studio-png":
        return masks
    names = [data.labels.names[i] for i in sorted(data.labels.names)]
    return Guess(TOOL_NAMES[tool], {"layout": "annotated", "tool": tool, "classes": names}, (), images)


def _voc_masks(root: Path, follow_links: bool) -> str:
    """VOC's folder of masks. labelme2voc's older generation keeps only arrays in the first."""
    folders = ("SegmentationClass", "SegmentationClassPNG")
    there = [f for f in folders if (root / f).is_dir()]
    return next((f for f in there if walk_pictures(root / f, follow_links=follow_links)), "")


def data_sets_below(root: Path, *, follow_links: bool = False) -> list[Path]:
    """Find the folders directly below one that each hold a data set; [] if the folder itself is one, or holds only one.

    A folder with `images/`, `train/` or annotations of its own, or that is the export of a tool, is a data set itself.
    """
    root = real_path(root)
    folders = [p for p in sorted(root.iterdir()) if p.is_dir() and not p.name.startswith(".")]
    if not follow_links:
        folders = [p for p in folders if not p.is_symlink()]
    itself = any(_kind(p.name) or _split_in(p.name) for p in folders) or (root / "SegmentationClass").is_dir()
    if itself or _known(root) is not None or any(coco.looks_like(p) for p in root.glob("*.json")):
        return []
    found: dict[Path, Guess] = {}
    for folder in folders:
        if folder.name.lower() not in SKIPPED:
            try:
                found[folder] = guess(folder, follow_links=follow_links)
            except DataError:
                continue
    if len(found) < 2:
        return []
    # COCO files of one job in numbered folders (job_1, job_2) are read together.
    alike = len({re.sub(r"\d+", "", folder.name) for folder in found}) == 1
    if alike and all(one.keys.get("layout") == "coco" for one in found.values()):
        return []
    try:
        whole = _guess(root, follow_links)
    except DataError:
        return list(found)
    # An export of several folders (a project of a labelling tool) is one data set.
    one_export = whole.layout != "plain folders" and whole.keys.get("layout") != "coco"
    return [] if one_export else list(found)


def _linked_folders(root: Path) -> list[str]:
    """Links to folders below a folder; links within the folder do not count, what they lead to is seen anyway."""
    found = []
    for here, folders, _ in walk(root):
        for name in folders:
            place = Path(here) / name
            if place.is_symlink() and not real_path(place).is_relative_to(real_path(root)):
                found.append(place.relative_to(root).as_posix())
    return found


def _known(root: Path) -> Guess | None:
    """Recognise a published data set, whose reader knows its classes."""

    def has(*places: str) -> bool:
        return all((root / place).is_dir() for place in places)

    def named(folder: str, pattern: str) -> bool:
        return any(re.search(pattern, p.name) for p in islice((root / folder).rglob("*"), 2000))

    if has("leftImg8bit", "gtFine") and named("gtFine", r"_gtFine_(labellevel3Ids\.png|polygons\.json)"):
        level3 = named("gtFine", r"_labellevel3Ids\.png") or any((root / "leftImg8bit").glob("*/[0-9]*"))
        if level3:
            return Guess("IDD", {"layout": "idd"})
        _require_cityscapes(root)
        return Guess("Cityscapes", {"layout": "cityscapes"})
    if has("leftImg8bit", "gtFine") and named("gtFine", r"_gtFine_label"):
        _require_cityscapes(root)
        return Guess("Cityscapes", {"layout": "cityscapes"})
    if has("IDD_Segmentation") or has("idd20kII"):
        return Guess("IDD", {"layout": "idd"})
    if has("images/10k", "labels/sem_seg/masks") or has("seg/images", "seg/labels"):
        return Guess("BDD100K", {"layout": "bdd100k"})
    if has("images/training", "annotations/training") and named("images/training", r"^ADE_train_"):
        return Guess("ADE20K", {"layout": "ade"})
    if has("train", "trainannot") and named("train", f"^({'|'.join(SEQUENCES)})"):
        return Guess("CamVid", {"layout": "camvid"})
    voc = has("JPEGImages", "SegmentationClass", "ImageSets/Segmentation") and named(
        "JPEGImages", r"^20(07|08|09|10|11|12)_\d{6}\."
    )
    if voc and not (root / "labelmap.txt").exists():
        return Guess("Pascal VOC", {"layout": "voc"})
    return None


LOOKED_AT = 20
"""So many masks and polygon files show whether a tree laid out as Cityscapes holds its classes."""
CITIES = frozenset({
    "aachen", "berlin", "bielefeld", "bochum", "bonn", "bremen", "cologne", "darmstadt", "dusseldorf", "erfurt",
    "frankfurt", "hamburg", "hanover", "jena", "krefeld", "leverkusen", "lindau", "mainz", "monchengladbach", "munich",
    "munster", "strasbourg", "stuttgart", "tubingen", "ulm", "weimar", "zurich",
})  # fmt: skip
"""Folders of Cityscapes with fine annotations."""


def _require_cityscapes(root: Path) -> None:
    """Refuse a tree that is laid out as Cityscapes but holds classes of its own, or may do so.

    Raises:
        DataError: with the names or ids that are not those of Cityscapes, or with both readings where neither the
            names of cities nor of classes show that it is Cityscapes; and how to describe the data.
    """
    known = {label.name for label in CITYSCAPES}
    files = sorted(p for p in islice((root / "gtFine").rglob("*"), MAX_FILES) if p.is_file())
    foreign: set[str] = set()
    named: dict[str, set[str]] = {}
    for file in _spread([p for p in files if p.name.endswith("_gtFine_polygons.json")]):
        try:
            labels = {str(o["label"]) for o in json_of(read_regular(file))["objects"]}
        except (UnreadableError, KeyError, TypeError):
            continue  # the reader says what is wrong with it
        foreign |= {label for label in labels if label.removesuffix("group") not in known}
        named[file.name.removesuffix("_polygons.json")] = labels
    beside = names_beside(root, ())
    own = () if beside is None else beside.names or tuple(beside.tied.values())
    foreign |= {name for name in own if find_name(name, known) is None and not is_void_name(name)}
    wrong = [f"the classes {some(sorted(foreign), 8)}"] if foreign else []
    seen: dict[str, list[int]] = {}
    for suffix, trained in (("_labelIds", False), ("_labelTrainIds", True)):
        masks = _spread([p for p in files if p.stem.endswith(f"_gtFine{suffix}") and p.suffix == ".png"])
        ids, more = _foreign_ids(masks, suffix, trained, named)
        wrong += more
        seen |= {suffix: sorted(ids)} if ids else {}
    describe = (
        "write a data.yaml with `images: leftImg8bit/{split}`, `masks: gtFine/{split}`, `splits: [train, val]`, `pair: "
        "{image_suffix: _leftImg8bit, mask_suffix: _gtFine_labelIds}` and your `classes` (docs: plain folders), or "
        "rename the folders to images/ and masks/"
    )
    if wrong:
        raise DataError(
            f"{root}: laid out as Cityscapes, but holds {'; '.join(wrong)}. If the classes are your own, {describe}; "
            "if they are Cityscapes' own, set data.dataset=cityscapes"
        )
    cities = (p.name for p in (root / "leftImg8bit").glob("*/*") if p.is_dir() and any(p.glob(f"{p.name}_*")))
    if not (CITIES & {*cities} or any(named.values()) or own):
        held = "; ".join(f"*_gtFine{suffix}.png: {some(list(map(str, i)), 12)}" for suffix, i in seen.items())
        raise DataError(
            f"{root}: laid out as Cityscapes, but neither its cities nor polygons nor a list of names say that the ids "
            f"({held}) are those of Cityscapes. If they are (7 is road, 11 building; as trainIds 0 is road, 2 "
            f"building): set data.dataset=cityscapes data.root={root}. If the classes are your own, {describe}"
        )


def _foreign_ids(
    masks: list[Path], suffix: str, trained: bool, named: Mapping[str, set[str]]
) -> tuple[set[int], list[str]]:
    """The ids in masks of Cityscapes' names, and which cannot be Cityscapes' or are none of their polygons' labels.

    Args:
        trained: the masks are said to hold trainIds, not label ids.
        named: name of a mask without `suffix` -> the labels of its polygons.
    """
    allowed = {*range(len(CITYSCAPES_CLASSES)), VOID} if trained else {label.id for label in CITYSCAPES}
    ignored = {VOID}
    if not trained:
        ignored |= {label.id for label in CITYSCAPES if label.train_id == VOID and label.id >= 0}
    label_ids = {label.id for label in CITYSCAPES} | {VOID}
    ids: set[int] = set()
    wrong: list[str] = []
    for file in masks:
        try:
            with file.open("rb") as opened:
                held = {*np.unique(stored_ids(open_picture(opened, file, UNLIMITED), file)).tolist()}
        except (DataError, OSError):
            continue
        ids |= held
        labels = {label.removesuffix("group") for label in named.get(file.stem.removesuffix(suffix), ())}
        drawn = {label.train_id if trained else label.id for label in CITYSCAPES if label.name in labels}
        if labels and not wrong and (strange := held - drawn - ignored):
            what = some([str(i) for i in sorted(strange)], 8)
            wrong.append(f"the ids {what} in {file.name}, whose polygons are {some(sorted(labels), 6)}")
    # Label ids in place of trainIds have a message of their own, in the reader.
    if trained and ids - allowed and ids <= label_ids:
        return ids, []
    if ids - allowed:
        wrong = [f"the ids {some([str(i) for i in sorted(ids - allowed)], 8)} in *_gtFine{suffix}.png"]
    elif len(ids) > 1 and ids <= ignored:
        what = some([str(i) for i in sorted(ids)], 8)
        wrong = [f"only the ids {what} in *_gtFine{suffix}.png, which Cityscapes ignores"]
    return ids, wrong


def _spread(files: list[Path]) -> list[Path]:
    """Take `LOOKED_AT` of some files, from the first to the last."""
    step = max(1, len(files) // LOOKED_AT)
    return files[::step]


def _lists(root: Path, layout: str, folder: str, follow_links: bool) -> Guess:
    """Recognise JPEGImages/ and a folder of masks with lists in ImageSets/Segmentation/."""
    images = next((f for f in ("JPEGImages", "images", "Images") if (root / f).is_dir()), None)
    if images is None:
        raise DataError(
            f"{root}: {folder}/ and labelmap.txt are there, but no images in JPEGImages/; export them with the"
            " masks (CVAT: 'save images'), or copy them there"
        )
    keys: dict[str, Any] = {"images": images, "masks": folder}
    lists = find_lists(root, images, folder, follow_links=follow_links)
    keys |= {"splits": lists.splits} if lists.splits else {"split": {"val": 0.2, "seed": 0}}
    if (root / "labelmap.txt").is_file():
        keys["labels"] = {"palette": "labelmap.txt"}
    masks = tuple(f"{folder}/{f}" for f in walk_pictures(root / folder, follow_links=follow_links))
    return Guess(
        layout, keys, masks, len(walk_pictures(root / images, follow_links=follow_links)), lists.notes
    )


def _plain(root: Path, follow_links: bool) -> Guess:
    folders, objects = _folders(root, follow_links)
    try:
        found = _pairs(root, folders, follow_links)
    except DataError as error:
        if not objects:
            raise
        raise DataError(f"{error}. {_objects_left(objects)}") from None
    notes = (f"not used: {_objects_left(objects)}",) if objects else ()
    return replace(found, notes=(*found.notes, *notes))


def _objects_left(objects: list[str]) -> str:
    return (
        f"{counted(len(objects), 'picture', 'holds', 'hold')}, by their names, objects by number and not classes "
        f"({some(objects, 3)}); export "
        "masks of classes (Segments.ai: export_dataset(dataset, export_format='semantic'), which writes "
        "*_label_ground-truth_semantic.png), or, if their pixels are class ids, rename them to *_mask.png"
    )


def _pairs(root: Path, folders: list[_Folder], follow_links: bool) -> Guess:
    if not folders:
        raise DataError(
            f"{root}: no pictures below it ({', '.join(PICTURE_ENDINGS)}); "
            + (packed(root) or "name the folder that holds images and masks")
        )
    by_template: dict[str, list[_Folder]] = {}
    for folder in folders:
        by_template.setdefault(folder.template, []).append(folder)
    kinds = {template: _kind(template) for template in by_template}
    pairs = [
        (_score(by_template[images], by_template[masks]), images, masks)
        for images in by_template
        for masks in by_template
        if images != masks and kinds[masks] == "masks" and kinds[images] != "masks"
    ]
    best = max(pairs, key=lambda pair: pair[0][0], default=((0, "", ""), "", ""))
    beside = max(((_beside(of), template) for template, of in by_template.items()), key=lambda b: b[0][0])
    (count, image_suffix, mask_suffix), images, masks = best
    if beside[0][0] > count:
        (count, mask_suffix), images = beside
        image_suffix, masks = "", images
    if not count:
        found = some([f"{f.path}/ ({counted(len(f.files), 'picture')})" for f in folders], 8)
        raise DataError(
            f"{root}: which pictures are the masks? Found {found}. Name folders like images/ and masks/ with equal file"
            " names, or write a data.yaml (docs: plain folders)"
        )
    described = _described(
        root, by_template[images], by_template[masks], image_suffix, mask_suffix, follow_links
    )
    used = {
        f.path
        for t in (images, masks)
        for f in by_template[t]
        if f.split in _splits_of(by_template, images, masks)
    }
    unused = [f"{f.path}/ ({counted(len(f.files), 'picture')})" for f in folders if f.path not in used]
    if unused:
        described = replace(described, notes=(*described.notes, f"not used: {some(unused, 12)}"))
    return described


def _splits_of(by_template: dict[str, list[_Folder]], images: str, masks: str) -> set[str]:
    """Splits that have images and masks."""
    return {f.split for f in by_template[images]} & {f.split for f in by_template[masks]}


def _described(
    root: Path,
    images: list[_Folder],
    masks: list[_Folder],
    image_suffix: str,
    mask_suffix: str,
    follow_links: bool,
) -> Guess:
    there = {f.split: f for f in images}
    usable = {f.split: f for f in masks if f.split in there}
    keys: dict[str, Any] = {"images": images[0].template, "masks": masks[0].template}
    if len(usable) > 1 or (usable and "" not in usable and "train" not in usable):
        keys["splits"] = {s: there[s].name for s in ("train", "val", "test") if s in usable}
    else:
        one = next(iter(usable))
        keys = {"images": there[one].path, "masks": usable[one].path, "split": {"val": 0.2, "seed": 0}}
    if image_suffix or mask_suffix:
        keys["pair"] = {k: s for k, s in (("image_suffix", image_suffix), ("mask_suffix", mask_suffix)) if s}
    files = [
        f"{f.path}/{name}" if f.path != "." else name
        for f in usable.values()
        for name in f.files
        if os.path.splitext(name)[0].endswith(mask_suffix)  # noqa: PTH122
    ]
    lists = Lists({})
    if "split" in keys:
        lists = find_lists(
            root,
            keys["images"],
            keys["masks"],
            image_suffix=image_suffix,
            mask_suffix=mask_suffix,
            follow_links=follow_links,
        )
        if lists.splits:
            keys = {k: v for k, v in keys.items() if k != "split"} | {"splits": lists.splits}
    shared = keys["images"] == keys["masks"]
    count = sum(len(there[s].files) for s in usable) - (len(files) if shared else 0)
    return Guess("plain folders", keys, tuple(files), count, lists.notes)


def _score(images: list[_Folder], masks: list[_Folder]) -> tuple[int, str, str]:
    """Count the masks that pair with an image, and find the endings to strip from names before pairing."""
    best = (0, "", "")
    for image in images:
        mask = next((m for m in masks if m.split == image.split), None)
        if mask is None:
            continue
        for image_suffix, mask_suffix in (("", ""), *_endings(image.names, mask.names)):
            bare = {s.removesuffix(image_suffix) for s in image.names if s.endswith(image_suffix)}
            hits = sum(s.removesuffix(mask_suffix) in bare for s in mask.names if s.endswith(mask_suffix))
            if hits > best[0]:
                best = hits, image_suffix, mask_suffix
    return best


def _endings(images: set[str], masks: set[str]) -> Iterator[tuple[str, str]]:
    """List pairs of endings that, when stripped, give some image and some mask the same name."""
    names = sorted(images)
    for stem in sorted(masks)[:3]:
        for name in names[:2000]:
            common = os.path.commonprefix([name, stem])  # noqa: RUF071 - of the letters
            common = common.rstrip("_.-")
            ending, other = name[len(common) :], stem[len(common) :]
            if common and _ENDING.fullmatch(ending) and _ENDING.fullmatch(other):
                yield ending, other


_ENDING = re.compile(r"([_.-]\D[\w.-]*)?")
"""What names may have behind what they share: a word behind a sign."""


def _beside(folders: list[_Folder]) -> tuple[int, str]:
    """Count the masks that are beside their image and have its name with an ending, in the spelling of the files."""
    hits: dict[str, int] = {}
    for folder in folders:
        stems = folder.stems
        for stem in stems:
            lower = stem.lower()
            for suffix in SUFFIXES:
                ending = stem[len(stem) - len(suffix) :]
                if lower.endswith(suffix) and stem.removesuffix(ending) in stems:
                    hits[ending] = hits.get(ending, 0) + 1
    return max(((count, ending) for ending, count in hits.items()), default=(0, ""))


def _kind(template: str) -> str:
    words = [
        w
        for part in template.lower().split("/")
        for w in re.split(r"[^a-z0-9]+", part.replace("{split}", " "))
    ]
    words += [part.replace("{split}", "") for part in template.lower().split("/")]
    if any(w in MASK_WORDS for w in words):
        return "masks"
    return "images" if any(w in IMAGE_WORDS for w in words) else ""


def _folders(root: Path, follow_links: bool) -> tuple[list[_Folder], list[str]]:
    """List the folders with pictures, and the pictures of objects by number, which are left out.

    Folders of one split and kind (cities, drives) are joined.
    """
    found: dict[str, list[str]] = {}
    objects = []
    for path in islice(walk_pictures(root, follow_links=follow_links), MAX_FILES):
        if path.lower().endswith(NUMBERED) and OBJECTS.fullmatch(without_ending(path)):
            objects.append(path)
            continue
        folder, _, name = path.rpartition("/")
        found.setdefault(folder or ".", []).append(name)
    united: dict[str, list[str]] = {}
    for folder, names in found.items():
        if any(word in folder.lower().split("/") for word in SKIPPED):
            continue
        top = _top(folder)
        inside = "" if top == folder else folder[len(top) + 1 :] + "/"
        united.setdefault(top, []).extend(inside + name for name in names)
    folders = [_Folder(path, *_template(path), tuple(files)) for path, files in sorted(united.items())]
    return folders, objects


def _top(folder: str) -> str:
    """Cut a path after the folder that names a kind or split, whichever is deeper."""
    parts = folder.split("/")
    last = max((i for i, p in enumerate(parts) if _kind(p) or _split_in(p)), default=len(parts) - 1)
    return "/".join(parts[: last + 1])


def _split_in(part: str) -> tuple[str, str] | None:
    """Find (word in the folder's name, split) if the name contains a split: train, trainannot, train_images."""
    for name in sorted(SPLITS, key=len, reverse=True):
        if re.fullmatch(rf"{name}([_-].*|annot|mask[s]?|label[s]?)?|.*[_-]{name}", part, re.IGNORECASE):
            at = part.lower().index(name)
            return part[at : at + len(name)], SPLITS[name]
    return None


def _template(path: str) -> tuple[str, str, str]:
    """Make (path with {split}, split, the split's name in the path)."""
    parts = path.split("/")
    for number, part in enumerate(parts):
        found = _split_in(part)
        if found is not None:
            parts[number] = part.replace(found[0], "{split}", 1)
            return "/".join(parts), found[1], found[0]
    return path, "", ""
