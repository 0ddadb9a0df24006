"""The stored results of a run, each file read only once, and the scores over its whole sequence of steps.

Code that needs several results makes one `Results` object and passes it on, instead of reading the folder again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from everseg.config.fields import RunConfig
from everseg.config.loading import difference
from everseg.display import counted, percent, share
from everseg.errors import CheckpointError, some
from everseg.labels import LabelSpace, policy_name
from everseg.metrics import (
    boundary_scores,
    defined_mean,
    false_share,
    first_last_scores,
    iou,
    iou_of_sums,
    sequence_scores,
    step_scores,
    sums_of,
)
from everseg.models.model import SegmentationModel
from everseg.runs.commit import Committed, read_committed
from everseg.runs.journal import FILE as JOURNAL
from everseg.runs.journal import Journal, replaced_samples
from everseg.runs.memory import Memory, read_memory
from everseg.runs.model_folder import WEIGHTS, ModelFile, load_model, read_model_file
from everseg.runs.run_folder import SCENARIO_FILE, RunFolder, RunRecord


@dataclass(frozen=True)
class Taught:
    """How well a step taught a class: where the class is, and where it is not.

    IoU alone says little of a class that few images show: the images without it are where a model goes wrong unseen.
    """

    name: str
    iou: float | None
    """None if no test image shows the class."""
    false_share: float | None
    """False-positive share: of the test pixels that are something else, the part that the model calls this class."""
    images_without: int | None
    """Test images without a pixel of the class; None where counts per image are not stored."""
    false_without: float | None
    """The false-positive share in these images alone; None without such images."""

    @property
    def text(self) -> str:
        """The figures in words, IoU in percent."""
        found = [f"{share(self.false_share)} of the other pixels are called so"]
        if self.images_without:
            where = "image" if self.images_without == 1 else "images"
            found.append(
                f"{share(self.false_without)} of the area in {self.images_without} {where} without it"
            )
        return f"{self.name} IoU {percent(self.iou)} ({', '.join(found)})"


@dataclass(frozen=True)
class OnNew:
    """A class that the deployed model knew, on the images of its extension."""

    name: str
    before: float | None
    """IoU of the deployed model; None if these images do not label the class, or its counts are not stored."""
    after: float | None
    """IoU of the extended model; None if these images do not label the class."""
    pixels: int
    """True pixels of the class in these images."""


@dataclass(frozen=True)
class StepResults:
    """The stored results of one scored step. Each file is read once, when it is first needed."""

    folder: RunFolder
    index: int

    @cached_property
    def final(self) -> Committed:
        """The manifest of the step's model folder, read and checked."""
        return read_committed(self.folder.final(self.index))

    @cached_property
    def about(self) -> ModelFile:
        """The content of the model folder's file."""
        return read_model_file(self.final.folder, self.final)

    @cached_property
    def memory(self) -> Memory | None:
        """The images that the step keeps for later ones; None in a run without memory."""
        return read_memory(self.final.folder, self.final)

    @property
    def spaces(self) -> Mapping[str, LabelSpace]:
        """Label space of each branch after the step."""
        return self.about.spaces

    @property
    def is_fresh(self) -> bool:
        """Whether the step was trained from scratch."""
        return self.about.fresh

    @cached_property
    def metrics(self) -> dict[str, Any]:
        """The scores as `RunFolder.save_result` got them."""
        return self._scored[0]

    @cached_property
    def _scored(self) -> tuple[dict[str, Any], dict[str, str] | None]:
        return self.folder.scored(self.index)

    @property
    def scores(self) -> dict[str, Any]:
        """Name of the results (domain, or branch in runs on one data set) -> their scores."""
        return self.metrics["branches"]

    @property
    def branch_of(self) -> dict[str, str]:
        """Name of the results -> branch that produced them."""
        return {name: scores.get("branch", name) for name, scores in self.scores.items()}

    @cached_property
    def counts(self) -> dict[str, np.ndarray]:
        """Name of the results -> confusion counts, (C, C) int64, rows = truth."""
        return self.folder.counts(self.index, self._scored[1])

    @cached_property
    def images(self) -> dict[str, np.ndarray]:
        """Name of the results -> counts per test image, (N, 3, C), see `RunFolder.images`; {} in older runs."""
        return self.folder.images(self.index, self.counts, self._scored[1])

    @cached_property
    def boundary(self) -> dict[str, np.ndarray]:
        """Name of the results -> `RunFolder.boundary`."""
        return self.folder.boundary(self.index, self.counts, self._scored[1])

    @cached_property
    def before(self) -> dict[str, np.ndarray]:
        """Name of the results -> counts of the deployed model on the same images, (C, C); {} but in extensions."""
        return self.folder.before(self.index, self._scored[1])

    @cached_property
    def others(self) -> dict[str, np.ndarray]:
        """Name of the results -> `RunFolder.others`."""
        return self.folder.others(self.index, self._scored[1])

    @cached_property
    def kept(self) -> dict[str, Any]:
        """What an extension kept of the old classes (`RunFolder.kept`); {} where it is not known."""
        return self.folder.kept(self.index)

    @cached_property
    def weights(self) -> Path:
        """The file of the model's weights, compared with the manifest without holding it in memory."""
        self.final.check(WEIGHTS)
        return self.final.folder / WEIGHTS

    def taught(self, result: str, names: Iterable[str]) -> list[Taught]:
        """Say how well the step teaches classes: IoU and false-positive shares, from the counts of its test images.

        Args:
            result: name of the results.
            names: the classes, spelt as the model spells them.
        """
        images = self.others.get(result, self.images.get(result))
        sums = sums_of(self.counts[result]) if images is None else images.sum(0, dtype=np.int64)
        known = list(self.spaces[self.branch_of[result]].names)
        overlap, wrong = iou_of_sums(sums), false_share(sums)
        found = []
        for name in names:
            c = known.index(name)
            without = None if images is None else images[images[:, 0, c] == 0]
            found.append(
                Taught(
                    name,
                    _defined(overlap[c]),
                    _defined(wrong[c]),
                    None if without is None else len(without),
                    None
                    if without is None or not len(without)
                    else _defined(false_share(without.sum(0, dtype=np.int64))[c]),
                )
            )
        return found

    def old_on_new(self, result: str) -> list[OnNew]:
        """Compare the deployed model with its extension on the new images, for each old class but the background.

        The background is no part of it: where the images do not label some old class, that class is background in them
        by design, so the background's score says nothing.
        """
        space, counts, before = (
            self.spaces[self.branch_of[result]], self.counts[result], self.before.get(result)
        )  # fmt: skip
        new = set(self.scores[result]["new_classes"])
        after, truth = iou(counts), counts.sum(1)
        first = None if before is None else iou(before)
        return [
            OnNew(
                name,
                None if first is None else _defined(first[c]),
                _defined(after[c]),
                int(truth[c]),
            )
            for c, name in enumerate(space.names)
            if name not in new and c != space.background
        ]

    def model(self, builder: Any = None) -> SegmentationModel:
        """Read the model as `Results.model` does, but without checking which model it continues."""
        return load_model(self.final.folder, builder, self.about, self.final.read(WEIGHTS), self.final)[0]


@dataclass(frozen=True)
class MemoryAfter:
    """What a run keeps of its training images after a step, in numbers."""

    step: int
    before: int
    """Number of images that the step was trained with in addition to its own."""
    images: int
    """Number of images kept after it."""
    by_model: int
    """Number of kept images in which a model saw classes that their labels do not show (pseudo-labels)."""
    copied: int
    """Number of kept images that lie in the run as copies; the others are read from the data again."""
    bytes: int
    """Size of those copies: images, masks and further maps."""


@dataclass(frozen=True)
class Results:
    """Everything that a run has stored, and its scores. Each file is read once, when it is first needed.

    The object shows the run as it was when its files were read. If the run continues, make a new object.
    """

    folder: RunFolder

    @cached_property
    def record(self) -> RunRecord:
        """The content of run.json.

        Raises:
            CheckpointError: the folder is not a run folder, or run.json is damaged.
        """
        return self.folder.record()

    @cached_property
    def config(self) -> RunConfig:
        """The configuration the run was started with."""
        return self.folder.config(self.record)

    @cached_property
    def scenario(self) -> dict[str, Any]:
        """The content of scenario.json.

        Raises:
            CheckpointError: the file is missing or damaged.
        """
        return self.folder.scenario()

    @property
    def planned(self) -> list[dict[str, Any]]:
        """The steps as scenario.json records them, finished or not."""
        return list(self.scenario["steps"])

    @property
    def notes(self) -> tuple[str, ...]:
        """How the run treated class names that were not as expected, as scenario.json records it.

        It is () for runs of versions that did not record it.

        Raises:
            CheckpointError: the file is missing or damaged.
        """
        return tuple(self.scenario.get("notes", ()))

    @cached_property
    def steps(self) -> tuple[StepResults, ...]:
        """The steps that are trained and scored, in order."""
        return tuple(StepResults(self.folder, index) for index in self.folder.finished_steps)

    @property
    def finished(self) -> list[int]:
        """The indices of the steps that are trained and scored."""
        return [step.index for step in self.steps]

    def step(self, index: int) -> StepResults:
        """Return a finished step by its index."""
        return next(step for step in self.steps if step.index == index)

    def model(self, index: int, builder: Any = None) -> SegmentationModel:
        """Read the model after a finished step, in eval mode on the CPU. Every call reads it from disk again.

        This checks the weights and classes, but not the state of the method. `RunFolder.load_final` checks all files.

        Args:
            builder: builder of the user's architecture, if it is not a built-in one.

        Raises:
            CheckpointError: the model is missing or damaged, does not continue the step before it, or has another
                architecture.
        """
        step, before = self.step(index), next((s for s in self.steps if s.index == index - 1), None)
        if before is not None and not step.is_fresh and step.final.parent != before.final.digest:
            raise CheckpointError(
                f"{step.final.folder} does not continue {before.final.folder}: they come from different runs; "
                f"delete {self.folder.step(index)} and later steps, then run the same command to do them again"
            )
        return step.model(builder)

    def is_complete(self, config: RunConfig | None = None) -> bool:
        """Tell whether every step is trained and scored. If a configuration is given, the run must also fit it."""
        if not (self.folder.path / SCENARIO_FILE).is_file():
            return False
        if config is not None and difference(self.config, config):
            return False
        return len(self.steps) == len(self.planned)

    @cached_property
    def memories(self) -> tuple[MemoryAfter, ...]:
        """What every finished step keeps of its training images; () for a run without memory.

        Raises:
            CheckpointError: a memory is damaged.
        """
        folders = {step.index: step.final for step in self.steps}

        def committed(index: int) -> Committed:
            if (
                index not in folders
            ):  # an extension begins with the folder of its bundle, which no step scored
                folders[index] = read_committed(self.folder.final(index))
            return folders[index]

        told = []
        for step in self.steps if self.config.scenario.memory.size else ():
            memory = step.memory
            if memory is None:
                continue
            known = next((s for s in self.steps if s.index == step.index - 1), None)
            if known is not None:
                before = known.memory
            elif step.index:
                before = read_memory(self.folder.final(step.index - 1), committed(step.index - 1))
            else:
                before = None
            sizes = [committed(copy.step).files[n]["size"] for copy in memory.copies for n in copy.names]
            by_model = sum(one.image.classes != one.image.labelled for one in memory.images)
            told.append(
                MemoryAfter(
                    step=step.index,
                    before=len(before.images) if before else 0,
                    images=len(memory.images),
                    by_model=by_model,
                    copied=len(memory.copies),
                    bytes=sum(sizes),
                )
            )
        return tuple(told)

    @property
    def journal(self) -> tuple[dict[str, Any], ...]:
        """The entries of journal.jsonl; () without such a file."""
        return self._journal[0]

    @cached_property
    def _journal(self) -> tuple[tuple[dict[str, Any], ...], int]:
        entries, lost = Journal(self.folder.path / JOURNAL).read()
        return tuple(entries), lost

    @property
    def journal_faults(self) -> str:
        """Sentence that says what the journal lacks, so that its curves are not taken for whole; "" if nothing."""
        if not self.steps:
            return ""
        if not (self.folder.path / JOURNAL).exists():
            return f"{JOURNAL} is missing: there are no curves of training and no speeds."
        lost = self._journal[1]
        tested = {entry["step"] for entry in self.journal if entry["event"] == "test"}
        cut = [str(index) for index in self.finished if index not in tested]
        faults = [f"{lost} {'line is' if lost == 1 else 'lines are'} missing or damaged"] if lost else []
        if cut:
            which = f"step {cut[0]}" if len(cut) == 1 else f"the steps {some(cut, 6)}"
            faults.append(f"the end of {which} is missing")
        text = "; ".join(faults)
        return (
            f"{JOURNAL} is not whole: {text}. Curves, speeds and times lack what stood there." if text else ""
        )

    @cached_property
    def replaced(self) -> str:
        """Sentence that says how many unreadable training samples were replaced, and which; "" if there are none."""
        found = replaced_samples(self.journal)
        if not found:
            return ""
        what = counted(len(found), "training sample", "was", "were")
        names = some([f"{sample} of {dataset}" for dataset, sample in found], 6)
        return f"{what} replaced by others, as data.skip_bad allows: {names}."

    @cached_property
    def taught(self) -> dict[int, str]:
        """Step -> the domains (or the data set) whose images it trained on."""
        return {
            step["index"]: ", ".join(dict.fromkeys(source_name(source) for source in step["train"]))
            for step in self.planned
        }

    @cached_property
    def policy(self) -> str:
        """Name of the run's label policy, as it is today."""
        return policy_name(self.config.scenario.policy, self.config.data.dataset)

    @cached_property
    def plop_figures(self) -> dict[str, float | None]:
        """Figures by the reporting rule of PLOP's code (`metrics.first_last_scores`).

        {} unless the run has the labels of the PLOP family, and over domains. A background that no pixel has, as data
        sets without one get, is left out: it would only count 0.
        """
        if not self.policy.startswith("plop") or self.config.data.domains or len(self.tracks) != 1:
            return {}
        (track,) = self.tracks
        space = track.space
        made_up = space.background is not None and space.order[space.background] < 0
        return first_last_scores(
            track.counts, [len(group) for group in space.groups], space.background if made_up else None
        )

    @cached_property
    def tracks(self) -> tuple[Track, ...]:
        """The results of every domain (or branch) over the steps.

        If a step trains its model from scratch, the results of earlier models are left out. Domains are in the order
        in which they are taught. Domains that no step teaches come last.

        Raises:
            CheckpointError: no step is finished, or counts do not fit their classes.
        """
        rows: dict[str, list[tuple[int, str, np.ndarray, LabelSpace]]] = {}
        outlines: dict[str, np.ndarray | None] = {}
        for step in self.steps:
            for name, branch in step.branch_of.items():
                if step.is_fresh:  # a new model: the results of earlier ones say nothing about it
                    rows[name] = []
                known = step.counts.get(name)
                if (
                    known is None
                    or branch not in step.spaces
                    or len(known) != step.spaces[branch].num_classes
                ):
                    place = self.folder.step(step.index)
                    raise CheckpointError(
                        f"{place / 'confusion.npz'} does not fit the classes of the step; "
                        f"delete {place / 'metrics.json'} and run the same command to score it again"
                    )
                rows.setdefault(name, []).append((step.index, branch, known, step.spaces[branch]))
                # The last step's are shown; those of the others are read too, so that damage in them is told.
                outlines[name] = step.boundary.get(name)
        if not rows:
            raise CheckpointError(
                f"{self.folder.path} has no finished step yet; run its command to finish one"
            )
        return tuple(
            Track(
                name,
                rows[name][-1][1],
                tuple(index for index, _, _, _ in rows[name]),
                tuple(counts for _, _, counts, _ in rows[name]),
                tuple(space for _, _, _, space in rows[name]),
                outlines[name],
            )
            for name in self.in_order(rows)
        )

    def in_order(self, names: Iterable[str]) -> list[str]:
        """Sort names of domains in the order in which the steps teach them. Other names follow in their given order."""
        names = list(names)
        if len(names) < 2:
            return names
        taught = dict.fromkeys(source_name(source) for step in self.planned for source in step["train"])
        position = {name: number for number, name in enumerate(taught)}
        return sorted(names, key=lambda name: position.get(name, len(position)))

    @cached_property
    def sequence(self) -> dict[str, Any]:
        """Average over steps, forgetting and backward transfer of the scored steps.

        For a run on one data set this is the result of `metrics.sequence_scores`. Before the first scored step it is
        {}. For a run over domains it holds:

        * `domains`: domain -> the result of `sequence_scores` for it;
        * `miou`: domain -> mIoU over all its classes after the last step that tested it;
        * `average_miou`: mean over the steps, each step being the mean over the domains that it tests;
        * `forgetting`, `backward_transfer`: {"mean": mean over domains, "domains": domain -> its value, None if only
          the last step knows the domain}.
        """
        tested: dict[str, list[tuple[np.ndarray, LabelSpace]]] = {}
        per_step: list[list[float | None]] = []
        last: dict[str, float | None] = {}
        for step in self.steps:
            for name, values in step.scores.items():
                if name not in tested or step.is_fresh:  # a new model: its sequence begins here
                    tested[name] = []
                tested[name].append((step.counts[name], step.spaces[step.branch_of[name]]))
                last[name] = values["miou"]["all"]
            per_step.append([values["miou"]["all"] for values in step.scores.values()])
        if not tested:
            return {}
        sequences = {name: _of(tested[name]) for name in self.in_order(tested)}
        if len(sequences) == 1 and not self.config.data.domains:
            return next(iter(sequences.values()))
        result: dict[str, Any] = {
            "domains": sequences,
            "miou": {name: last[name] for name in sequences},
            "average_miou": defined_mean(defined_mean(values) for values in per_step),
        }
        for key in ("forgetting", "backward_transfer"):
            means = {name: values[key]["mean"] for name, values in sequences.items()}
            result[key] = {"mean": defined_mean(means.values()), "domains": means}
        return result


def source_name(source: Mapping[str, Any]) -> str:
    """Name the data of a source in scenario.json: its domain, or in runs on one data set the data set."""
    return source.get("domain") or source["dataset"]


def _defined(value: float) -> float | None:
    return None if np.isnan(value) else float(value)


def _of(rows: list[tuple[np.ndarray, LabelSpace]]) -> dict[str, Any]:
    sizes = [[len(group) for group in space.groups] for _, space in rows]
    return sequence_scores([counts for counts, _ in rows], sizes, rows[-1][1].background)


@dataclass(frozen=True)
class Track:
    """The results of one model over the steps, on one data set or domain."""

    name: str
    """The domain, or the branch in runs on one data set."""
    branch: str
    steps: tuple[int, ...]
    """Steps after which the model was tested."""
    counts: tuple[np.ndarray, ...]
    """Confusion counts after each of `steps`: (C, C) int64, rows = truth."""
    spaces: tuple[LabelSpace, ...]
    """Label space after each of `steps`."""
    boundary: np.ndarray | None = None
    """Boundary counts per test image after the last of `steps` (`RunFolder.boundary`); None unless asked for."""

    @property
    def space(self) -> LabelSpace:
        """Label space after the last step."""
        return self.spaces[-1]

    @property
    def background(self) -> int | None:
        return self.space.background

    @property
    def counts_background(self) -> bool:
        """Whether the means count a background. Data without one may have an output for it, which no pixel is."""
        return any(scores["miou"] != scores["miou_without_background"] for scores in self.scores)

    @cached_property
    def scores(self) -> list[dict[str, Any]]:
        """The scores after each step, computed by `metrics.step_scores`."""
        return [
            step_scores(n, [len(group) for group in space.groups], space.background)
            for n, space in zip(self.counts, self.spaces, strict=True)
        ]

    @cached_property
    def boundary_scores(self) -> dict[str, Any]:
        """The scores of outlines after the last step, computed by `metrics.boundary_scores`; {} unless asked for."""
        if self.boundary is None:
            return {}
        sizes = [len(group) for group in self.space.groups]
        return boundary_scores(self.boundary.sum(0, dtype=np.int64), sizes, self.background)

    @cached_property
    def sequence(self) -> dict[str, Any]:
        """The scores of the sequence of steps, computed by `metrics.sequence_scores`."""
        sizes = [[len(group) for group in space.groups] for space in self.spaces]
        return sequence_scores(self.counts, sizes, self.background)

    @property
    def born(self) -> list[int]:
        """Growth -> the step after which it was first tested."""
        return [self.steps[self._first(group)] for group in range(len(self.space.groups))]

    def _first(self, group: int) -> int:
        return next(i for i, space in enumerate(self.spaces) if len(space.groups) > group)

    @property
    def group_of(self) -> list[int]:
        """Train id -> growth that brought it."""
        return [number for number, group in enumerate(self.space.groups) for _ in group]

    def at_birth(self, train_id: int) -> int:
        """Return the position in `steps` of the first test whose model knew a class."""
        return self._first(self.group_of[train_id])

    @property
    def group_titles(self) -> list[str]:
        """Title of each growth: its step, or its number if one test saw several (joint training, extensions)."""
        born = self.born
        if len(set(born)) < len(born):  # growths of the same step would get the same title
            # Joint training teaches the classes of all steps in their order. A deployed model may have been trained in
            # steps that brought none, so the number of a growth is not that of its step.
            what = "classes of step" if born[0] == 0 else "classes, group"
            return [f"{what} {number}" for number in range(len(born))]
        return [f"learnt in step {step}" for step in born]

    def group_names(self, group: int) -> list[str]:
        """List the names of the classes that one growth added, without the background."""
        ends = [0, *accumulate(len(g) for g in self.space.groups)]
        ids = range(ends[group], ends[group + 1])
        return [self.space.names[c] for c in ids if c != self.background]

    @property
    def old(self) -> list[int]:
        """Train ids of the classes known before the last test, background included: 0, 1, ...; [] with one test."""
        return [c for c in range(self.space.num_classes) if self.at_birth(c) < len(self.steps) - 1]
