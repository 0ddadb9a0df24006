"""The memory of a run: the images of earlier steps that a step is trained on again, and the choice at its end."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from everseg.config.fields import DataConfig, MemoryConfig, ModelConfig
from everseg.data.base import Dataset, channels_of_split
from everseg.data.batches.extra import maps_of
from everseg.data.batches.loader import normalised_batches
from everseg.data.batches.samples import SampleKey, View
from everseg.data.batches.selection import Candidate, flat, reservoir, round_robin, uniform
from everseg.display import counted
from everseg.distributed import derive_seed
from everseg.errors import ConfigError, DataError, some
from everseg.files import MOST_LIST, UnreadableError, read_text
from everseg.inference.count import padded_table, user_builder
from everseg.labels import ignored_id
from everseg.methods.base import Method, StepContext
from everseg.models.build import build_model, from_description
from everseg.runs.input_form import one_kind_of_channels
from everseg.runs.memory import CopiedSplit, Kept, Memory, new_copy, read_memory
from everseg.runs.run_folder import RunFolder
from everseg.scenarios.memory import Labels, memory_source
from everseg.scenarios.steps import Source, Step, packed
from everseg.types import Batch

LISTED = 12
"""Most names of images in a message."""


def memory_before(config: MemoryConfig, folder: RunFolder, step: Step) -> Memory | None:
    """Read the memory that a step is trained with; None if the run has none, or the step is the first.

    Raises:
        CheckpointError: it is damaged.
    """
    if not config.size or step.is_first:
        return None
    found = read_memory(folder.final(step.index - 1))
    return found if found is not None and found.images else None


@dataclass
class Shelf:
    """Finds the images of a memory: in the data sets of the run, or in copies."""

    steps: Sequence[Step]
    """All steps of the run."""
    datasets: Mapping[str, Dataset]
    folder: RunFolder
    _positions: dict[tuple[str, str], dict[str, int]] = field(default_factory=dict)

    def position(self, image: Candidate) -> int | None:
        """Position of an image in its split; None if it is not there any more."""
        key = image.dataset, image.split
        if key not in self._positions:
            splits = self.datasets[image.dataset].splits if image.dataset in self.datasets else {}
            split = splits.get(image.split)
            self._positions[key] = {split.id(i): i for i in range(len(split))} if split is not None else {}
        return self._positions[key].get(image.id)

    def views(self, kept: Sequence[Kept], now: Step, labels: Labels) -> tuple[list[View], list[int]]:
        """Bind images of a memory to what reads them.

        Args:
            now: the step that sees them.
            labels: which classes are labelled.

        Returns:
            The views, marked as of the memory, and for every sample in their order its number in `kept`.

        Raises:
            DataError: an image is not in the data any more.
        """
        groups: dict[tuple[object, ...], list[int]] = {}
        for number, one in enumerate(kept):
            lasting = one.copy is not None and one.copy.lasting
            annotated = () if lasting else one.image.steps
            key = (one.image.dataset, one.image.split, annotated, one.copy is None, lasting)
            groups.setdefault(key, []).append(number)
        views, order, lost = list[View](), list[int](), list[str]()
        for numbers in groups.values():
            members = [kept[number] for number in numbers]
            order += numbers
            if members[0].copy is not None:
                views.append(self._of_copies(members, now, labels))
                continue
            places = [self.position(one.image) for one in members]
            lost += [one.image.id for one, place in zip(members, places, strict=True) if place is None]
            if not lost:
                views.append(
                    self._of_data(members[0].image, [p for p in places if p is not None], now, labels)
                )
        if lost:
            raise DataError(
                f"the memory of step {now.index - 1} names images that the data do not have any more: "
                f"{some(lost, LISTED)}; restore them, or keep copies in the run from its start "
                "(scenario.memory.keep=files)"
            )
        return views, order

    def _of_data(self, one: Candidate, places: Sequence[int], now: Step, labels: Labels) -> View:
        source = memory_source(self.steps, now, one.steps, one.dataset, one.split, labels)
        dataset = self.datasets[one.dataset]
        return View(
            dataset.splits[one.split],
            np.array(places, np.int64),
            padded_table(source),
            source.branch,
            one.dataset,
            maps_of(dataset, one.split),
            memory=True,
        )

    def _of_copies(self, members: Sequence[Kept], now: Step, labels: Labels) -> View:
        first = members[0].image
        places = [
            (one.image.id, one.copy, self.folder.final(one.copy.step))
            for one in members
            if one.copy is not None
        ]
        dataset = self.datasets.get(first.dataset) or next(iter(self.datasets.values()))
        split = CopiedSplit(first.split, places, channels_of_split(next(iter(dataset.splits.values()))))
        if places[0][1].lasting:
            source = lasting_source(now, labels, first.dataset)
        else:
            source = memory_source(self.steps, now, first.steps, first.dataset, first.split, labels)
        extra = {name: split.maps(name) for name in dataset.extra}
        table = padded_table(source)
        return View(split, np.arange(len(split)), table, source.branch, first.dataset, extra, memory=True)


def lasting_source(now: Step, labels: Labels, dataset: str) -> Source:
    """Make the source of images that came with a bundle, whose masks hold the lasting ids of its classes.

    Args:
        now: the step that sees them. Its label space has the lasting ids as raw ids.
        labels: with "current" the classes of the bundle are background, as in the labels of new images.
        dataset: key of the data set that they were taken from.
    """
    (branch,) = now.trained_branches
    space = now.spaces[branch]
    width = 256 if space.num_classes <= 255 and max(space.order) < 255 else 2**16
    ignored = ignored_id(space.num_classes)
    table = [ignored] * width
    for train_id, raw in enumerate(space.order):
        if 0 <= raw < width:
            hidden = labels == "current" and train_id < now.num_old(branch) and space.background is not None
            table[raw] = int(space.background or 0) if hidden else train_id
    return Source(branch, dataset, "memory", (), packed(table, space.num_classes))


# ---------------------------------------------------------------- the choice at a step's end


@dataclass(frozen=True)
class Chosen:
    """What a step leaves for later ones."""

    memory: Memory
    copies: Mapping[str, Callable[[], bytes]] = field(default_factory=dict)
    """Files to write beside the step's model: name -> what makes the bytes."""


@dataclass
class Choice:
    """Chooses the images that a finished step keeps. All processes choose alike."""

    memory: MemoryConfig
    data: DataConfig
    model: ModelConfig
    seed: int
    shelf: Shelf
    counts: Mapping[str, np.ndarray]
    """"key/split" -> (N, ids) pixels per raw id of every image."""
    step: Step
    method: Method
    ctx: StepContext
    before: Memory | None
    """The memory that the step was trained with."""
    device: torch.device
    rank: int = 0
    world: int = 1
    note: Callable[[Mapping[SampleKey, str]], None] = lambda bad: None
    """Is told of images that cannot be read."""
    unreadable: Callable[[], Mapping[SampleKey, str]] = dict
    """Gives the unreadable ones of all processes; every process must call it."""

    def make(self) -> Chosen:
        """Choose the images.

        Raises:
            DataError: an image cannot be read.
            ConfigError: the method chooses something that is no choice.
        """
        memory, held = self.memory, list(self.before.images if self.before else ())
        pool = self._pool(held)
        if memory.pseudo is not None and not self.step.is_first:
            pool = self._with_pseudo_labels(pool, memory.pseudo)
        bad = self.unreadable()
        pool = [one for one in pool if one.image.classes and (one.image.dataset, one.image.id) not in bad]
        # Candidates of the memory come first; some of them may have been unreadable.
        old = sum(self._key(one) in {self._key(other) for other in held} for one in pool)
        offered = (self.before.offered if self.before else 0) + len(pool) - old
        kept = [
            replace(pool[p], image=replace(pool[p].image, stored_for=c)) for p, c in self._chosen(pool, old)
        ]
        copies: dict[str, Callable[[], bytes]] = {}
        if memory.keep == "files":
            kept, copies = self._copied(kept)
        return Chosen(Memory(memory.size, memory.selection, offered, tuple(kept)), copies)

    @staticmethod
    def _key(one: Kept) -> tuple[object, ...]:
        lasting = one.copy is not None and one.copy.lasting
        return (one.image.dataset, one.image.split, one.image.id, lasting)

    def _pool(self, held: Sequence[Kept]) -> list[Kept]:
        """All candidates: first those of the memory, with what the step annotated in them, then the others."""
        branch = self.step.branch
        shown: dict[tuple[object, ...], None] = {}
        for source in self.step.train:
            split = self.shelf.datasets[source.dataset].splits[source.split]
            for index in source.indices:
                shown[source.dataset, source.split, split.id(index), False] = None
        pool = []
        for one in held:
            if self._key(one) in shown:
                del shown[self._key(one)]
                steps = tuple(sorted({*one.image.steps, self.step.index}))
                one = replace(one, image=self._counted(replace(one.image, steps=steps)))
            pool.append(one)
        for key in shown:
            dataset, split_name, name, _ = map(str, key)
            empty = Candidate(name, dataset, split_name, (), (), (), (self.step.index,), branch)
            pool.append(Kept(self._counted(empty)))
        return pool

    def _counted(self, image: Candidate) -> Candidate:
        """Fill in the classes that the labels of an image show, from the class index of its data set."""
        place = self.shelf.position(image)
        assert place is not None  # the step has just been trained with it
        source = self._source(image.dataset, image.split, image.steps)
        row = self.counts[f"{image.dataset}/{image.split}"][place]
        found: dict[int, int] = {}
        for raw in np.flatnonzero(row).tolist():
            if raw < len(source.lut):
                found[source.lut[raw]] = found.get(source.lut[raw], 0) + int(row[raw])
        pixels = {c: found[c] for c in self._classes if c in found}
        return replace(image, classes=tuple(pixels), pixels=tuple(pixels.values()), labelled=tuple(pixels))

    def _source(self, dataset: str, split: str, steps: tuple[int, ...]) -> Source:
        return memory_source(self.shelf.steps, self.step, steps, dataset, split, "as_stored")

    @property
    def _classes(self) -> list[int]:
        """Train ids of the classes known now, ascending, without background and outputs that no mask shows."""
        space = self.step.spaces[self.step.branch]
        return [c for c, raw in enumerate(space.order) if c != space.background and raw >= 0]

    def _batches(self, pool: Sequence[Kept], numbers: Sequence[int]) -> Iterator[tuple[int, Batch]]:
        """Read some candidates one by one, this process's share of them; unreadable ones are left out."""
        members = [pool[number] for number in numbers]
        views, order = self.shelf.views(members, self.step, "as_stored")
        views = [replace(view, memory=False) for view in views]
        mine = order[self.rank :: self.world]
        data = self.data
        # One image at a time: what a network computes of an image depends a little on the others of its batch, and the
        # choice must not depend on the size of batches or the number of processes.
        batches = normalised_batches(
            views, data, self.device, batch=1, rank=self.rank, world=self.world, replace=data.skip_bad
        )
        for place, (loaded, batch) in zip(mine, batches, strict=True):
            self.note(loaded.bad)
            if loaded.ids[0] == members[place].image.id:  # else another image stands in for it
                yield numbers[place], batch

    @torch.no_grad()
    def _with_pseudo_labels(self, pool: Sequence[Kept], threshold: float) -> list[Kept]:
        """Add the classes that the model sees in the background of the images that the step has shown."""
        numbers = [n for n, one in enumerate(pool) if self.step.index in one.image.steps]
        size = self.step.spaces[self.step.branch].num_classes
        gained = torch.zeros(len(pool), size, dtype=torch.int64, device=self.device)
        ctx = self._scoring()
        training = ctx.module.training
        ctx.module.eval()
        try:
            for number, batch in self._batches(pool, numbers):
                found = self.method.memory_labels(batch, ctx, threshold)
                gained[number] = _pixels(found, size) - _pixels(batch.label, size)
        finally:
            ctx.module.train(training)
        table = self.ctx.all_reduce(gained).cpu().numpy()
        return [
            replace(
                one, image=_with(one.image, {c: int(table[n, c]) for c in self._classes if table[n, c] > 0})
            )
            for n, one in enumerate(pool)
        ]

    def _scoring(self) -> StepContext:
        """The context whose `module` sees the pseudo-labels."""
        if self.memory.pseudo_network == "trained":
            return self.ctx
        torch.manual_seed(derive_seed(self.seed, "unloaded", self.step.index))
        builder = user_builder(self.model)
        fresh = from_description(self.ctx.module.describe(), builder=builder)
        # The authors build the network with its pretrained encoder, and read the trained weights only afterwards.
        channels = one_kind_of_channels(self.shelf.datasets.values())
        start = build_model(self.model, self.data.normalisation, 3 if channels is None else len(channels))
        known = fresh.encoder.state_dict()
        fresh.encoder.load_state_dict(
            {k: v for k, v in start.encoder.state_dict().items() if k in known}, strict=False
        )
        fresh.to(self.device)
        return replace(self.ctx, model=fresh, module=fresh, teacher=None, folded_teacher=None)

    def _chosen(self, pool: Sequence[Kept], held: int) -> Sequence[tuple[int, int | None]]:
        """Positions in the pool, and the class that each is kept for, in the order of storing."""
        memory = self.memory
        seed = derive_seed(self.seed, "memory", self.step.index)
        rng = np.random.RandomState(seed)
        images = [one.image for one in pool]
        shows = [set(image.classes) for image in images]
        match memory.selection:
            case "ssul":
                taken = round_robin(shows, self._classes, memory.size, rng)
            case "reservoir":
                # Images that a bundle brings along may be held for no class: they count for their first one.
                owners = [_owner(image) for image in images[:held]]
                taken = reservoir(shows, owners, self._classes, memory.size, rng, random.Random(seed))
            case "random":
                before = self.before.offered if self.before else 0
                return [
                    (p, None) for p in uniform(held, max(before, held), len(pool) - held, memory.size, rng)
                ]
            case "list":
                names = read_names(str(memory.file))
                places = {image.id: place for place, image in enumerate(images)}
                return [(places[name], None) for name in names if name in places][: memory.size]
            case _:
                return [(p, None) for p in self._asked(pool, images, memory.size)]
        owner = {place: c for c, places in taken.items() for place in places}
        return [(place, owner[place]) for place in flat(taken)]

    def _asked(self, pool: Sequence[Kept], images: Sequence[Candidate], size: int) -> list[int]:
        ctx = replace(self.ctx, candidate_batches=lambda: self._batches(pool, range(len(pool))))
        training = ctx.module.training
        ctx.module.eval()
        try:
            with torch.no_grad():
                found = [int(place) for place in self.method.select(ctx, images, size)]
        finally:
            ctx.module.train(training)
        if len(set(found)) < len(found) or len(found) > size or not set(found) <= set(range(len(images))):
            raise ConfigError(
                f"method '{type(self.method).__name__}': select must return at most {size} different positions of "
                f"{counted(len(images), 'candidate')}, got {some(list(map(str, found)), LISTED)}"
            )
        return found

    def _copied(self, kept: Sequence[Kept]) -> tuple[list[Kept], dict[str, Callable[[], bytes]]]:
        """Name the copies of the images that have none yet."""
        result, files, number = list[Kept](), dict[str, Callable[[], bytes]](), 0
        last: dict[str, object] = {}
        for one in kept:
            if one.copy is None:
                dataset = self.shelf.datasets[one.image.dataset]
                plain = channels_of_split(dataset.splits[one.image.split]) is None
                copy, makers = new_copy(
                    number,
                    self.step.index,
                    _reader(self.shelf, one.image, last),
                    plain=plain,
                    maps=dataset.extra,
                )
                files |= makers
                number += 1
                one = replace(one, copy=copy)
            result.append(one)
        return result, files


def _reader(
    shelf: Shelf, image: Candidate, last: dict[str, object]
) -> Callable[[], Mapping[str, np.ndarray]]:
    """Make the function that reads an image for its copy. `last` remembers the image read last."""

    def read() -> Mapping[str, np.ndarray]:
        if last.get("image") is not image:
            dataset, place = shelf.datasets[image.dataset], shelf.position(image)
            assert place is not None
            picture, mask = dataset.splits[image.split].read(place)
            maps = {name: maps.read(place) for name, maps in maps_of(dataset, image.split).items()}
            last["image"], last["arrays"] = image, {"image": picture, "mask": mask, **maps}
        return last["arrays"]  # type: ignore[return-value]

    return read


def _pixels(label: Tensor, classes: int) -> Tensor:
    """Count the pixels of each class, (classes,) int64; ignored ones are left out."""
    flat_label = label.reshape(-1)
    return torch.bincount(flat_label[flat_label < classes], minlength=classes)


def _with(image: Candidate, more: Mapping[int, int]) -> Candidate:
    if not more:
        return image
    pixels = dict(zip(image.classes, image.pixels, strict=True))
    for c, number in more.items():
        pixels[c] = pixels.get(c, 0) + number
    ordered = sorted(pixels)
    return replace(image, classes=tuple(ordered), pixels=tuple(pixels[c] for c in ordered))


def _owner(image: Candidate) -> int:
    """The class that a member of the memory counts for, also where an earlier run chose it in another way."""
    return image.stored_for if image.stored_for is not None else image.classes[0]


# ---------------------------------------------------------------- what is told before the first step


def read_names(file: str) -> list[str]:
    """Read the names of images from a text file, one a line; empty lines and repeated names are skipped.

    Raises:
        ConfigError: the file cannot be read.
    """
    try:
        text = read_text(Path(file).expanduser(), MOST_LIST)
    except (UnreadableError, RuntimeError) as error:  # RuntimeError: a home folder that does not exist
        raise ConfigError(f"scenario.memory.file: {file} cannot be read ({error})") from None
    return list(dict.fromkeys(line.strip() for line in text.splitlines() if line.strip()))


def memory_problems(
    memory: MemoryConfig, steps: Sequence[Step], datasets: Mapping[str, Dataset]
) -> list[str]:
    """List what is wrong with the settings of a memory in view of the data, each as a sentence."""
    if not memory.size or memory.file is None:
        return []
    known = {
        datasets[source.dataset].splits[source.split].id(index)
        for step in steps
        for source in step.train
        for index in source.indices
    }
    unknown = [name for name in read_names(memory.file) if name not in known]
    if not unknown:
        return []
    return [
        f"scenario.memory.file: {memory.file} names {counted(len(unknown), 'image')} that no step trains: "
        f"{some(unknown, LISTED)}"
        "; give the names as the data set has them, without folder and ending"
    ]
