"""Baselines for runs over domains: the relative drop against single-task models, and a joint run as upper bound."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from everseg.config.fields import RunConfig
from everseg.config.loading import identity, to_json
from everseg.display import in_percent
from everseg.errors import EversegError, some
from everseg.files import real_path
from everseg.labels import spelling
from everseg.metrics import defined_mean, relative_drop
from everseg.runs.results import Results, Track
from everseg.runs.run_folder import RECORD, RunFolder


def drop_against_single(
    results: Results, config: RunConfig, refused: list[str] | None = None
) -> dict[str, Any] | None:
    """Compute the relative drop of the last step's mIoU against models trained on one domain each.

    Args:
        results: results of a run over domains with at least one scored step.
        config: its configuration; `scenario.single_task` gives the single-task mIoU in percent, else they are
            looked up in a finished run beside this one with `scenario.single`, in which these domains have the same
            data and were tested on the same classes.
        refused: list that gets a sentence for each run in the same folder that is rejected only because its classes
            differ. It gets none if another run is the baseline.

    Returns:
        `mean` and `domains` (fractions, negative = worse than single-task), `baselines` (domain -> mIoU as a
        fraction) and `source` (where they come from); None unless every domain has a baseline.
    """
    values = {name: v for name, v in results.sequence.get("miou", {}).items() if v is not None}
    given = config.scenario.single_task
    if given is not None:
        found, source = {name: value / 100 for name, value in given.items()}, "scenario.single_task"
    elif config.scenario.single:
        return None
    else:
        found, source = _beside(
            results, _data(config, list(values)), list(values), [] if refused is None else refused
        )
    if not values or not values.keys() <= found.keys() or not all(found[name] for name in values):
        return None
    baselines = {name: found[name] for name in values}
    return {**relative_drop(values, baselines), "baselines": baselines, "source": source}


def _beside(
    results: Results, data: Any, domains: Sequence[str], refused: list[str]
) -> tuple[dict[str, float], str]:
    """Find the single-task mIoU of the first comparable finished single-task run, by name, in the same folder.

    Args:
        data: the result of `_data` for this run.
    """
    scored, unlike = _scored_classes(results), list[str]()
    for other in _neighbours(results):
        try:
            theirs = other.config
            if not theirs.scenario.single or _data(theirs, domains) != data or not other.is_complete():
                continue
            found = _scored_classes(other)
            if apart := [_apart(name, scored[name], found[name]) for name in domains
                         if name in found and found[name].keys() != scored[name].keys()]:  # fmt: skip
                unlike.append(f"{other.folder.path.name} is not a baseline: {'; '.join(apart)}.")
                continue
            if not set(domains) <= found.keys():
                continue
            values = other.sequence["miou"]
        except EversegError:  # a damaged or foreign neighbour is no baseline
            continue
        return {name: value for name, value in values.items() if value is not None}, other.folder.path.name
    refused += unlike
    return {}, ""


def _data(config: RunConfig, domains: Sequence[str]) -> Any:
    """Describe what two runs must share: the data of these domains, and how test images are prepared and labelled.

    Runs that `train.max_iterations` cut short compare only with runs cut in the same way.
    """
    text = to_json(config)
    entries = {name: {**text["data"]["domains"].get(name, {}), "root": None} for name in domains}
    seen = {key: text["data"][key] for key in ("evaluation", "size", "crop", "window", "overlap")}
    cut = text["train"]["max_iterations"]
    return entries, seen, cut, text["scenario"]["test_split"], text["scenario"]["policy"]


def _neighbours(results: Results) -> Iterator[Results]:
    """List the other runs in the folder that contains a run, by name."""
    own = real_path(results.folder.path)
    for path in sorted(own.parent.glob(f"*/{RECORD}")):
        if path.parent != own:
            yield Results(RunFolder(path.parent))


def _apart(domain: str, here: Mapping[str, str], there: Mapping[str, str]) -> str:
    """Describe the classes that only one of two runs was tested on."""
    only = [(where, some([a[key] for key in a if key not in b], 6))
            for where, a, b in (("here", here, there), ("there", there, here))]  # fmt: skip
    return (
        f"domain '{domain}' was tested with other classes ("
        + "; ".join(f"{names} only {where}" for where, names in only if names)
        + ")"
    )


def _scored_classes(results: Results) -> dict[str, dict[str, str]]:
    """Map each domain to the classes that have pixels in its last test, by their spelling."""
    found = {}
    for step in results.steps:
        for name, scores in step.scores.items():
            ious = zip(scores["classes"], scores["class_iou"], strict=True)
            found[name] = {spelling(label): label for label, value in ious if value is not None}
    return found


def domain_rows(scores: Mapping[int, Mapping[str, float | None]], results: Results) -> list[dict[str, Any]]:
    """Make one row per step: domains trained, mIoU of each tested domain and their mean, in unrounded percent.

    Args:
        scores: step -> domain -> mIoU over all its classes, as a fraction.
        results: of the run.
    """
    names = results.in_order(dict.fromkeys(name for tested in scores.values() for name in tested))
    rows = []
    for index, tested in scores.items():
        values = {name: tested.get(name) for name in names} | {"mean": defined_mean(tested.values())}
        shown = {name: in_percent(value) for name, value in values.items()}
        rows.append({"step": index, "trained": results.taught.get(index, ""), **shown})
    return rows


_FREE = ("scenario.joint", "scenario.lists", "train.epochs_next", "train.lr_next", "method.")
"""Settings that may differ: the method, and those about the steps or their images. Joint training has one step with all
images."""


def joint_beside(results: Results, refused: list[str] | None = None) -> tuple[str, dict[str, Track]] | None:
    """Find the first finished joint run, by name, in the same folder and with exactly the same setting.

    The same setting means: equal values of every setting that can change a result, the seed included, except those in
    `_FREE`; no separate image lists; and a last test with the same classes in the same order, on the same images with
    the same labels.

    Args:
        refused: list that gets a sentence for each joint run of this setting that is rejected because its classes or
            test images differ. It gets none if another run is found.

    Returns:
        The name of its folder, and its results under the names that this run uses; None without such a run.
    """
    config = results.config
    if config.scenario.joint or config.scenario.single:
        return None
    own, tested, unlike = _setting(config), _tested(results), list[str]()
    for other in _neighbours(results):
        try:
            if not _is_joint(other):
                continue
            theirs = other.config
            if theirs.scenario.lists or _setting(theirs) != own:
                continue
            same = _tested(other) == tested
            if not other.is_complete():
                continue
            found = {track.name: track for track in other.tracks} if same else {}
        except EversegError:  # a damaged or foreign neighbour is no upper bound
            continue
        if same and all(_classes(found.get(track.name)) == _classes(track) for track in results.tracks):
            return other.folder.path.name, found
        what = "knows other classes, or in another order" if same else "was tested on other images or labels"
        unlike.append(f"The joint run {other.folder.path.name} is left out: it {what}.")
    if refused is not None:
        refused += unlike
    return None


def _setting(config: RunConfig) -> dict[str, Any]:
    return {key: value for key, value in identity(config).items() if not key.startswith(_FREE)}


def _is_joint(results: Results) -> bool:
    """Whether a run is joint training. Uses only the stored configuration, unchecked: checking takes longer.

    Raises:
        CheckpointError: its run.json cannot be read.
    """
    stored = results.record.config
    scenario = stored.get("scenario") if isinstance(stored, dict) else None
    return isinstance(scenario, dict) and scenario.get("joint") is True


def _tested(results: Results) -> list[Mapping[str, Any]]:
    """Read what the last step is tested on: images and label tables.

    Raises:
        CheckpointError: scenario.json is damaged.
    """
    sources = results.planned[-1]["test"] if results.planned else []
    return [{k: v for k, v in source.items() if k != "images"} for source in sources]


def _classes(track: Track | None) -> Any:
    if track is None:
        return None
    return [spelling(name) for name in track.space.names], [len(group) for group in track.space.groups]
