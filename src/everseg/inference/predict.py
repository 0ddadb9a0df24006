"""A trained model at work: load it, predict images, write masks and overlays."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from everseg.data.batches.transforms import normalise, resize_transform
from everseg.data.datasets.decode import read_image
from everseg.data.datasets.listing import _checked_files
from everseg.errors import ConfigError
from everseg.inference.pictures import overlay, write_prediction
from everseg.inference.windows import infer_sliding_branch, sliding_ids
from everseg.labels import LabelSpace
from everseg.losses.argmax import predict_ids
from everseg.models.branch_choice import infer_branch
from everseg.models.model import SegmentationModel
from everseg.runs.commit import verify, write_json
from everseg.runs.folder import RunFolder
from everseg.runs.input_form import InputForm
from everseg.runs.model_folder import load_model, model_folder_at

MASK_IDS = "classes.json"
"""File beside predicted masks: id -> class name. A model folder has a file of the same name that is another thing."""


@dataclass(frozen=True)
class Prediction:
    """Classes of one image's pixels."""

    ids: np.ndarray
    """(H, W) uint8 train ids."""
    classes: tuple[str, ...]
    """Name of each train id."""
    image: np.ndarray
    """(H, W, 3) uint8, as given."""
    branch: str
    """Path the image went through."""

    def overlay(self) -> np.ndarray:
        """The image with the classes in colour over it, (H, W, 3) uint8."""
        return overlay(self.image, self.ids)


class LoadedModel:
    """A trained model with its class names: `predict` takes images as they are."""

    def __init__(
        self,
        model: SegmentationModel,
        spaces: Mapping[str, LabelSpace],
        form: InputForm | None = None,
        paths: Mapping[str, str] | None = None,
    ) -> None:
        self.model = model.eval()
        self.spaces = spaces
        self.form = form or InputForm()
        self.path: Path | None = None
        """Folder it was loaded from."""
        self.paths = {**{branch: branch for branch in spaces}, **(paths or {})}
        """Names that `predict` takes for a path -> branch: the branches, and the domains that go through them."""
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model.to(self.device)

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names of the first branch in output order."""
        return next(iter(self.spaces.values())).names

    def check_path(self, domain: str | None, infer_domain: bool = False) -> None:
        """Raise a ConfigError where it is not clear which path images take."""
        paths = ", ".join(self.paths)
        if domain is not None and domain not in self.paths:
            raise ConfigError(f"--domain {domain}: the model has the paths {paths}")
        if domain is not None and infer_domain:
            raise ConfigError("--domain and --infer-domain exclude each other")
        if domain is None and not infer_domain and len(self.spaces) > 1:
            raise ConfigError(f"the model has the paths {paths}: give --domain NAME or --infer-domain")

    @torch.no_grad()
    def predict(
        self,
        image: Any,
        *,
        branch: str | None = None,
        infer_domain: bool = False,
    ) -> Prediction:
        """Classify every pixel at the image's own size.

        Args:
            image: anything that `everseg.data.datasets.decode.read_image` takes: a path, bytes, a Pillow image, or an
                array (H, W, 3) uint8 RGB.
            branch: which path: its name, or that of a domain that goes through it; default the first.
            infer_domain: choose the path from the domains' batch-norm statistics.

        Raises:
            ConfigError: no such path, or no statistics to choose by.
            DataError: the file is not a readable image.
        """
        pixels = read_image(image, self.form.reading)
        if self.form.resized_to is None:
            batch = np.array(pixels.transpose(2, 0, 1), order="C")
        else:
            batch, _ = resize_transform(
                pixels, np.zeros(pixels.shape[:2], np.uint8), size=self.form.resized_to
            )
        on_device = torch.from_numpy(batch).to(self.device)
        if infer_domain:
            branch = self._infer(on_device)
        else:
            branch = next(iter(self.spaces)) if branch is None else self.paths.get(branch, branch)
        ids = self._ids(on_device, branch, (pixels.shape[0], pixels.shape[1]))
        return Prediction(ids.cpu().numpy(), self.spaces[branch].names, pixels, branch)

    def _ids(self, image: Tensor, branch: str, size: tuple[int, int]) -> Tensor:
        """Classes (H, W) of an image (3, h, w) uint8 as the network is shown it."""

        def see(part: Tensor) -> Tensor:
            return self.model(self._normalised(part), (branch,))[branch].logits

        if (windows := self.form.windows()) is not None:
            return sliding_ids(see, image, windows)
        return predict_ids(see(image[None]), size)[0]

    def _infer(self, image: Tensor) -> str:
        if (windows := self.form.windows()) is not None:
            return infer_sliding_branch(self.model, self._normalised, image, windows)
        return infer_branch(self.model, self._normalised(image[None]))[0]

    def _normalised(self, image: Tensor) -> Tensor:
        return normalise(image, self.form.normalisation)


def load(
    path: str | Path,
    *,
    step: int | None = None,
    builder: Any = None,
    kind: type[LoadedModel] = LoadedModel,
) -> LoadedModel:
    """Load a trained model: from a run folder (its last step), or from a finished step's folder.

    Args:
        step: which step of a run; default the last.
        builder: your own architecture's builder, if the model is not a built-in one. Never imported by itself.
        kind: the class of what is returned, where that can do more than a `LoadedModel`.

    Raises:
        CheckpointError: missing, damaged, or not a model of everseg.
    """
    path = Path(path)
    folder = RunFolder(path)
    if folder.is_begun:
        index = folder.chosen_step(step)
        form = folder.about(index).form
        return kind(*folder.load_final(index, builder)[:2], form, folder.paths(index))
    path = model_folder_at(path)
    verify(path)
    model, about = load_model(path, builder)
    loaded = kind(model, about.spaces, about.form, about.domains)
    loaded.path = path
    return loaded


def predict(
    run_path: str | Path,
    paths: Iterable[str | Path],
    out: str | Path,
    *,
    step: int | None = None,
    builder: Any = None,
    domain: str | None = None,
    infer_domain: bool = False,
) -> list[tuple[Path, Path]]:
    """Predict images and folders of images; write id masks and overlays.

    Args:
        step: which step of a run; default the last.
        domain: the path all images take; needed where the model has several.
        infer_domain: choose the path of every image from the domains' batch-norm statistics; `domains.json` beside
            the masks names them.
        builder: your own architecture's builder, if the model is not a built-in one.

    Returns:
        (mask, overlay) of each image. Masks hold train ids; the file MASK_IDS beside them names the ids (per path
        where several were taken).

    Raises:
        ConfigError: no path or an unknown one given for a model that has several; a result would overwrite an
            image given. (Results of an earlier call are replaced.)
        DataError: no image found, or every unreadable one listed, before anything is written.
    """
    model = load(run_path, step=step, builder=builder)
    model.check_path(domain, infer_domain)
    out = Path(out)
    files = _checked_files(paths, out)
    written, taken = [], {}
    for path, stem in files:
        prediction = model.predict(path, branch=domain, infer_domain=infer_domain)
        written.append(write_prediction(out / stem, prediction.ids, prediction.image))
        taken[stem.as_posix()] = prediction.branch
    used = dict.fromkeys(taken.values())
    names = {b: {str(i): name for i, name in enumerate(model.spaces[b].names)} for b in used}
    if infer_domain:
        write_json(out / "domains.json", taken)
    write_json(out / MASK_IDS, names if infer_domain else names[next(iter(used))])
    return written
