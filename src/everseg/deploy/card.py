"""The model card of a bundle, in Markdown."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from everseg.deploy.onnx import OLDEST
from everseg.deploy.precisions import reduced_text
from everseg.display import UNDEFINED, counted, for_markdown, percent, printable
from everseg.errors import some
from everseg.labels import BACKGROUND, is_background_name
from everseg.runs.command import FROM_PYTHON
from everseg.runs.model_folder import ModelFile, Registry
from everseg.runs.results import OnNew, Taught

NOT_MEASURED = "not measured"
WEAK = 0.5
"""A class is weak if its IoU is below this share of the mean IoU."""
WEAK_ALONE = 0.3
"""Where no mean over all classes is known, a new class is weak if its IoU is below this."""


def model_card(
    name: str,
    about: ModelFile,
    lineage: Mapping[str, Any],
    parameters: int,
    memory: int = 0,
    vectors: int = 0,
) -> str:
    """Write the model card: classes, scores, origin and usage of the model.

    Args:
        name: name of the bundle.
        about: description of the bundle's model.
        lineage: content of the bundle's `lineage.json`.
        parameters: number of weights.
        memory: number of images of the training data in the bundle.
        vectors: number of samples of its features in the bundle.
    """
    history = lineage["history"]
    parts = [
        f"# {for_markdown(name)}",
        _summary(about, lineage, parameters, memory, vectors),
        "## Classes",
        "\n".join(_classes(about.lasting_ids(name), history)),
        *_steps(history),
        *_weak(history),
        "## Use",
        _use(name, about, lineage),
        "## Where it comes from",
        "\n".join(_origin(lineage)),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _summary(about: ModelFile, lineage: Mapping[str, Any], parameters: int, memory: int, vectors: int) -> str:
    known = [entry for entry in about.lasting_ids("this").classes if entry.branches]
    branches = list(about.spaces)
    holds = (
        f"**It holds {memory} image{'' if memory == 1 else 's'} of its training data with their labels** "
        "(memory.json), on which later steps are trained again."
        if memory
        else "It holds no image of its training data."
    )
    if vectors:
        holds += (
            f" It holds {vectors} vectors of its features on test images, without labels or places "
            "(sketch.safetensors): a later extension asks them what the old classes lose."
        )
    through = f", branches {', '.join(map(for_markdown, branches))}" if len(branches) > 1 else ""
    return (
        f"A semantic-segmentation model: {counted(len(known), 'class')} after {lineage['steps']} step"
        f"{'' if lineage['steps'] == 1 else 's'}, `{_code(str(about.architecture['name']))}`, "
        f"{parameters / 1e6:.1f} M weights{through}. {_readout(about)}Written {lineage['created']} by everseg "
        f"{lineage['versions']['everseg']}. {holds}"
    )


def _readout(about: ModelFile) -> str:
    """Say how outputs become classes, where it is not the arg-max of the logits."""
    readout = about.readout.to_json()
    if not readout:
        return ""
    rule = ", ".join(f"{key} {_plain(value)}" for key, value in readout.items())
    return (
        f"The class of a pixel is not the arg-max of the logits but comes from them by the readout: {rule}. "
    )


def _plain(value: Any) -> str:
    return " and ".join(value) if isinstance(value, list) else str(value).lower()


def _classes(registry: Registry, history: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield the rows of the table of classes, with scores from the last step that tested each class."""
    found: dict[str, str] = {}
    for entry in history:
        if changed := entry.get("changed"):
            # A merged class was never tested as such.
            found = {changed["rename"].get(name, name): text for name, text in found.items()}
            continue
        tested: dict[str, list[str]] = {}
        for result, scores in entry["scores"].items():
            for name, value in scores["class_iou"].items():
                if not _measures_old(entry, scores) and name not in entry.get("classes", ()):
                    continue
                whose = f"{result} " if len(entry["scores"]) > 1 else ""
                tested.setdefault(name, []).append(whose + percent(value))
        found |= {name: ", ".join(texts) for name, texts in tested.items()}
    yield "| id | class | learnt in step | IoU % | colour |"
    yield "|---|---|---|---|---|"
    for known in registry.classes:
        colour = "#{:02x}{:02x}{:02x}".format(*known.colour)
        gone = "" if known.branches else " (not in this model any more)"
        iou = found.get(known.name, UNDEFINED)
        cells = [known.id, for_markdown(known.name) + gone, known.step, iou, colour]
        yield f"| {' | '.join(map(str, cells))} |"


def _steps(history: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    if not history:
        return
    rows = [
        "| step | method | new classes | tested on | old | new | all | all without background |",
        "|---" * 8 + "|",
    ]
    for entry in history:
        if changed := entry.get("changed"):
            marks = [
                str(entry["step"]),
                entry["method"],
                for_markdown(changed_text(changed)),
                *[UNDEFINED] * 5,
            ]
            rows.append(f"| {' | '.join(marks)} |")
        for result, scores in entry["scores"].items():
            tested = next((source for source in entry["test"]), {"data": UNDEFINED, "images": 0})
            where = f"{tested['data']} ({tested['images']})" if len(entry["scores"]) == 1 else result
            means = [percent(scores["miou"].get(group)) for group in ("old", "new", "all")]
            if not _measures_old(entry, scores):
                means[0] = means[2] = NOT_MEASURED
            plain = percent(scores["miou_without_background"]["all"])
            if not _measures_old(entry, scores):
                plain = NOT_MEASURED
            names = ", ".join(name for name in entry["classes"] if name != BACKGROUND)
            cells = [
                str(entry["step"]),
                for_markdown(entry["method"]),
                for_markdown(names),
                for_markdown(where),
                *means,
                plain,
            ]
            rows.append(f"| {' | '.join(cells)} |")
    yield "## Steps"
    yield "mIoU in percent after each step, over the classes with a pixel in the test images."
    yield "\n".join(rows)
    for entry in history:
        for scores in entry["scores"].values():
            if scores.get("taught"):
                each = "; ".join(Taught(**one).text for one in scores["taught"])
                yield f"Step {entry['step']}, on every test image: {for_markdown(each)}"
            if scores.get("old"):
                went = for_markdown(_old_on_new(scores["old"]))
                yield f"Step {entry['step']}, old classes on the same images: {went}"
    for entry in history:
        if entry.get("kept"):
            told = (entry["kept"]["text"], *entry["kept"].get("notes", ()))
            yield f"Step {entry['step']}: " + "; ".join(map(for_markdown, told))


def _old_on_new(stored: Sequence[Mapping[str, Any]]) -> str:
    """Say how each old class went on the images of an extension, IoU in percent before and after."""
    found = [OnNew(**one) for one in stored]
    told = [
        f"{one.name} {percent(one.before)} before, {percent(one.after)} after" for one in found if one.pixels
    ]
    others = [one.name for one in found if not one.pixels]
    if others:
        told.append(f"{NOT_MEASURED}, as the images show no label of it: {some(others, 12)}")
    return "; ".join(told) + " (IoU, percent)"


def _measures_old(entry: Mapping[str, Any], scores: Mapping[str, Any]) -> bool:
    """Whether a step's test images label an old class, if there is one.

    Where they do not, as in most extensions, old classes are background there, so the background's score says nothing.
    """
    old = [
        value
        for name, value in scores["class_iou"].items()
        if name not in entry.get("classes", ()) and not is_background_name(name)
    ]
    return not old or any(value is not None for value in old)


def changed_text(changed: Mapping[str, Any]) -> str:
    """Say which classes a step without training dropped, merged and renamed."""
    told = [f"without {name}" for name in changed["drop"]]
    told += [f"{' + '.join(names)} = {new}" for new, names in changed["merge"].items()]
    told += [f"{old} = {new}" for old, new in changed["rename"].items()]
    return "; ".join(told)


def _weak(history: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield the section on classes whose IoU is far below the mean of the last step that was tested."""
    last = next((entry for entry in reversed(history) if entry["scores"]), None)
    if last is None:
        return
    found = []
    unmeasured = False
    for scores in last["scores"].values():
        mean = scores["miou"]["all"]
        measured = _measures_old(last, scores)
        unmeasured = unmeasured or not measured
        found += [
            f"{name} ({percent(value)})"
            for name, value in scores["class_iou"].items()
            if value is not None and mean is not None
            if (value < WEAK * mean if measured else value < WEAK_ALONE and name in last.get("classes", ()))
        ]
    yield "## Weak classes"
    names = ", ".join(map(for_markdown, found)) or "none"
    if unmeasured:
        yield f"New classes with an IoU below {percent(WEAK_ALONE, digits=0)} %: {names}."
        yield "Old classes are not measured: the last step's test images do not label them."
    else:
        yield f"IoU below {percent(WEAK, digits=0)} % of the mean of the last step: {names}."


def _use(name: str, about: ModelFile, lineage: Mapping[str, Any]) -> str:
    domain = f" --domain {next(iter(about.spaces))}" if len(about.spaces) > 1 else ""
    lines = [f"everseg predict {name} IMAGES -o out{domain}"]
    if lineage["parity"]:
        lines.append(
            f"python example.py IMAGE...            # onnxruntime (from {OLDEST} on), numpy and Pillow only"
        )
    lines.append(f"everseg extend {name} --data NEW.yaml --add CLASS,CLASS --method mib")
    return (
        "```sh\n"
        + "\n".join(lines)
        + "\n```\n\nMasks hold the class ids above; an id is never given to another class."
    )


def _origin(lineage: Mapping[str, Any]) -> Iterator[str]:
    if run := lineage.get("run"):
        started = f"Command: `{_code(run['command'])}`" if run["command"] else f"Started {FROM_PYTHON}"
        yield f"* {started} (seed {run['seed']}, configuration {run['config_hash'][:12]}…)"
    if source := lineage.get("source"):
        yield f"* Made of: {for_markdown(source)}"
    if lineage["parent"]:
        yield f"* Extended from the bundle {lineage['parent'][:12]}…"
    for entry in lineage["history"]:
        if changed := entry.get("changed"):
            yield f"* Step {entry['step']} changed classes without training: {for_markdown(changed_text(changed))}."
            continue
        lists = ", ".join(
            f"{s['images']} of {for_markdown(s['data'])} ({s['sha256'][:12]}…)" for s in entry["train"]
        )
        yield f"* Step {entry['step']} was trained on {lists}; a list is named by the hash of its images and labels."
    for branch, parity in lineage["parity"].items():
        yield (
            f"* ONNX of branch '{for_markdown(branch)}' against PyTorch on {for_markdown(parity['source'])} "
            f"{at_sizes(parity)}: "
            f"largest difference of a logit {parity['logit_difference']:.1e}, same class on "
            f"{percent(parity['equal_pixels'], digits=4)} % of the pixels."
        )
    for branch, each in lineage.get("reduced", {}).items():
        for precision, one in each.items():
            yield f"* {for_markdown(reduced_text(branch, precision, one, len(lineage['reduced']) > 1))}."
    yield f"* Versions: {', '.join(f'{name} {number}' for name, number in lineage['versions'].items())}"


def at_sizes(parity: Mapping[str, Any]) -> str:
    """Say at which sizes (H, W) an ONNX file was compared, and whether it takes no other."""
    sizes = parity["sizes"]
    if sizes and parity.get("one_size"):  # bundles of earlier versions have no such entry
        return f"at {' x '.join(map(str, sizes[0]))}, the only size that it takes"
    return f"at {counted(len(sizes), 'size')}"


def _code(text: str) -> str:
    """Text between backticks, where only these and line ends have a meaning."""
    return " ".join(printable(text).split()).replace("`", "'")
