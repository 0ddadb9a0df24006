"""What the command line calls, and the same words in Python (floor 6)."""

from __future__ import annotations

import itertools
import json
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from everseg import registry
from everseg.config import RunConfig
from everseg.config_loading import load as load_config
from everseg.config_loading import to_json
from everseg.data.datasets import load_dataset
from everseg.data.datasets.files import read_image
from everseg.data.index import class_counts
from everseg.data.transforms import normalise
from everseg.engine.checkpoint import read_json, save_folder, verify
from everseg.engine.evaluate import predict_ids
from everseg.engine.folder import RunFolder, load_model
from everseg.engine.pictures import overlay, write_prediction
from everseg.engine.progress import Progress
from everseg.engine.run import execute, prepare, score_step
from everseg.engine.runtime import make_accelerator
from everseg.errors import CheckpointError, ConfigError, DataError
from everseg.labels import LabelSpace, policy_set
from everseg.metrics import sequence_scores
from everseg.scenarios.steps import Source
from everseg.scenarios.summary import summarise


@dataclass(frozen=True)
class Run:
    """A run on disk: every number derives from the counts its steps stored."""

    folder: RunFolder

    @property
    def path(self) -> Path:
        """The run's folder."""
        return self.folder.path

    @cached_property
    def config(self) -> RunConfig:
        return self.folder.config()

    @cached_property
    def steps(self) -> list[dict[str, Any]]:
        """Scores of each finished step (fractions in [0, 1], None where undefined)."""
        rows = []
        for index in self.folder.finished_steps:
            for branch, scores in read_json(self.folder.step(index) / "metrics.json")["branches"].items():
                names = scores["classes"]
                rows.append(
                    {
                        "index": index,
                        "branch": branch,
                        "classes": [name for name in scores["new_classes"] if name != "background"],
                        **{k: v for k, v in scores.items() if k not in ("classes", "new_classes")},
                        "class_iou": dict(zip(names, scores["class_iou"], strict=True)),
                        "class_accuracy": dict(zip(names, scores["class_accuracy"], strict=True)),
                    }
                )
        return rows

    def table(self) -> list[dict[str, Any]]:
        """One row per step: index, new classes, and mIoU in percent, with and without background."""
        rows = []
        for step in self.steps:
            row: dict[str, Any] = {"step": step["index"], "new classes": ", ".join(step["classes"])}
            for suffix, key in (("", "miou"), (" (no background)", "miou_without_background")):
                for group in ("old", "new", "base", "all"):
                    value = step[key][group]
                    row[group + suffix] = None if value is None else round(100 * value, 2)
            rows.append(row)
        return rows

    @cached_property
    def sequence(self) -> dict[str, Any]:
        """Average over steps, forgetting and backward transfer."""
        indices = self.folder.finished_steps
        if not indices:
            return {}
        finals = [read_json(self.folder.final(index) / "classes.json")["branches"] for index in indices]
        branch = next(iter(finals[-1]))
        sizes = [[len(group) for group in final[branch]["groups"]] for final in finals if branch in final]
        counts = [self.folder.counts(index)[branch] for index in indices]
        return sequence_scores(counts, sizes, finals[-1][branch]["background"])

    def to_json(self) -> dict[str, Any]:
        """Everything for scripts: configuration, scores per step and over the sequence."""
        return {
            "name": self.config.name,
            "path": str(self.path),
            "config": to_json(self.config),
            "steps": self.steps,
            **self.sequence,
        }


def run(
    source: str | Path | Mapping[str, Any] | None = None,
    *,
    overrides: Sequence[str] = (),
    dry_run: bool = False,
    quiet: bool = False,
    **sections: Any,
) -> Run:
    """Run a preset, a YAML file or a mapping, continuing an unfinished run of the same name.

    Args:
        source: preset name, path of a YAML file, or a mapping.
        overrides: "key=value" strings, as on the command line.
        dry_run: take two iterations of every step through every stage in a temporary folder.
        quiet: print no progress.
        sections: further settings as keywords, for instance `data={"root": ...}`, `method="mib"`, `seed=1`.

    Raises:
        EversegError: with what, where and what to do.
    """
    config = load_config(source, overrides, **sections)
    if not dry_run:
        return Run(execute(config, quiet=quiet))
    with tempfile.TemporaryDirectory(prefix="everseg-dry-run-") as out:
        small = config.model_copy(
            update={
                "out": out,
                "tensorboard": config.tensorboard,
                "train": config.train.model_copy(update={"max_iterations": 2, "log_every": 1}),
            }
        )
        done = Run(execute(small, quiet=quiet, dry_run=True))
        _ = done.steps, done.sequence, done.config  # read while the folder is there
        return done


def evaluate(
    path: str | Path, *, step: int | None = None, overrides: Sequence[str] = (), quiet: bool = False
) -> dict[str, Any]:
    """Score a finished step again, on the run's own test images or on others.

    Args:
        path: run folder.
        step: which step; default the last finished one.
        overrides: "data=...", "data.root=...", "scenario.test_split=..." and the like.

    Returns:
        {"run", "step", "branches": {branch: scores}}: on the same data exactly the numbers of the run.

    Raises:
        ConfigError: an override that would make it another model; a user's own code not named in `overrides`.
    """
    folder = RunFolder(Path(path))
    stored = folder.config()
    config = load_config(to_json(stored), overrides)
    _refuse_stored_code(config, overrides)
    index = _step_index(folder, step)
    accelerator = make_accelerator(config)
    progress = Progress(quiet=quiet, rank=accelerator.process_index)
    if (stored.data.dataset, stored.scenario) == (config.data.dataset, config.scenario):
        prepared = prepare(config, progress)
        dataset, sources = prepared.dataset, prepared.steps[index].test
    else:
        dataset = load_dataset(config.data)
        sources = _sources_by_name(dataset, config, _spaces(folder, index))
    result, scores = score_step(config, dataset, sources, folder, index, accelerator, progress)
    return {
        "run": str(path),
        "step": index,
        "images": sum(len(source.indices) for source in sources),
        "branches": scores,
        "confusion": {branch: counts.tolist() for branch, counts in result.counts.items()},
    }


def _refuse_stored_code(config: RunConfig, overrides: Sequence[str]) -> None:
    """A run folder may come from somebody else: code it names is imported only if the user names it too."""
    given = " ".join(overrides)
    for kind, key, name in (
        ("model", "model", config.model.name),
        ("dataset", "data", config.data.dataset),
        ("scenario", "scenario.kind", config.scenario.kind),
    ):
        if ":" in name and name not in given and name not in registry.names(kind):
            raise ConfigError(f"this run uses your own code '{name}'; say so to let it run: {key}={name}")


def _step_index(folder: RunFolder, step: int | None) -> int:
    finished = folder.finished_steps
    if not finished:
        raise CheckpointError(f"{folder.path} has no finished step yet; run its command to finish one")
    if step is None:
        return finished[-1]
    if step not in finished:
        raise ConfigError(
            f"--step {step}: finished steps of {folder.path} are {', '.join(map(str, finished))}"
        )
    return step


def _spaces(folder: RunFolder, index: int) -> dict[str, LabelSpace]:
    branches = read_json(folder.final(index) / "classes.json")["branches"]
    return {
        name: LabelSpace(tuple(map(tuple, entry["groups"])), tuple(entry["names"]), entry["background"])
        for name, entry in branches.items()
    }


def _sources_by_name(dataset: Any, config: RunConfig, spaces: Mapping[str, LabelSpace]) -> tuple[Source, ...]:
    """Test sources on another data set: its classes are matched by name; unknown ones follow the label policy."""
    split_name = config.scenario.test_split
    if split_name not in dataset.splits:
        raise ConfigError(
            f"data set '{dataset.name}' has no split '{split_name}'; it has {', '.join(dataset.splits)}"
        )
    policy = policy_set(config.scenario.policy).test
    counts = class_counts(dataset.splits[split_name], dataset.labels)
    sources = []
    for branch, space in spaces.items():
        table = np.full(256, policy.void, np.uint8)
        known = []
        for raw, name in dataset.labels.names.items():
            if raw == dataset.labels.background:
                table[raw] = policy.background
            elif name in space.names:
                table[raw] = space.names.index(name)
                known.append(raw)
            else:
                table[raw] = policy.future
        if not known:
            raise DataError(
                f"data set '{dataset.name}' shares no class name with the model: it has "
                f"{', '.join(dataset.labels.names.values())}; the model knows {', '.join(space.names)}"
            )
        indices = np.flatnonzero(counts[:, known].sum(1) > 0)
        sources.append(Source(branch, dataset.name, split_name, tuple(map(int, indices)), table.tobytes()))
    return tuple(sources)


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

    def __init__(self, model: torch.nn.Module, spaces: Mapping[str, LabelSpace]) -> None:
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
        batch = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)[None].to(self.device)
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
        return LoadedModel(*folder.load_final(_step_index(folder, step), builder)[:2])
    if (path / "final").is_dir():
        path = path / "final"
    if not (path / "classes.json").is_file():
        raise CheckpointError(f"{path} holds no model: give a run folder, or a step's `final` folder")
    verify(path)
    return LoadedModel(*load_model(path, builder))


def predict(
    run_path: str | Path, paths: Iterable[str | Path], out: str | Path, *, step: int | None = None
) -> list[tuple[Path, Path]]:
    """Predict images and folders of images; write id masks and overlays.

    Returns:
        (mask, overlay) of each image. Masks hold train ids; `classes.json` beside them names the ids.

    Raises:
        DataError: no image found, or every unreadable one listed, before anything is written.
    """
    model = load(run_path, step=step)
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
    bad = []
    for path, _ in files:
        try:
            read_image(path)
        except DataError as error:
            bad.append(str(error))
    if bad:
        raise DataError("\n  ".join([f"{len(bad)} unreadable images; nothing was written:", *bad]))
    out = Path(out)
    written = []
    for path, stem in files:
        prediction = model.predict(path)
        (out / stem).parent.mkdir(parents=True, exist_ok=True)
        written.append(write_prediction(out / stem, prediction.ids, prediction.image))
    names = {str(i): name for i, name in enumerate(model.classes)}
    (out / "classes.json").write_text(json.dumps(names, indent=1) + "\n")
    return written


IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp"})


def describe_scenario(config: RunConfig, *, quiet: bool = False) -> list[dict[str, Any]]:
    """What every step will see before training: new classes, images, pixels per class, leaks between steps."""
    prepared = prepare(config, Progress(quiet=quiet))
    return summarise(prepared.steps, prepared.counts)


DEMO_METHODS = ("ft", "mib", "joint")


def demo(*, out: str | Path = "runs", quiet: bool = False, seed: int = 0) -> list[dict[str, Any]]:
    """Fine-tuning, MiB and joint training on generated scenes; the three runs lie in `out`.

    Returns:
        One row per method: name, path, mIoU of step 0 (`first`), of old, new and all classes after step 1, forgetting.
    """
    rows = []
    for method in DEMO_METHODS:
        done = run(f"demo-{method}", out=str(out), seed=seed, quiet=quiet)
        last = done.steps[-1]
        joint = len(done.steps) == 1
        first = None if joint else done.steps[0]["miou"]["all"]
        lost = None if joint else done.sequence["forgetting"]["mean"]
        rows.append(
            {"method": method, "path": str(done.path), "first": first, **last["miou"], "forgetting": lost}
        )
    return rows


def import_mib(
    checkpoint: str | Path,
    out: str | Path,
    *,
    norm: str = "iabn",
    output_stride: int = 16,
    classes: Sequence[str] = (),
) -> Path:
    """Turn an original MiB step checkpoint into a model folder that `load` and `predict` read.

    Args:
        norm: "iabn" for checkpoints trained with In-place ABN (the authors' default), "abn" otherwise.
        classes: class names in output order; default background, class 1, ...

    Raises:
        CheckpointError: not readable without running code from it, or its keys do not make a whole model.
    """
    from everseg.interop import mib

    out = Path(out)
    if out.exists() and any(out.iterdir()):
        raise ConfigError(f"{out} is not empty; give a new folder")
    model = mib.load(mib.read(Path(checkpoint)), norm=norm, output_stride=output_stride)
    (branch,) = model.heads
    sizes = model.heads[branch].sizes
    total = sum(sizes)
    names = tuple(classes) or ("background", *(f"class {i}" for i in range(1, total)))
    if len(names) != total:
        raise ConfigError(f"--classes: the checkpoint has {total} outputs, {len(names)} names were given")
    starts = np.cumsum([0, *sizes])
    groups = [list(range(int(a), int(b))) for a, b in itertools.pairwise(starts)]
    document = {
        "architecture": model.describe(),
        "branches": {branch: {"groups": groups, "names": names, "background": 0}},
        "step": len(sizes) - 1,
        "source": f"MiB checkpoint {Path(checkpoint).name}",
    }
    temporary = out / "final"
    save_folder(temporary, {"model": model.state_dict(), "method_state": {}}, {"classes": document})
    return temporary


def export_mib(path: str | Path, checkpoint: str | Path) -> Path:
    """Write a model back in the original MiB layout (`model_state` with `module.` names), loadable by that code."""
    from everseg.interop import mib

    target = Path(checkpoint)
    if target.exists():
        raise ConfigError(f"{target} exists; give a new file name")
    state = mib.dump(load(path).model)
    temporary = target.with_name(target.name + ".tmp")
    try:
        torch.save({"epoch": 0, "model_state": state, "best_score": 0.0, "trainer_state": {}}, temporary)
        shutil.move(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)
    return target
