"""Prediction with a trained model: load it, predict images, write masks and overlays."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from everseg.data.batches.extra import ENDING, read_map
from everseg.data.batches.transforms import normalise, resize_nearest, resize_transform
from everseg.data.channels import picture_of
from everseg.data.class_colours import overlay, palette, png
from everseg.data.datasets.decode import read_image
from everseg.data.datasets.listing import files_to_predict
from everseg.display import Picture, Piece, Result, counted, escaped, figure, share, size
from everseg.errors import ConfigError, DataError, some
from everseg.files import real_path
from everseg.inference.for_tools import MASKS, writer_of
from everseg.inference.onnx_files import OnnxFiles
from everseg.inference.pictures import shrink, write_prediction
from everseg.inference.windows import infer_sliding_branch, sliding_ids
from everseg.labels import LabelSpace
from everseg.losses.reading import read_ids
from everseg.losses.readout import merged_outputs, small_values
from everseg.models.branch_choice import infer_branch
from everseg.models.model import SegmentationModel
from everseg.progress import Progress, counting
from everseg.runs.commit import verify, write_json
from everseg.runs.input_form import InputForm, Windows
from everseg.runs.model_folder import WEIGHTS, load_model, read_model_file
from everseg.runs.place import model_folder_at
from everseg.runs.run_folder import RunFolder
from everseg.runs.signature import require_signature as signed
from everseg.types import SegOutput

MASK_IDS = "classes.json"
"""File beside predicted masks: id -> class name. Model folders have a file of this name with other contents."""

LARGE = 16_000_000
"""Pixels of an image that is told of before it is seen whole."""
LEAST_WINDOW = 64
"""Least side of a window that can be asked for, in pixels."""
_PROBE = 128
"""Side of the image that tells how much memory the network takes."""
_SIDE = 640
"""Longest side of a picture in a notebook, in pixels."""
_PICTURES = 12
"""Largest number of overlays shown in a notebook."""


@dataclass(frozen=True, repr=False, eq=False)
class Prediction(Result):
    """The predicted class of every pixel of one image. A notebook shows the classes over the image."""

    ids: np.ndarray
    """(H, W) train ids, uint8; uint16 where the branch has more than 255 outputs."""
    classes: tuple[str, ...]
    """Name of each train id."""
    image: np.ndarray
    """(H, W, 3) uint8, as given; of other channels the picture that `channels.shown` states."""
    branch: str
    """Branch that predicted the image."""
    background: int | None
    """Train id of the background; None if the branch has none."""

    def overlay(self) -> np.ndarray:
        """Draw the classes in colour over the image, (H, W, 3) uint8."""
        return overlay(self.image, self.ids, background=self.background)

    @property
    def shares(self) -> dict[str, float]:
        """Class -> share of the pixels, largest first. Classes without a pixel are left out."""
        counts = np.bincount(self.ids.ravel(), minlength=len(self.classes)) / max(1, self.ids.size)
        order = np.argsort(-counts, kind="stable")
        return {self.classes[i]: float(counts[i]) for i in order.tolist() if counts[i] > 0}

    def shown(self) -> Iterator[Piece]:
        height, width = self.ids.shape
        each = ", ".join(f"{name} {share(part)}" for name, part in self.shares.items())
        yield f"{width}x{height} pixels: {each}"

    def to_json(self) -> dict[str, Any]:
        """Return size, branch and shares. The ids are left out; they are an array."""
        return {
            "height": self.ids.shape[0],
            "width": self.ids.shape[1],
            "branch": self.branch,
            "shares": self.shares,
        }

    def _repr_png_(self) -> bytes:
        return png(Image.fromarray(shrink(self.overlay(), _SIDE, _SIDE)))

    def _repr_html_(self) -> str:
        """Show the overlay and a legend of its colours."""
        shades = palette(len(self.classes), background=self.background).tolist()
        colours = dict(zip(self.classes, shades, strict=True))
        legend = " ".join(
            f'<span style="white-space: nowrap"><span style="background: rgb{tuple(colours[name])}; display: '
            f'inline-block; width: 1em; height: 1em"></span> {escaped(name)} {share(part)}</span>'
            for name, part in self.shares.items()
        )
        height, width = self.ids.shape
        return f"{Picture(self._repr_png_, f'{width}x{height} pixels')._repr_html_()}<p>{legend}</p>"


class WrittenPrediction(NamedTuple):
    """The files written for one image."""

    mask: Path
    """PNG of train ids."""
    overlay: Path
    """PNG of the image with the classes in colour over it."""


@dataclass(frozen=True, repr=False)
class Predictions(Result, Sequence[WrittenPrediction]):
    """Masks and overlays of several images, in order. A notebook shows the overlays."""

    out: Path
    """Folder of the masks and overlays. Its file `classes.json` names the ids."""
    files: tuple[WrittenPrediction, ...]
    branches: Mapping[str, str]
    """Name of an image below `out`, without its ending -> branch that predicted it."""
    notes: tuple[str, ...] = ()
    """Which files of the folders were left out, and why."""
    format: str = MASKS
    """The form that was asked for. Only masks have `files`."""
    made: tuple[Path, ...] = ()
    """What was written in another form."""

    @overload
    def __getitem__(self, at: int) -> WrittenPrediction: ...
    @overload
    def __getitem__(self, at: slice) -> tuple[WrittenPrediction, ...]: ...
    def __getitem__(self, at: int | slice) -> WrittenPrediction | tuple[WrittenPrediction, ...]:
        return self.files[at]

    def __len__(self) -> int:
        return len(self.files)

    def shown(self) -> Iterator[Piece]:
        if self.format != MASKS:
            names = some([str(path) for path in self.made], 4)
            yield f"{counted(len(self.branches), 'image')} for {self.format}: {names}"
            return
        yield f"masks and overlays of {counted(len(self), 'image')} in {self.out}; {MASK_IDS} there names the ids"
        for name, written in list(zip(self.branches, self.files, strict=True))[:_PICTURES]:
            yield Picture(partial(_reduced, written.overlay), name)

    def to_json(self) -> dict[str, Any]:
        if self.format != MASKS:
            images: list[dict[str, Any]] = [
                {"image": name, "branch": branch} for name, branch in self.branches.items()
            ]
            made = {"format": self.format, "made": [str(path) for path in self.made]}
            return {"out": str(self.out), "images": images, **made, "notes": list(self.notes)}
        return {
            "out": str(self.out),
            "images": [
                {"image": name, "mask": str(written.mask), "overlay": str(written.overlay), "branch": branch}
                for (name, branch), written in zip(self.branches.items(), self.files, strict=True)
            ],
            "notes": list(self.notes),
        }


def _reduced(path: Path) -> bytes:
    """Return a PNG of the picture at `path`, shrunk to the size shown in a notebook."""
    with Image.open(path) as picture:
        return png(Image.fromarray(shrink(np.asarray(picture.convert("RGB")), _SIDE, _SIDE)))


class LoadedModel:
    """A trained model with its class names. `predict` takes unprepared images."""

    def __init__(
        self,
        model: SegmentationModel,
        spaces: Mapping[str, LabelSpace],
        form: InputForm | None = None,
        branch_of: Mapping[str, str] | None = None,
    ) -> None:
        self.model = model.eval()
        self.spaces = spaces
        self.form = form or InputForm()
        self.path: Path | None = None
        """Folder that the model was loaded from."""
        self.onnx: OnnxFiles | None = None
        """The ONNX files that give its outputs; None = PyTorch does."""
        self.windows: Windows | None = self.form.windows()
        """The windows through which it sees an image; None = at once."""
        self.branch_of = {**{branch: branch for branch in spaces}, **(branch_of or {})}
        """Name that `predict` accepts -> branch. The names are the branches and the domains that use them."""
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model.to(self.device)

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names of the first branch, in output order."""
        return next(iter(self.spaces.values())).names

    def check_branch(self, domain: str | None, infer_domain: bool = False) -> None:
        """Raise a ConfigError if it is unclear which branch should predict the images."""
        names = ", ".join(self.branch_of)
        if domain is not None and domain not in self.branch_of:
            raise ConfigError(f"--domain {domain}: the model has the branches {names}")
        if domain is not None and infer_domain:
            raise ConfigError("--domain and --infer-domain exclude each other")
        if domain is None and not infer_domain and len(self.spaces) > 1:
            raise ConfigError(f"the model has the branches {names}: give --domain NAME or --infer-domain")

    def check_alone(self) -> None:
        """Raise a ConfigError if the network needs more of an image than its pixels.

        Who takes images alone asks this before the first of them is read.
        """
        if names := ", ".join(self.model.reads_extra):
            raise ConfigError(
                f"this model needs {names} of every image, and serve and diff take images alone; everseg predict takes "
                "them (--extra NAME=DIR), and everseg eval RUN scores the model on a data set that has them "
                "(data=DATA.yaml data.extra.NAME=DIR)"
            )

    def see_through(self, side: int) -> None:
        """See every image through windows of `side` pixels, so that memory does not grow with the image.

        Raises:
            ConfigError: the side is below `LEAST_WINDOW`, or the model sees every image at one size.
        """
        if side < LEAST_WINDOW:
            raise ConfigError(f"--window {side}: expected {LEAST_WINDOW} pixels or more")
        if self.resized_to is not None:
            height, width = self.resized_to
            raise ConfigError(
                f"--window {side}: the model sees every image at {width}x{height} pixels, so none takes more memory "
                "than another; leave it out"
            )
        self.windows = Windows(side, self.form.overlap, 1)

    @torch.no_grad()
    def memory_of(self, pixels: int, branch: str | None = None) -> int | None:
        """Estimate the bytes that the network needs to see a whole image of so many pixels; None = it cannot be told.

        A small image of noise goes through the network, and the layer with the largest inputs and outputs counts, as if
        everything grew with the image. What other layers keep meanwhile is not counted: a DeepLabV3-like network took
        1.6 times as much.
        """
        if self.onnx is not None or self.model.reads_extra:
            return None
        most = 0

        def bytes_of(values: Any) -> int:
            if isinstance(values, Tensor):
                return values.numel() * values.element_size()
            return sum(map(bytes_of, values)) if isinstance(values, tuple | list) else 0

        def look(_: Any, given: Any, made: Any) -> None:
            nonlocal most
            most = max(most, bytes_of(given) + bytes_of(made))

        hooks = [one.register_forward_hook(look) for one in self.model.modules() if not list(one.children())]
        channels = 3 if self.form.channels is None else len(self.form.channels)
        try:
            noise = torch.randint(0, 256, (1, channels, _PROBE, _PROBE)).to(torch.uint8)
            self.see(noise.to(self.device), branch or next(iter(self.spaces)))
        except Exception:  # another library's network may refuse an image in any way
            return None
        finally:
            for hook in hooks:
                hook.remove()
        return most * pixels // _PROBE**2

    def check_extra(self, given: Collection[str], infer_domain: bool = False) -> None:
        """Raise a ConfigError unless `given` are the further maps that the network needs of every image."""
        needed = self.model.reads_extra
        if missing := [name for name in needed if name not in given]:
            raise ConfigError(
                f"this model needs {', '.join(missing)} of every image: give "
                f"{' '.join(f'--extra {name}=DIR' for name in missing)}, a folder with one picture of one channel for "
                "each image, of the image's name and size"
            )
        if unread := [name for name in given if name not in needed]:
            reads = ", ".join(needed) or "nothing beside the image"
            raise ConfigError(f"--extra {', '.join(unread)}: this model reads {reads}; leave it out")
        if needed and self.windows is not None:
            raise ConfigError(
                f"the model predicts by windows, and its network reads {', '.join(needed)} of whole images; leave "
                "--window out, or train with data.evaluation=whole or crop"
            )
        if needed and infer_domain:
            raise ConfigError("--infer-domain and --extra exclude each other; give --domain NAME")

    @torch.no_grad()
    def predict(
        self,
        image: Any,
        *,
        branch: str | None = None,
        infer_domain: bool = False,
        extra: Mapping[str, np.ndarray] | None = None,
    ) -> Prediction:
        """Classify every pixel of an image at its original size.

        Args:
            image: anything that `everseg.data.datasets.decode.read_image` accepts: a path, bytes, a Pillow image, or an
                array (H, W, 3) uint8 RGB. A model of other channels takes one file or array that holds all of them.
            branch: name of a branch, or of a domain that uses it; default the first branch.
            infer_domain: choose the branch by what the images of the domains look like (`models.branch_choice`).
            extra: further maps that the network reads, such as proposals: name -> (H, W) whole numbers, of the image's
                size.

        Raises:
            ConfigError: there is no such branch, or there are no statistics for the choice, or `extra` lacks a map
                that the network reads, or has one that it does not.
            DataError: the file is not a readable image, or a map has another size, or other values.
        """
        extra = {name: np.asarray(values) for name, values in (extra or {}).items()}
        self.check_extra(extra, infer_domain)
        pixels = read_image(image, self.form.reading)
        size = (pixels.shape[0], pixels.shape[1])
        for name, values in extra.items():
            if values.shape != size:
                raise DataError(
                    f"{name} of {'x'.join(map(str, values.shape[::-1]))} pixels for an image of "
                    f"{size[1]}x{size[0]}; both need the same size"
                )
            if values.dtype.kind not in "bui":
                raise DataError(
                    f"{name} of type {values.dtype}: give whole numbers, such as those of a PNG file"
                )
        if self.resized_to is None:
            batch = np.array(pixels.transpose(2, 0, 1), order="C")  # (3, H, W)
        else:
            batch, _ = resize_transform(pixels, np.zeros(pixels.shape[:2], np.uint8), size=self.resized_to)
        on_device = torch.from_numpy(batch).to(self.device)
        if infer_domain:
            branch = self._infer(on_device)
        else:
            branch = next(iter(self.spaces)) if branch is None else self.branch_of.get(branch, branch)
        ids = self._ids(on_device, branch, size, extra)
        picture = picture_of(pixels, self.form.channels)
        space = self.spaces[branch]
        return Prediction(_stored(ids.cpu().numpy()), space.names, picture, branch, space.background)

    def _ids(
        self, image: Tensor, branch: str, size: tuple[int, int], maps: Mapping[str, np.ndarray]
    ) -> Tensor:
        """Predict the classes of an image.

        Args:
            image: (3, h, w) uint8 of the network's input size.
            size: (H, W) of the image as given.
            maps: further maps that the network reads, (H, W).

        Returns:
            (H, W) train ids.
        """
        read = {"extra": {name: self._as_input(values) for name, values in maps.items()}} if maps else {}

        readout, windows = self.model.readout, self.windows
        if self.onnx is not None and (readout.merge or readout.residual):
            # Outputs that are no class are read inside of the graph, so only its mask is complete.
            if windows is not None:
                raise ConfigError(
                    "--precision: this model predicts window by window and combines outputs that an ONNX file does "
                    "not give; leave --precision out"
                )
            return self.onnx.ids(image, branch, size)
        if windows is not None:
            return sliding_ids(
                lambda part: small_values(self.see(part, branch, **read), readout), image, windows,
                merged_outputs(readout),
            )  # fmt: skip
        output = self.see(image[None], branch, **read)
        if readout.regions:  # each pixel of the image as given looks its region up
            whole = {readout.regions: self._on_device(maps[readout.regions])}
            output = output._replace(features={**output.features, **whole})
        return read_ids(output, readout, size)[0]

    def see(self, image: Tensor, branch: str, **read: Any) -> SegOutput:
        """Run the network, or its ONNX file, on images (B, 3, h, w) of its input size, as they are stored."""
        if self.onnx is not None:
            return SegOutput(self.onnx.logits(image, branch), {})
        output: SegOutput = self.model(self._normalised(image), (branch,), **read)[branch]
        return output

    @property
    def resized_to(self) -> tuple[int, int] | None:
        """(H, W) that every image is resized to; None if images keep their own size."""
        return (self.onnx.one_size if self.onnx is not None else None) or self.form.resized_to

    def _as_input(self, values: np.ndarray) -> Tensor:
        """Bring a further map to the network's input size, as the pipeline of the data does: (1, h, w)."""
        if self.resized_to is not None:
            values = resize_nearest(values, *self.resized_to)
        return self._on_device(values)

    def _on_device(self, values: np.ndarray) -> Tensor:
        return torch.from_numpy(values.astype(np.int64))[None].to(self.device)

    def _infer(self, image: Tensor) -> str:
        if self.onnx is not None:
            raise ConfigError(
                "--infer-domain reads statistics of the PyTorch model; name the domain (--domain), or leave "
                "--precision out"
            )
        if self.windows is not None:
            return infer_sliding_branch(self.model, self._normalised, image, self.windows)
        return infer_branch(self.model, self._normalised(image[None]))[0]

    def _normalised(self, image: Tensor) -> Tensor:
        return normalise(image, self.form.normalisation, self.form.channels)


def _stored(ids: np.ndarray) -> np.ndarray:
    """Train ids in the type that masks are written in: uint8, or uint16 above 255 outputs."""
    return ids if ids.dtype == np.uint8 else ids.astype(np.uint16)


def _check_maps(folders: Mapping[str, Path], stems: Sequence[Path]) -> None:
    """Raise a DataError that names the maps missing below `folders`, before any image is predicted."""
    problems = []
    for name, folder in folders.items():
        files = [folder / f"{stem}{ENDING}" for stem in stems]
        if absent := [str(file) for file in files if not file.is_file()]:
            problems.append(
                f"--extra {name}: {counted(len(absent), 'image', 'has', 'have')} no map: {some(absent, 5)}"
            )
    if problems:
        raise DataError("\n  ".join(problems))


def _said_of_large(model: LoadedModel, images: Sequence[Path], domain: str | None) -> str:
    """What is told before large images are seen whole: the memory that takes, and what takes less; "" = nothing."""
    if model.windows is not None or model.resized_to is not None:
        return ""
    sizes = {image: pixels for image in images if (pixels := _pixels(image)) > LARGE}
    if not sizes:
        return ""
    largest = max(sizes, key=lambda image: sizes[image])
    needed = model.memory_of(sizes[largest], None if domain is None else model.branch_of[domain])
    takes = "" if needed is None else f", for which the network alone needs at least {size(needed)} of memory"
    way = "" if model.model.reads_extra else (
        "; --window 1024 sees it in parts and needs far less, with another class at some pixels"
    )  # fmt: skip
    return (
        f"{counted(len(sizes), 'image')} above {LARGE // 1_000_000} megapixels; the largest, {largest}, has "
        f"{figure(sizes[largest] / 1e6)}{takes}{way}"
    )


def _pixels(image: Path) -> int:
    """Number of pixels that an image's header states; 0 where it does not."""
    with (
        contextlib.suppress(OSError, ValueError, SyntaxError, Image.DecompressionBombError),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        with Image.open(image) as picture:
            return picture.width * picture.height
    return 0


def load(
    path: str | Path,
    *,
    step: int | None = None,
    builder: Any = None,
    precision: str | None = None,
    require_signature: str | Path | None = None,
    kind: type[LoadedModel] = LoadedModel,
) -> LoadedModel:
    """Load a trained model from a run folder (its last step) or from the folder of a finished step.

    Args:
        step: which step of a run; default the last.
        precision: predict with a bundle's ONNX file of this precision ("fp32", "fp16", "int8"); None = with PyTorch.
        require_signature: file of the public key that must have signed the bundle (`everseg sign`).
        builder: the builder of your own architecture, if the model is not a built-in one. It is never imported
            automatically.
        kind: the class of the returned object, if it should be a subclass of `LoadedModel`.

    Raises:
        CheckpointError: the model is missing, damaged, not a model of everseg, or not signed with the key.
        ConfigError: there is no ONNX file of that precision, or a step of what is no run is asked for.
    """
    path = Path(path)
    # Everything is read through the manifest that was signed, so that nobody can change a file after the check.
    committed = None if require_signature is None else signed(path, require_signature)
    onnx = None if precision is None else OnnxFiles.of_bundle(path, precision, committed)
    folder = RunFolder(path)
    if committed is None and folder.is_begun:
        index = folder.chosen_step(step)
        form = folder.about(index).form
        return kind(*folder.load_final(index, builder)[:2], form, folder.branch_of(index))
    if committed is None:
        path = model_folder_at(path)
    if step is not None:
        raise ConfigError(f"--step {step}: {path} is one model, not a run of several steps; leave --step out")
    if committed is None:
        verify(path)
        model, about = load_model(path, builder)
    else:
        about = read_model_file(path, committed)
        model, about = load_model(path, builder, about, committed.read(WEIGHTS), committed)
    loaded = kind(model, about.spaces, about.form, about.domains)
    loaded.path = path
    if onnx is not None:
        loaded.onnx, loaded.device = onnx, torch.device("cpu")
        model.to(loaded.device)
    return loaded


def predict(
    path: str | Path,
    images: Iterable[str | Path],
    out: str | Path,
    *,
    step: int | None = None,
    builder: Any = None,
    domain: str | None = None,
    infer_domain: bool = False,
    extra: Mapping[str, str | Path] | None = None,
    precision: str | None = None,
    require_signature: str | Path | None = None,
    format: str = MASKS,
    window: int | None = None,
    quiet: bool = False,
) -> Predictions:
    """Predict images and folders of images. Write id masks and overlays.

    Args:
        path: run folder, a finished step's folder, or a bundle.
        images: files, and folders of images.
        out: folder for masks and overlays; created if it does not exist.
        step: which step of a run; default the last.
        domain: the branch for all images; required if the model has several.
        infer_domain: choose the branch of every image (`models.branch_choice`). The file `domains.json`
            beside the masks lists the choices.
        extra: further maps that the network reads, such as proposals: name -> folder with a map `NAME.png` for each
            image, below it as the image lies below the folder given; one channel, of the image's size.
        builder: the builder of your own architecture, if the model is not a built-in one.
        precision: as for `load`.
        require_signature: as for `load`.
        format: "masks" (id masks and overlays), or what a labelling tool or a map takes instead: "cvat", "coco",
            "labelstudio", "geotiff" (`everseg.inference.for_tools`).
        window: see every image through overlapping windows of this side in pixels, whose mean logits count; None = as
            the model saw images in training. Memory no longer grows with the image then. A network that looks at the
            whole image for every pixel gives other classes at some.
        quiet: print no progress.

    Returns:
        The files of each image, and notes about the files that were left out. Masks hold train ids. The file MASK_IDS
        beside them names the ids, separately for each branch if `infer_domain` is set.

    Raises:
        ConfigError: the model has several branches, and `domain` is missing or unknown; or `extra` is not what the
            network reads; or a result would overwrite an input image. (Results of an earlier call are replaced.)
        DataError: no image is found, or some cannot be read; the message lists all of them. If their headers show it,
            nothing is written. Damage behind a sound header is found when the image is decoded; the results of all
            others are then written.
    """
    model = load(path, step=step, builder=builder, precision=precision, require_signature=require_signature)
    if window is not None:
        model.see_through(window)
    folders = {name: real_path(Path(folder).expanduser()) for name, folder in (extra or {}).items()}
    model.check_extra(folders, infer_domain)
    model.check_branch(domain, infer_domain)
    out = Path(out)
    written, taken, damaged = [], {}, []
    files, left_out = files_to_predict(images, out, model.form.reading)
    writer = None
    if format != MASKS:
        chosen = (
            model.spaces
            if infer_domain
            else [next(iter(model.spaces)) if domain is None else model.branch_of[domain]]
        )
        writer = writer_of(format, out, [model.spaces[branch] for branch in chosen], files)
    _check_maps(folders, [stem for _, stem in files])
    if said := _said_of_large(model, [image for image, _ in files], domain):
        Progress(quiet=quiet).message(said)
    with counting("predicting", quiet=quiet) as advance:
        for number, (image, stem) in enumerate(files):
            try:
                maps = {name: read_map(folder, f"{stem}{ENDING}") for name, folder in folders.items()}
                prediction = model.predict(image, branch=domain, infer_domain=infer_domain, extra=maps)
            except DataError as error:
                damaged.append(str(error))
            else:
                if writer is None:
                    results = write_prediction(
                        out / stem, prediction.ids, prediction.image, background=prediction.background
                    )
                    written.append(WrittenPrediction(*results))
                else:
                    name = stem.with_name(stem.name + image.suffix).as_posix()
                    writer.add(name, prediction.ids, prediction.classes, image)
                taken[stem.as_posix()] = prediction.branch
            advance(number + 1, len(files))
    if not taken:
        raise DataError(
            "\n  ".join([f"{counted(len(damaged), 'unreadable image')}; nothing was written:", *damaged])
        )
    used = dict.fromkeys(taken.values())
    names = {b: {str(i): name for i, name in enumerate(model.spaces[b].names)} for b in used}
    made = () if writer is None else tuple(writer.finish())
    if infer_domain:
        write_json(out / "domains.json", taken)
    if writer is None:
        write_json(out / MASK_IDS, names if infer_domain else names[next(iter(used))])
    if damaged:
        head = f"{counted(len(damaged), 'unreadable image')}; the other {len(taken)} are written to {out}:"
        raise DataError("\n  ".join([head, *damaged, *left_out]))
    return Predictions(out, tuple(written), taken, tuple(left_out), format, made)
