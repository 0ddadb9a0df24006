"""The verdict of a report: what a user should worry about in a run, each with a line of what to do.

Every check has limits of its own; docs/report.md states them. A check that cannot be made says nothing rather than
"fine".
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from safetensors import SafetensorError, safe_open

from everseg.display import counted, percent, share
from everseg.errors import EversegError, some
from everseg.files import UnreadableError, check_regular
from everseg.metrics import defined_mean
from everseg.reports.extension import gate_line
from everseg.reports.figures import Curves
from everseg.reports.kinds import Kind
from everseg.runs.model_folder import WEIGHTS
from everseg.runs.results import Results, Track


class Light(StrEnum):
    """How urgent a finding is."""

    RED = "problem"
    AMBER = "look"
    GREEN = "fine"


@dataclass(frozen=True)
class Finding:
    """One light of the verdict."""

    light: Light
    about: str
    """What was looked at, in a word or two."""
    said: str
    """What was found, with figures."""
    then: str = ""
    """What to do; "" where all is well."""


AT_ZERO = 0.005
"""IoU below which a class counts as not learnt: 0.5 %."""
FALLEN = (0.05, 0.2)
"""Share of the old classes' mean IoU that may be lost: up to the first it is fine, beyond the second a problem."""
BELOW_SHARE = 0.5
"""A new class is called too rarely where fewer than this share of its true pixels' number are called so."""
FLOODED = (0.02, 0.1)
"""Share of the area of images without a new class that may be called so."""
ALTERNATING = (0.01, 0.04)
"""Share of the pixels that may alternate with their neighbours (`alternation`), beyond the labels' own."""
FEW_IMAGES = (5, 20)
"""Test images: below the first a problem, below the second worth a look."""
FEW_WITH = 5
"""Test images that show a class: with fewer its IoU says little."""
FEW_ITERATIONS = 100
STILL_FALLING = 0.1
"""Share by which the loss may fall in the last fifth of a step, against the fifth before it."""
SMALL_BATCH = 4
"""Images that a batch norm should see at once."""


def _light(value: float, limits: tuple[float, float]) -> Light:
    return Light.GREEN if value <= limits[0] else Light.AMBER if value <= limits[1] else Light.RED


def verdict(
    results: Results,
    kind: Kind,
    curves: Curves | None,
    alternating: Mapping[str, float] | None = None,
) -> list[Finding]:
    """Look at everything that a run has stored and say what to worry about, problems first.

    Args:
        curves: of the training, if the journal has any.
        alternating: name of the results -> what `alternation` gives for its pictures; {} or None where there are none.
    """

    def over(check: Callable[[Track, Sequence[int]], Finding | None]) -> list[Finding]:
        return _each(results, lambda track: check(track, _new(results, track, kind)))

    checks: list[Callable[[], list[Finding]]] = [
        lambda: over(lambda track, new: at_zero(track, new, kind)),
        lambda: [] if kind in (Kind.JOINT, Kind.FIRST, Kind.SINGLE) else _old(results, kind),
        lambda: over(lambda track, new: below_its_share(track, new, kind)),
        lambda: over(lambda track, new: flooding(results, track, new)),
        lambda: checkerboards(alternating or {}),
        lambda: few_images(results),
        lambda: cut_short(results, curves),
        lambda: tiny_batches(results),
    ]
    found: list[Finding] = []
    for check in checks:
        try:
            found += check()
        except EversegError as error:  # the other checks still say what they can
            found.append(Finding(Light.AMBER, "stored files", f"a check could not be made: {error}"))
    found = list(dict.fromkeys(found))
    order = list(Light)
    return sorted(found, key=lambda one: order.index(one.light))


def _each(results: Results, check: Callable[[Track], Finding | None]) -> list[Finding]:
    """Make a check for every domain, and name the domains where there are several. The worst light speaks for all."""
    several = len(results.tracks) > 1
    found = [(track.name, check(track)) for track in results.tracks]
    told = [(name, one) for name, one in found if one is not None]
    if not told:
        return []
    order = list(Light)
    worst = min((one for _, one in told), key=lambda one: order.index(one.light))
    if not several:
        return [worst]
    shown = [(name, one) for name, one in told if (one.light is Light.GREEN) == (worst.light is Light.GREEN)]
    said = "; ".join(f"{name}: {one.said}" for name, one in shown)
    return [Finding(worst.light, worst.about, said, worst.then)]


def _new(results: Results, track: Track, kind: Kind) -> list[int]:
    """Train ids of the classes that the last step added to others, without background; [] where it added none."""
    if kind is Kind.EXTENSION:
        names = set(results.steps[-1].scores[track.name]["new_classes"])
        return [c for c, name in enumerate(track.space.names) if name in names and c != track.background]
    apart = kind in (Kind.SEQUENCE, Kind.DOMAINS) and track.steps[-1] == results.steps[-1].index
    if not apart or len(track.steps) < 2:
        return []
    return [c for c in range(track.space.num_classes) if c not in set(track.old) and c != track.background]


def _ious(track: Track) -> list[float | None]:
    found: list[float | None] = track.scores[-1]["class_iou"]
    return found


def _teach_more(kind: Kind) -> str:
    """What to do for classes that a step hardly learnt, with settings that this kind of run can have."""
    if kind in (Kind.EXTENSION, Kind.REFINEMENT):
        return "Extend again with more images or more epochs (train.epochs=...)"
    epochs = "train.epochs, train.epochs_next" if kind in (Kind.SEQUENCE, Kind.DOMAINS) else "train.epochs"
    return f"Train longer ({epochs}), or weigh rare classes (scenario.class_weights=computed)"


def at_zero(track: Track, new: Sequence[int], kind: Kind) -> Finding | None:
    """Whether a class that test images show is not found at all, and whether it was when it was learnt."""
    ious, called = _ious(track), track.counts[-1].sum(axis=0)
    real = [c for c, iou in enumerate(ious) if iou is not None and c != track.background]
    gone = [c for c in real if (ious[c] or 0.0) < AT_ZERO]
    if not real:
        return None
    if not gone:
        return Finding(Light.GREEN, "classes at 0", "no class has an IoU near 0")
    names = track.space.names
    never = [names[c] for c in gone if not called[c]]
    how = ""
    if never:
        how = "; never predicted" if len(never) == len(gone) else f"; never predicted: {some(never, 6)}"
    which = some([names[c] for c in gone], 6)
    said = f"IoU below {share(AT_ZERO)} for {which} ({len(gone)} of {len(real)} classes{how})"
    forgotten = [c for c in gone if (track.scores[track.at_birth(c)]["class_iou"][c] or 0.0) >= AT_ZERO]
    if forgotten:
        said += f"; found when learnt, and forgotten since: {some([names[c] for c in forgotten], 6)}"
    advice = "See below what their pixels are taken for"
    if kind in (Kind.EXTENSION, Kind.REFINEMENT) and (old := [c for c in gone if c not in new]):
        known = some([names[c] for c in old], 6)
        advice += (
            f". The deployed model knew {known}: keep it, or extend again with everseg extend --how thorough"
        )
        forgotten = [*{*forgotten, *old}]
    if len(forgotten) < len(gone):
        advice += f". {_teach_more(kind)}, and see whether the labels of these classes are right (everseg data check)"
    return Finding(Light.RED, "classes at 0", said, advice)


def _old(results: Results, kind: Kind) -> list[Finding]:
    """Whether what was known before has been lost."""
    method = results.config.method.name
    if kind in (Kind.EXTENSION, Kind.REFINEMENT):
        kept = results.steps[-1].kept
        if kept.get("share") is None:
            return [Finding(
                Light.AMBER, "old classes", "nothing says how much of the old classes is left",
                "Give images with labels of old classes (everseg extend --old-val DATA)",
            )]  # fmt: skip
        light = Light.RED if gate_line(kept).startswith("FAIL") else _light(1 - float(kept["share"]), FALLEN)
        said = f"{percent(kept['share'])} % of the old classes' quality is left, {kept['how']}"
        advice = "Keep the deployed model, or extend again with everseg extend --how thorough"
        return [Finding(light, "old classes", said, "" if light is Light.GREEN else advice)]
    return _each(results, lambda track: fallen(track, method))


def fallen(track: Track, method: str) -> Finding | None:
    """Whether old classes have less IoU than when they were learnt."""
    rows = [
        (track.space.names[c], track.scores[track.at_birth(c)]["class_iou"][c], _ious(track)[c])
        for c in track.old
        if c != track.background
    ]
    known = [(name, before, now) for name, before, now in rows if before is not None and now is not None]
    then, now = defined_mean(row[1] for row in known), defined_mean(row[2] for row in known)
    if not known or not then or now is None:
        return None
    light = _light(1 - now / then, FALLEN)
    plain = " without background" if track.counts_background else ""
    said = f"the old classes have {percent(now)} mIoU{plain} now, {percent(then)} when they were learnt"
    halved = [name for name, before, after in known if before >= AT_ZERO and after < before / 2]
    if halved:
        said += f"; less than half is left of {some(halved, 6)}"
        light = Light.AMBER if light is Light.GREEN else light
    if light is Light.GREEN:
        return Finding(light, "old classes", said)
    advice = (
        "Fine-tuning forgets by design: use a method that keeps old classes, such as mib (everseg list methods)"
        if method == "ft"
        else "Give the method more weight on old classes, try another one (everseg list methods), or keep images of "
        "earlier steps (scenario.memory.size)"
    )
    return Finding(light, "old classes", said, advice)


def below_its_share(track: Track, new: Sequence[int], kind: Kind) -> Finding | None:
    """Whether a new class is called so on far fewer pixels than it has. Of classes at 0, `at_zero` tells."""
    counts = track.counts[-1]
    truth, called = counts.sum(axis=1), counts.sum(axis=0)
    found = [c for c in new if truth[c] and (_ious(track)[c] or 0.0) >= AT_ZERO]
    few = [c for c in found if called[c] < BELOW_SHARE * truth[c]]
    if not found:
        return None
    if not few:
        least = percent(BELOW_SHARE, digits=0)
        said = f"for each new class that is found, the area called so is at least {least} % of the true one"
        return Finding(Light.GREEN, "share of new classes", said)
    total = max(int(counts.sum()), 1)
    each = [
        f"{track.space.names[c]} ({share(called[c] / total)} of the pixels called so, {share(truth[c] / total)} true)"
        for c in few
    ]
    return Finding(
        Light.AMBER,
        "share of new classes",
        f"called too rarely: {some(each, 4)}",
        _teach_more(kind),
    )


def flooding(results: Results, track: Track, new: Sequence[int]) -> Finding | None:
    """Whether a new class is found where it is not."""
    if not new:
        return None
    names = [track.space.names[c] for c in new]
    told = [
        (one.name, one.false_share if one.false_without is None else one.false_without, one.images_without)
        for one in results.steps[-1].taught(track.name, names)
    ]
    known = [(name, value, images) for name, value, images in told if value is not None]
    if not known:
        return None
    worst = max(value for _, value, _ in known)
    light = _light(worst, FLOODED)
    if light is Light.GREEN:
        return Finding(light, "flooding", f"new classes cover at most {share(worst)} of where they are not")
    each = [
        f"{name} on {share(value)} of "
        + (f"the area of {counted(images, 'image')} without it" if images else "the other pixels")
        for name, value, images in known
        if value > FLOODED[0]
    ]
    advice = "Add training images without the class, which teach where it is not"
    if track.background is not None and "mib" not in results.config.method.name:
        advice += ", or use a method that models the background (mib)"
    return Finding(light, "flooding", f"found where it is not: {some(each, 4)}", advice)


def alternation(ids: np.ndarray, distance: int) -> float:
    """Share of the pixels that differ from both pairs of opposite neighbours at a distance, each pair being alike.

    A checkerboard has it everywhere, an edge nowhere.

    Args:
        ids: (H, W) ids.
        distance: of the neighbours, in pixels.

    >>> alternation(np.indices((8, 8)).sum(0) % 2, 1), alternation(np.tile([0, 0, 0, 0, 1, 1, 1, 1], (8, 1)), 1)
    (1.0, 0.0)
    """
    k = distance
    if min(ids.shape) <= 2 * k:
        return 0.0
    centre = ids[k:-k, k:-k]
    left, right = ids[k:-k, : -2 * k], ids[k:-k, 2 * k :]
    above, below = ids[: -2 * k, k:-k], ids[2 * k :, k:-k]
    found = (left == right) & (above == below) & (left != centre) & (above != centre)
    return float(found.mean())


def checkerboards(alternating: Mapping[str, float]) -> list[Finding]:
    """Whether predictions alternate from pixel to pixel, as an undertrained decoder makes them."""
    if not alternating:
        return []
    worst = max(alternating.values())
    light = _light(worst, ALTERNATING)
    if light is Light.GREEN:
        return [Finding(light, "checkerboards", "the predictions have no pattern of single pixels")]
    where = some([name for name, value in alternating.items() if value > ALTERNATING[0]], 4)
    of = f" of {where}" if len(alternating) > 1 else ""
    return [
        Finding(
            light,
            "checkerboards",
            f"{share(worst)} of the pixels in the pictures{of} alternate like a checkerboard",
            "The decoder is not trained enough: train longer, or with a higher learning rate",
        )
    ]


def few_images(results: Results) -> list[Finding]:
    """Whether there are enough test images, over all and per class."""
    last = results.steps[-1].index
    number = sum(source["images"] for e in results.planned if e["index"] == last for source in e["test"])
    light = Light.RED if number < FEW_IMAGES[0] else Light.AMBER if number < FEW_IMAGES[1] else Light.GREEN
    said = counted(number, "test image")
    rare = []
    for track in results.tracks if number >= FEW_WITH else ():
        images = results.steps[-1].images.get(track.name)
        if images is None:
            continue
        shown = (images[:, 0] > 0).sum(axis=0)
        rare += [
            f"{track.space.names[c]} ({int(shown[c])})"
            for c in range(track.space.num_classes)
            if 0 < shown[c] < FEW_WITH and c != track.background
        ]
    if rare:
        said += f"; few of them show {some(rare, 6)}"
        light = Light.AMBER if light is Light.GREEN else light
    if light is Light.GREEN:
        return [Finding(light, "test images", said)]
    advice = "Test on more images: with so few a difference of a few points says little"
    return [Finding(light, "test images", said, advice)]


def cut_short(results: Results, curves: Curves | None) -> list[Finding]:
    """Whether training ended early: steps that are missing, a limit on iterations, a loss that still falls."""
    train, said = results.config.train, []
    missing = len(results.planned) - len(results.steps)
    if missing > 0:
        said.append(f"{missing} of {len(results.planned)} steps are not trained")
    most = train.max_iterations
    # A limit above the iterations of the epochs changes nothing. Without a journal it is not known to.
    limited = most is not None and (
        curves is None or max((one["iterations"] for one in curves.speed.values()), default=0) >= most
    )
    if limited:
        said.append(f"no step has more than {most} iterations (train.max_iterations)")
    elif curves is not None:
        short = [
            f"step {step}: {int(values['iterations'])}"
            for (step, passing), values in curves.speed.items()
            if not passing and values["iterations"] < FEW_ITERATIONS
        ]
        said += [f"few iterations ({some(short, 4)})"] if short else []
    if curves is not None:
        falls = [
            f"in step {step} by {percent(value)} %" for step, value in _falls(curves) if value > STILL_FALLING
        ]
        said += [f"the loss still fell in the last fifth of training, {some(falls, 4)}"] if falls else []
    if not said:  # without a journal nobody knows
        fine = Finding(Light.GREEN, "length of training", "no step was cut short")
        return [fine] if curves is not None else []
    then = "Run the same command again: it continues" if missing > 0 else (
        "Leave out train.max_iterations" if limited
        else "Train longer (train.epochs, train.epochs_next)"
    )  # fmt: skip
    return [Finding(Light.AMBER, "length of training", "; ".join(said), then)]


def _falls(curves: Curves) -> list[tuple[int, float]]:
    """Give by which share the loss fell in the last fifth of each step, against the fifth before it."""
    name = (
        "loss/sum" if "loss/sum" in curves.series else next((f"loss/{term}" for term in curves.terms), None)
    )
    if name is None:
        return []
    at, values = (np.array(part, dtype=np.float64) for part in curves.series[name])
    ends = [first for _, first in curves.starts[1:]] + [np.inf]
    found = []
    for (step, first), end in zip(curves.starts, ends, strict=True):
        mine = values[(at > first) & (at <= end)]
        fifth = len(mine) // 5
        if fifth >= 3:
            before, last = float(mine[-2 * fifth : -fifth].mean()), float(mine[-fifth:].mean())
            found.append((step, 1 - last / before if before > 0 else 0.0))
    return found


def tiny_batches(results: Results) -> list[Finding]:
    """Whether batch norms were trained on too few images at once."""
    train = results.config.train
    if not _has_batch_norm(results):
        return []
    seen = train.batch // train.accumulate
    # Of all processes together, and how many there were is not stored.
    apart = "" if train.sync_norm else " (if several processes trained, each saw a part of them)"
    if seen >= SMALL_BATCH:
        return [Finding(Light.GREEN, "batch norm", f"its statistics are of {seen} images at a time{apart}")]
    return [
        Finding(
            Light.RED if seen <= 1 else Light.AMBER,
            "batch norm",
            f"its statistics are of {counted(seen, 'image')} at a time{apart}, which makes them noisy",
            f"Use at least {SMALL_BATCH} images per device and part (train.batch, train.accumulate), or freeze the "
            "norms if the method can (everseg list methods)",
        )
    ]


def _has_batch_norm(results: Results) -> bool:
    """Whether the last model keeps running statistics. Only the names in its file are read, not its weights."""
    folder = results.steps[-1].final.folder
    try:
        check_regular(folder / WEIGHTS, root=folder)
        with safe_open(folder / WEIGHTS, framework="numpy") as opened:
            return any(name.endswith("running_mean") for name in opened.keys())  # noqa: SIM118
    except (OSError, UnreadableError, SafetensorError):  # gone weights are told where pictures need them
        return False
