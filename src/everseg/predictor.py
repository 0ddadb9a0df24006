"""A trained model at work: load it, predict images, write masks and overlays (floor 6)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from everseg.data.datasets.files import read_image
from everseg.data.transforms import normalise
from everseg.engine.checkpoint import verify, write_json
from everseg.engine.evaluate import predict_ids
from everseg.engine.folder import RunFolder, load_model
from everseg.engine.pictures import overlay, write_prediction
from everseg.errors import CheckpointError, ConfigError, DataError
from everseg.labels import LabelSpace
from everseg.models.model import SegmentationModel

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp"})


@dataclass(frozen=True)
class Prediction:
    """Classes of one image's pixels."""

    ids: np.ndarray
    """(H, W) uint8 train ids."""
    classes: tuple[str, ...]
    """Name of each train id."""
    image: np.ndarray
    """(H, W, 3) uint8, as predicted on."""

    def overlay(self) -> np.ndarray:
        """The image with the classes in colour over it, (H, W, 3) uint8."""
        return overlay(self.image, self.ids)


class LoadedModel:
    """A trained model with its class names: `predict` takes images as they are."""

    def __init__(self, model: SegmentationModel, spaces: Mapping[str, LabelSpace]) -> None:
        self.model = model.eval()
        self.spaces = spaces
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model.to(self.device)

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names of the first branch in output order."""
        return next(iter(self.spaces.values())).names

    @torch.no_grad()
    def predict(
        self, image: str | Path | np.ndarray | Image.Image | Tensor, *, branch: str | None = None
    ) -> Prediction:
        """Classify every pixel at the image's own size.

        Args:
            image: a path, a PIL image, or (H, W, 3) uint8 RGB.
            branch: which branch; default the first.

        Raises:
            DataError: the file is not a readable image.
        """
        branch = branch or next(iter(self.spaces))
        pixels = _pixels(image)
        batch = torch.from_numpy(np.array(pixels, order="C")).permute(2, 0, 1)[None].to(self.device)
        logits = self.model(normalise(batch), (branch,))[branch].logits
        ids = predict_ids(logits, (pixels.shape[0], pixels.shape[1]))[0].cpu().numpy()
        return Prediction(ids, self.spaces[branch].names, pixels)


def _pixels(image: str | Path | np.ndarray | Image.Image | Tensor) -> np.ndarray:
    if isinstance(image, str | Path):
        return read_image(Path(image))
    if isinstance(image, Tensor):
        image = image.cpu().numpy()
    if isinstance(image, Image.Image):
        image = np.asarray(image.convert("RGB"))
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise DataError(f"predict wants an (H, W, 3) uint8 RGB image, got {image.shape} {image.dtype}")
    return image


def load(path: str | Path, *, step: int | None = None, builder: Any = None) -> LoadedModel:
    """Load a trained model: from a run folder (its last step), or from a finished step's folder.

    Args:
        step: which step of a run; default the last.
        builder: your own architecture's builder, if the model is not a built-in one. Never imported by itself.

    Raises:
        CheckpointError: missing, damaged, or not a model of everseg.
    """
    path = Path(path)
    if (path / "run.json").is_file():
        folder = RunFolder(path)
        return LoadedModel(*folder.load_final(folder.chosen_step(step), builder)[:2])
    if (path / "final").is_dir():
        path = path / "final"
    if not (path / "classes.json").is_file():
        raise CheckpointError(f"{path} holds no model: give a run folder, or a step's `final` folder")
    verify(path)
    return LoadedModel(*load_model(path, builder))


def predict(
    run_path: str | Path,
    paths: Iterable[str | Path],
    out: str | Path,
    *,
    step: int | None = None,
    builder: Any = None,
) -> list[tuple[Path, Path]]:
    """Predict images and folders of images; write id masks and overlays.

    Args:
        step: which step of a run; default the last.
        builder: your own architecture's builder, if the model is not a built-in one.

    Returns:
        (mask, overlay) of each image. Masks hold train ids; `classes.json` beside them names the ids.

    Raises:
        ConfigError: a result would overwrite an image given. (Results of an earlier call are replaced.)
        DataError: no image found, or every unreadable one listed, before anything is written.
    """
    model = load(run_path, step=step, builder=builder)
    files: list[tuple[Path, Path]] = []
    missing = []
    for path in map(Path, paths):
        if path.is_dir():
            found = sorted(
                p
                for p in path.rglob("*")
                if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith(".")
            )
            files += [(p, p.relative_to(path).with_suffix("")) for p in found]
        elif path.is_file():
            files.append((path, Path(path.stem)))
        else:
            missing.append(str(path))
    if missing:
        raise DataError(f"no such image or folder: {', '.join(missing)}")
    if not files:
        raise DataError(f"no image ({', '.join(sorted(IMAGE_SUFFIXES))}) in the folders given")
    stems = [stem for _, stem in files]
    twice = sorted({str(stem) for stem in stems if stems.count(stem) > 1})
    if twice:
        raise DataError(
            f"several images would be written to one name: {', '.join(twice)}; predict them separately"
        )
    out = Path(out)
    results = {(out / f"{stem}_{kind}.png").resolve() for stem in stems for kind in ("mask", "overlay")}
    if inputs := [str(path) for path, _ in files if path.resolve() in results]:
        raise ConfigError(
            f"--out {out}: the results would overwrite images given to predict: {', '.join(inputs)}; "
            "give another folder"
        )
    bad = []
    for path, _ in files:
        try:
            read_image(path)
        except DataError as error:
            bad.append(str(error))
    if bad:
        raise DataError("\n  ".join([f"{len(bad)} unreadable images; nothing was written:", *bad]))
    written = []
    for path, stem in files:
        prediction = model.predict(path)
        written.append(write_prediction(out / stem, prediction.ids, prediction.image))
    write_json(out / "classes.json", {str(i): name for i, name in enumerate(model.classes)})
    return written
