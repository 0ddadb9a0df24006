"""What a run cost: training time and memory per step, parameters that later steps trained, and images that it kept.

All of it is read from what a finished run has stored: the journal, the weights of its steps and their memory.
"""

from __future__ import annotations

from collections import defaultdict
from statistics import fmean

from everseg.errors import CheckpointError
from everseg.runs.model_folder import changed_parameters
from everseg.runs.results import Results

TIME, STEP_TIME, MEMORY = "time", "time per later step", "memory"
TRAINED, PARAMETERS, IMAGES, BYTES = "parameters trained", "parameters", "images kept", "bytes kept"
COSTS = (TIME, STEP_TIME, MEMORY, TRAINED, PARAMETERS, IMAGES, BYTES)
"""Names of the numbers, in their order."""


def costs(results: Results) -> tuple[dict[str, float | None], list[str]]:
    """Compute what a finished run cost, and say what could not be found out.

    Later steps are all but the first. A run of one step, such as joint training, has none of them.

    Returns:
        Name of a number -> seconds, bytes or a count; None = not known or not defined. And sentences.

    Raises:
        CheckpointError: the journal is damaged.
    """
    seconds, memory = _by_step(results)
    later = results.finished[1:]
    timed = [seconds[index] for index in later if index in seconds]
    used = [memory[index] for index in (later or results.finished) if index in memory]
    trained, parameters, notes = _parameters(results)
    images, size = _kept(results)
    return {
        TIME: training_seconds(results),
        # A step without a line in the journal has no time, and then neither has the mean.
        STEP_TIME: fmean(timed) if timed and len(timed) == len(later) else None,
        MEMORY: max(used, default=None),
        TRAINED: trained,
        PARAMETERS: parameters,
        IMAGES: images,
        BYTES: size,
    }, notes


def training_seconds(results: Results) -> float | None:
    """Sum up the seconds of training over all steps; None where the journal says nothing of them.

    Raises:
        CheckpointError: the journal is damaged.
    """
    seconds, _ = _by_step(results)
    return sum(seconds.values()) if seconds else None


def _by_step(results: Results) -> tuple[dict[int, float], dict[int, float]]:
    """Compute each step's seconds of training, pre-tuning and passes, and its largest memory, from the journal.

    A first step that was copied from another run counts with what its training took there.
    """
    spent, memory = defaultdict[int, float](float), dict[int, float]()
    last = dict[tuple[int, str, int | None], int]()
    try:
        for entry in results.journal:
            if entry["event"] not in ("train", "tune", "pass"):
                continue
            # Each pre-tuning, and the pass without gradients, counts its own iterations.
            step, done = entry["step"], entry["iteration"]
            phase = (step, entry["event"], entry.get("tuning"))
            images = (done - last.get(phase, 0)) * entry.get("images", results.config.train.batch)
            spent[step] += images / entry["images_per_second"] if entry["images_per_second"] else 0.0
            last[phase] = done
            if "memory" in entry:
                memory[step] = max(memory.get(step, 0.0), float(entry["memory"]))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{results.folder.path / 'journal.jsonl'} is damaged ({error!r}); move it away to compare without times"
        ) from None
    return spent, memory


def _parameters(results: Results) -> tuple[float | None, float | None, list[str]]:
    """Compute the mean number of parameters that a later step trained, and how many the last model has.

    Scores do not depend on the weights, so that weights which are gone or damaged only leave these two out.
    """
    try:
        counts = [
            changed_parameters(now.weights, None if now.is_fresh else before.weights)
            for before, now in zip(results.steps, results.steps[1:], strict=False)
        ] or [changed_parameters(results.steps[-1].weights, None)]
    except CheckpointError as error:
        return None, None, [f"How many parameters {results.folder.path} trained is not known: {error}."]
    total = counts[-1][1] or None
    trained = fmean(changed for changed, _ in counts) if total and len(results.steps) > 1 else None
    return trained, total, []


def _kept(results: Results) -> tuple[float, float | None]:
    """Count the images of earlier steps that the run keeps at its end, and the bytes of those that it copied.

    Raises:
        CheckpointError: the memory is damaged.
    """
    if not results.memories:
        return 0, None
    last = results.memories[-1]
    return last.images, float(last.bytes) if last.copied else None
