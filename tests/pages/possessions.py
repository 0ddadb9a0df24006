"""What a reader of the pages has: data sets in their layouts, photographs, checkpoints; all tiny, made on demand."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import street
import torch
import trees

SIZE = (32, 48)
FORKS = ["background", "forklift", "person"]
SHARED = ["background", "road", "tree", "building", "sign"]
Maker = Callable[[Path], object]


def picture(number: int) -> np.ndarray:
    """An image that no other number gives."""
    noise = np.random.default_rng(number).integers(0, 60, (*SIZE, 3), dtype=np.uint8)
    return trees.image_of(number, SIZE) + noise


# ---------------------------------------------------------------- data sets: what DIR stands for


def voc(base: Path) -> None:
    """Two training images of each class alone, so that every task and protocol has some; val shows all classes."""
    stems = {"train": [f"2007_{n:06d}" for n in range(40)], "val": [f"2008_{n:06d}" for n in range(5)]}
    for split, names in stems.items():
        for number, name in enumerate(names):
            ids = [0, number % 20 + 1] if split == "train" else [0, *range(4 * number + 1, 4 * number + 5)]
            trees.save(base / "JPEGImages" / f"{name}.jpg", picture(int(name[:4] + name[-2:])))
            for folder in ("SegmentationClass", "SegmentationClassAug"):
                trees.save(base / folder / f"{name}.png", trees.mask_of(ids, SIZE))
        trees.write(base / "ImageSets" / "Segmentation" / f"{split}.txt", "\n".join(names) + "\n")


def camvid(base: Path) -> None:
    """Frames of the day drives and of the dusk drive, all eleven classes in each."""
    for part, split in enumerate(("train", "val", "test")):
        for place, drive in enumerate(("0006R0", "Seq05VD", "0001TP")):
            if (split, drive) == ("val", "0001TP"):
                continue
            for number in range(3):
                name = f"{drive}_{part}{number:05d}.png"
                trees.save(base / split / name, picture(100 * part + 10 * place + number))
                trees.save(base / f"{split}annot" / name, trees.mask_of(list(range(12)), SIZE))


def own(base: Path, classes: int) -> None:
    """A reader's own folder: images/{train,val,test} and masks of background and so many classes."""
    for split, numbers in (("train", range(8)), ("val", range(8, 10)), ("test", range(10, 12))):
        for number in numbers:
            trees.save(base / "images" / split / f"{number}.png", picture(number))
            ids = [0, *range(1, classes + 1)] if number % 2 else [0, 1]
            trees.save(base / "masks" / split / f"{number}.png", trees.mask_of(ids, SIZE))


def street_with_masks(base: Path) -> None:
    from everseg.data.get.draw_masks import prepare

    street.write(base)
    prepare("cityscapes", base / "cs")
    prepare("idd", base / "idd")


TREES: Mapping[str, Maker] = {
    "VOC2012": voc,
    "CamVid": camvid,
    "street": street_with_masks,
    "polygons": street.write,
    "three-classes": lambda path: own(path, 3),
    "four-classes": lambda path: own(path, 4),
    "downloads": lambda path: path.mkdir(),
}
"""Folder -> what makes it; a command gets the one that commands.PLACES names."""


def archives(folder: Path) -> None:
    """What the servers of `everseg data download` have, under the archives' own names."""
    voc(folder / "1/VOCdevkit/VOC2012")
    shutil.move(folder / "1/VOCdevkit/VOC2012/SegmentationClassAug", folder / "2/SegmentationClassAug")
    trees.ade(folder / "3/ADEChallengeData2016")
    for inside, name, kind in (("1", "VOCtrainval_11-May-2012", "tar"), ("2", "SegmentationClassAug", "zip"),
                               ("3", "ADEChallengeData2016", "zip")):  # fmt: skip
        shutil.make_archive(str(folder / name), kind, folder / inside)


# ---------------------------------------------------------------- files: what <!-- given: ... --> may name


def photo(path: Path) -> None:
    trees.save(path, picture(3))


def photos(path: Path) -> None:
    for number in range(3):
        trees.save(path / f"{number}.jpg", picture(number))


def described(names: list[str]) -> Maker:
    """A data.yaml with its images beside it."""

    def make(path: Path) -> None:
        own(path.with_suffix(""), len(names) - 1)
        path.write_text(f"name: {path.stem}\nroot: {path.stem}\nclasses: [{', '.join(names)}]\n")

    return make


def resnet101(path: Path) -> None:
    """An encoder in torchvision's names, as narrow as the small presets'."""
    from small import MODELS

    from everseg.models.build import ARCHITECTURES

    model = ARCHITECTURES["deeplabv3-resnet101"](norm="bn", **MODELS["deeplabv3-resnet101"])
    torch.save(model.encoder.state_dict(), path)


def mib_checkpoint(path: Path) -> None:
    """Step 1 of 15-5 as MiB's code would have saved it."""
    from everseg.interop import mib
    from everseg.models.build import deeplabv3

    model = deeplabv3(norm="iabn", blocks=(1, 1, 1, 1), stem=4, widths=(2, 3, 4, 5), hidden=3, out_channels=4)
    for size in (16, 5):
        model.grow({"default": size})
    torch.save({"epoch": 29, "model_state": mib.dump(model)}, path)


def mdil_checkpoint(path: Path) -> None:
    """Step 3 as MDIL's code would have saved it: Cityscapes, BDD100K, IDD, void included."""
    from everseg.interop import mdil
    from everseg.models.erfnet import erfnet

    model = erfnet(widths=(4, 6, 8), blocks=(1, 2))
    for number, classes in enumerate((20, 20, 27)):
        model.grow({f"domain{number}": classes})
    torch.save({"epoch": 149, "state_dict": mdil.dump(model)}, path)


def erfnet_encoder(path: Path) -> None:
    """The pretrained encoder of MDIL's code, as narrow as the small presets'."""
    from small import MODELS

    from everseg.interop import mdil
    from everseg.models.erfnet import erfnet

    model = erfnet(per_branch="decoder", **MODELS["erfnet"])
    torch.save({"epoch": 1, "state_dict": mdil.dump_encoder(model)}, path)


def torchvision_weights(path: Path) -> None:
    """A narrow DeepLabV3 in torchvision's names, with its three outputs."""
    from everseg.models.adapters.whole import torchvision_deeplabv3

    model = torchvision_deeplabv3(blocks=(3, 4, 6, 3), stem=4, widths=[4, 4, 4, 4], hidden=4)
    model.grow({"default": 3})
    theirs = {
        "encoder.": "backbone.",
        "decoder.": "classifier.",
        "heads.default.classifiers.0.": "classifier.4.",
    }
    names = {name: next(t + name.removeprefix(o) for o, t in theirs.items() if name.startswith(o))
             for name in model.state_dict()}  # fmt: skip
    torch.save({names[name]: value for name, value in model.state_dict().items()}, path)


def mit(path: Path) -> None:
    """A folder of the hub: a SegFormer encoder of a few thousand weights."""
    from encoders import TYPES
    from transformers import SegformerConfig, SegformerModel

    SegformerModel(SegformerConfig(**TYPES["segformer"])).save_pretrained(path)


FILES: Mapping[str, Maker] = {
    "photo.jpg": photo,
    "more.jpg": photo,
    "photos": photos,
    "other.yaml": described(SHARED),
    "forklift.yaml": described(FORKS),
    "dusk.yaml": described(FORKS),
    "mine.yaml": lambda path: path.write_text("preset: demo-mib\nmethod: {kd_weight: 20}\n"),
    "resnet101.pth": resnet101,
    "15-5-voc_MiB_1.pth": mib_checkpoint,
    "checkpoint-step3.pth.tar": mdil_checkpoint,
    "erfnet_encoder_pretrained.pth.tar": erfnet_encoder,
    "weights.pth": torchvision_weights,
    "names.txt": lambda path: path.write_text("background\nboat\ndog\n"),
    "nvidia/mit-b2": mit,
    "three-classes": functools.partial(own, classes=3),
}
"""Name that a page may declare as given -> what makes it. `runs/PRESET` is known too: that preset is trained."""
