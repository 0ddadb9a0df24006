"""A whole run: train all steps in order, score each one when it is finished, and resume where the run stopped."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from accelerate import Accelerator

from everseg import registry
from everseg.config.fields import (
    DataConfig,
    DomainConfig,
    MemoryConfig,
    MethodConfig,
    ModelConfig,
    RunConfig,
    ScenarioConfig,
)
from everseg.config.loading import config_hash, identity
from everseg.data.batches.extra import MapFolder, missing_maps
from everseg.data.channels import Channels, same_channels
from everseg.display import counted
from everseg.distributed import all_reduce_max, derive_seed
from everseg.engine.events import Events, Sink
from everseg.engine.memory import memory_before, memory_problems
from everseg.engine.one_pass import length_of, order_of
from everseg.engine.optim import warmup_length
from everseg.engine.param_groups import encoder_layers
from everseg.engine.peers import all_present, unfit_for_shards
from everseg.engine.prepare import Prepared, prepare
from everseg.engine.runtime import StopRequest, computes_bf16, make_accelerator
from everseg.engine.session import Session
from everseg.engine.step import StepJob, epoch_of, iterations_of
from everseg.engine.tensorboard import tensorboard
from everseg.engine.trackers import TITLES, Tracker, check_installed
from everseg.errors import CheckpointError, ConfigError, DataError, EversegError
from everseg.inference.count import Evaluation, evaluate, score_step, user_builder, views_of
from everseg.labels import IGNORED, LabelSpace, policy_set
from everseg.methods import switches
from everseg.methods.base import Method
from everseg.methods.build import build_method
from everseg.models.build import build_model
from everseg.models.model import SegmentationModel, frozen_copy
from everseg.models.stored import Sizes
from everseg.progress import Progress
from everseg.runs.commit import (
    load_tensors,
    parent_of,
    verify,
    write_document,
)
from everseg.runs.input_form import InputForm, one_kind_of_channels
from everseg.runs.journal import Journal
from everseg.runs.lock import locked
from everseg.runs.memory import FILE as MEMORY
from everseg.runs.memory import Memory, read_memory
from everseg.runs.model_edits import own_norms, with_branch, with_own_norms
from everseg.runs.model_folder import (
    LINEAGE,
    load_model,
    read_domains,
    read_lineage,
    read_model_file,
    save_model,
)
from everseg.runs.place import model_folder_at
from everseg.runs.results import Results
from everseg.runs.run_folder import RunFolder
from everseg.scenarios import extension
from everseg.scenarios.domain_incremental import needed_domains
from everseg.scenarios.feasibility import Trial, doubtful, impossible
from everseg.scenarios.memory import unfit_for_memory
from everseg.scenarios.steps import Source, Step, packed
from everseg.scenarios.summary import scenario_json


def execute(config: RunConfig, *, quiet: bool = False, dry_run: bool = False) -> RunFolder:
    """Run a configuration to its end. Work that its folder already holds is not repeated.

    Args:
        quiet: print no progress.
        dry_run: test and validate on a few images only. With a small `train.max_iterations` this tries every stage.

    Returns:
        The run's folder, with every step finished and scored.

    Raises:
        EversegError: any stage failed; what the folder holds stays valid.
    """
    method = build_method(config.method)
    if config.train.precision == "fp16" and method.pretune:
        raise ConfigError(
            "train.precision: pre-tuning does not scale its losses as fp16 needs it; use bf16 or fp32, or leave "
            "method.pretune out"
        )
    if config.train.precision == "fp16" and method.reads_gradients:
        raise ConfigError(
            f"train.precision: method '{config.method.name}' reads gradients, which fp16 loss scaling would distort; "
            "use bf16 or fp32"
        )
    _check_single_task(config.scenario, config.data.domains)
    check_installed(config.tracker)
    folder = RunFolder(Path(config.out) / config.name)
    finished = folder.is_finished(config)
    # With several branches in one step, a batch gives gradients to one of them only; DDP must expect unused weights.
    together = config.scenario.joint or config.scenario.kind not in registry.BUILTIN["scenario"]
    accelerator = make_accelerator(config.train, find_unused=method.partial_updates or together)
    progress = Progress(quiet=quiet, rank=accelerator.process_index)
    if finished:
        progress.message(f"{folder.path} is finished already; nothing to train")
        return folder
    if config.train.shard and accelerator.num_processes == 1:
        progress.message("note: train.shard does nothing with a single process")
    elif config.train.shard and accelerator.device.type != "cpu":
        progress.message(
            "warning: train.shard has been tried on CPUs only; compare a few iterations with train.shard=false"
        )
    if config.train.precision == "bf16" and not computes_bf16(accelerator.device):
        progress.message(
            "warning: this processor has no bf16 instructions and imitates them, several times slower than fp32; "
            "use train.precision=fp32 here"
        )
    with all_present(accelerator, config.train.peer_timeout, f"{config_hash(config)} {folder.path}"):
        return _together(config, accelerator, progress, folder, dry_run)


def _together(
    config: RunConfig, accelerator: Accelerator, progress: Progress, folder: RunFolder, dry_run: bool
) -> RunFolder:
    """Prepare in the first process, then run in all."""
    # The first process checks everything and fills the caches. The others wait here to learn whether it succeeded.
    if not accelerator.is_main_process:
        if all_reduce_max(0, accelerator):
            raise EversegError("the first process stopped; its message says why")
        torch.set_num_threads(folder.threads)
        prepared = prepare(config.data, config.scenario, progress, seed=config.seed)
        return _run(config, prepared, accelerator, progress, folder, dry_run)
    with contextlib.ExitStack() as held:
        try:
            prepared = prepare(config.data, config.scenario, progress, seed=config.seed)
            for text in prepared.notes:
                progress.message(f"note: {text}")
            _check_plan(config, prepared, folder, accelerator, progress)
            held.enter_context(locked(folder.path, progress.message))
            folder.clean()
            _open(config, folder, prepared, progress)
        except BaseException:
            all_reduce_max(1, accelerator)
            raise
        all_reduce_max(0, accelerator)
        return _run(config, prepared, accelerator, progress, folder, dry_run)


def _check_plan(
    config: RunConfig, prepared: Prepared, folder: RunFolder, accelerator: Accelerator, progress: Progress
) -> None:
    """Stop before anything is written or trained if a step is impossible. Warn of classes that no test image shows.

    Raises:
        ConfigError: wrong names or weights of the model, or impossible steps (all of them in one message).
    """
    channels = one_kind_of_channels(prepared.datasets.values())
    _check_channels(config.data, config.scenario.bundle, channels)
    method = build_method(config.method)
    todo = [step for step in prepared.steps if not folder.final(step.index).is_dir()]
    notes = switches.idle(method)
    if todo and todo[0].index == 0 and todo[0].is_first:
        # Building reads the pretrained weights, so a wrong or missing weight file stops the run here.
        model = build_model(config.model, config.data.normalisation, _in_channels(channels))
        for branch in prepared.steps[-1].spaces:
            model.heads.check(branch)
        switches.check_model(method, model)
        if len(prepared.steps) > 1:
            notes += switches.compared_otherwise(method, model)
        if config.train.layer_decay is not None:
            encoder_layers(model.encoder)
    refused = _refused_preparation(config, prepared.steps, _in_channels(channels))
    # A network that the method refuses need not be tried with images, which would give the same sentence once more.
    trial = (lambda step: "") if refused else _trial(config, prepared.steps, _in_channels(channels))
    world = accelerator.num_processes
    problems = impossible(
        todo, batch=config.train.batch, processes=world, parts=config.train.accumulate, trial=trial
    )
    unfit = switches.unfit(method, prepared.steps)
    # What the method says of the whole run, the trial of a single step only repeats.
    refused = [problem for problem in refused if not any(problem.endswith(one) for one in unfit)]
    problems = [*refused, *problems, *unfit]
    problems += unfit_for_shards(
        config.train,
        config.method.name,
        reads_gradients=method.reads_gradients,
        domains=bool(config.data.domains) or any(len(step.spaces) > 1 for step in prepared.steps),
    )
    if problems := [
        *problems,
        *_unfit_material(config.scenario.memory, config.method.name, method, prepared, todo),
    ]:
        raise ConfigError(problems)
    for note in notes:
        progress.message(f"note: {note}")
    for note in doubtful(todo, prepared.counts):
        progress.message(f"warning: {note}")
    for step in filter(method.trains, todo):
        total = iterations_of(step, config.train)
        warmup = warmup_length(config.train, total, epoch_of(step, config.train.batch))
        if not config.train.max_iterations and warmup >= total:
            progress.message(
                f"warning: step {step.index}: train.warmup lasts {warmup} iterations and the step {total}, "
                "so the learning rate never reaches that of the schedule"
            )


def _unfit_material(
    memory: MemoryConfig, name: str, method: Method, prepared: Prepared, todo: Sequence[Step]
) -> list[str]:
    """List what is missing or impossible about the memory and about further maps of the images.

    Args:
        name: the method's name in messages.
    """
    steps = prepared.steps
    problems = [
        *unfit_for_memory(steps, memory),
        *memory_problems(memory, steps, prepared.datasets),
        *missing_maps(_images(todo), prepared.datasets),
    ]
    if memory.size and (still := [str(step.index) for step in steps if not method.trains(step)]):
        problems.append(
            f"scenario.memory: method '{name}' goes through its images once without gradients (step "
            f"{', '.join(still)}) and carries on what it learnt before; set scenario.memory.size=0"
        )
    if method.readout.regions:  # the network reads this map in tests, too
        problems += missing_maps(_images(todo, tested=True), prepared.datasets, method.readout.regions)
    if method.needs_memory and not memory.size:
        problems.append(
            f"scenario.memory.size: method '{name}' trains on images of earlier steps again; say how "
            "many are kept, such as scenario.memory.size=100"
        )
    lacking = [
        name
        for name in method.needs_extra
        if not all(name in one.extra for one in prepared.datasets.values())
    ]
    problems += [
        f"data.extra.{one}: method '{name}' reads this map of every training image; name its folder, "
        f"data.extra.{one}=DIR" + (" (everseg data saliency makes one)" if one == "saliency" else "")
        for one in lacking
    ]
    names = [sorted(one.extra) for one in prepared.datasets.values()]
    if any(one != names[0] for one in names):
        problems.append("data.domains: every domain needs folders of the same further maps (extra), or none")
    return problems


def _images(steps: Sequence[Step], *, tested: bool = False) -> dict[tuple[str, str], list[int]]:
    """(Key of the data set, split) -> positions of the images that some step trains or is tested on, ascending."""
    found: dict[tuple[str, str], set[int]] = {}
    for step in steps:
        for source in (*step.test, *step.val) if tested else step.train:
            found.setdefault((source.dataset, source.split), set()).update(source.indices)
    return {key: sorted(indices) for key, indices in found.items()}


def _in_channels(channels: Channels | None) -> int:
    return 3 if channels is None else len(channels)


def _check_channels(data: DataConfig, bundle: str | None, channels: Channels | None) -> None:
    """Stop if the images have other channels than the settings, or the model that the run begins with, are made for.

    Raises:
        ConfigError: all that does not fit.
    """
    problems = []
    if channels is not None and len(channels) != 3:
        for key in ("saturation", "hue"):
            if getattr(data, key) is not None:
                problems.append(
                    f"data.{key}: is of RGB images, and these have {counted(len(channels), 'channel')}; leave it out"
                )
    if bundle is not None:
        seen = read_model_file(model_folder_at(Path(bundle))).form.channels
        if not same_channels(seen, channels):
            before, now = (
                "RGB with 8 bits" if one is None else f"{', '.join(one.names)}, {one.bits} bits"
                for one in (seen, channels)
            )
            problems.append(
                f"scenario.bundle: its model saw other channels, or another mean and std ({before}), than these images "
                f"have ({now}); state the same in data.options.channels"
            )
    if problems:
        raise ConfigError(problems)


def _refused_preparation(config: RunConfig, steps: Sequence[Step], in_channels: int) -> list[str]:
    """Try what the method does to the network before each step, on a network without values (device "meta").

    Returns:
        Why the method refuses a step, for the first such one; [] if it refuses none. Nothing is tried if the run begins
        with a bundle, and trying ends where an operation does not work without values.
    """
    if not steps[0].is_first:
        return []
    method, model = build_method(config.method), None
    for step in steps:
        try:
            with torch.device("meta"):
                if model is None or step.is_first:
                    model = _without_values(config.model, config.data.normalisation, in_channels)
                method.prepare_model(model, step)
        except ConfigError as error:
            return [f"step {step.index}: {error}" if step.index else str(error)]
        except Exception:  # some operation of the user's network or method does not work on the "meta" device
            return []
    return []


def _without_values(
    model: ModelConfig, normalisation: Literal["imagenet", "unit"], in_channels: int
) -> SegmentationModel:
    return build_model(model.model_copy(update={"weights": None}), normalisation, in_channels)


def _trial(config: RunConfig, steps: Sequence[Step], in_channels: int) -> Trial:
    """Make a function that tries a step on a network without values (device "meta"), with a single image.

    Norms that cannot work with a single image refuse it at once. The function tries nothing, and so refuses nothing,
    if the run begins with a bundle or if the norms see the images of all processes. It also refuses nothing if the
    network has an operation that does not work without values.
    """
    data = config.data
    height, width = data.size if data.transform == "resize" else (data.crop, data.crop)

    def refused(step: Step) -> str:
        if not steps[0].is_first or config.train.sync_norm or not build_method(config.method).trains(step):
            return ""
        try:
            with torch.device("meta"):
                model = _without_values(config.model, config.data.normalisation, in_channels)
                method = build_method(config.method)
                model.readout = method.readout  # as the steps before have left it
                for earlier in steps[: steps.index(step)]:
                    method.grow(model, earlier)
                method.prepare_model(model, step)
                model.train()
                maps = {name: torch.empty(1, height, width, dtype=torch.long) for name in model.reads_extra}
                model(
                    torch.empty(1, in_channels, height, width), step.trained_branches,
                    **({"extra": maps} if maps else {}),
                )  # fmt: skip
        except ConfigError as error:
            return str(error)
        except Exception:  # some operation of the user's network or method does not work on the "meta" device
            return ""
        return ""

    return refused


def _check_single_task(scenario: ScenarioConfig, domains: Mapping[str, DomainConfig]) -> None:
    """Stop before hours of training if `scenario.single_task` lacks a taught domain or names an unknown one."""
    given = scenario.single_task
    if given is None:
        return
    needed = needed_domains(scenario.steps, domains)
    if not set(needed) <= given.keys() <= domains.keys():
        raise ConfigError(
            f"scenario.single_task: expected a number for each domain taught ({', '.join(needed) or 'none'}), "
            f"got {', '.join(given) or 'none'}"
        )


def _open(config: RunConfig, folder: RunFolder, prepared: Prepared, progress: Progress) -> None:
    """Create the run's documents, or check that existing ones fit. A resumed run keeps its number of threads."""
    threads = folder.open(config, torch.get_num_threads())
    _record_scenario(folder, prepared, config.scenario, several=len(config.data.domains) > 1)
    if config.scenario.bundle is not None:
        place_start(folder, prepared.steps[0], config.scenario, config.model, config.method)
    if threads != torch.get_num_threads():
        progress.message(f"note: using {threads} CPU threads, as this run did before")
        torch.set_num_threads(threads)
        if threads > (os.cpu_count() or 1):
            progress.message(
                "warning: this machine has fewer cores; the run continues, but not bit-identical"
            )


def _run(
    config: RunConfig,
    prepared: Prepared,
    accelerator: Accelerator,
    progress: Progress,
    folder: RunFolder,
    dry_run: bool,
) -> RunFolder:
    main = accelerator.is_main_process
    steps = prepared.steps
    if dry_run:
        few = 2 * config.train.eval_batch
        steps = tuple(
            replace(
                step,
                test=tuple(replace(source, indices=source.indices[:few]) for source in step.test),
                val=tuple(replace(source, indices=source.indices[:few]) for source in step.val),
            )
            for step in steps
        )
    journal = Journal(folder.path / "journal.jsonl" if main else None)
    # A dry run leaves nothing at a service.
    trackers = [name for name in config.tracker if main and not (dry_run and name in TITLES)]
    events = Events(
        _places(trackers, identity(config), folder.path, progress.message), notify=progress.message
    )
    method = build_method(config.method)
    done = 0  # iterations of the steps so far
    try:
        with StopRequest(config.train.max_time) as stop:
            session = Session(
                config, prepared.datasets, folder, accelerator, journal, progress, events, stop,
                prepared.steps, prepared.counts,
            )  # fmt: skip
            for step in steps:
                memory = memory_before(config.scenario.memory, folder, step)
                appended = len(memory.images) if memory and config.scenario.memory.mix == "append" else 0
                before, done = done, done + _length(step, session, method, appended)
                if (folder.step(step.index) / "metrics.json").exists():
                    continue
                trained_now = not folder.final(step.index).is_dir()
                if trained_now:
                    _train(_job(session, step, before, memory))
                if main:
                    shutil.rmtree(folder.checkpoints(step.index), ignore_errors=True)
                _score(session, step, done, trained_now)
    finally:
        events.close()
    return folder


def _places(
    chosen: Sequence[str], settings: Mapping[str, Any], folder: Path, notify: Callable[[str], None]
) -> list[Sink]:
    """Open the places that the run's numbers go to.

    Args:
        chosen: the setting `tracker`.
        settings: what the services are told of the run.

    Raises:
        ConfigError: one of the services refuses to start.
    """
    opened = tensorboard(folder / "events", notify) if "tensorboard" in chosen else []
    try:
        for name in dict.fromkeys(chosen):
            if name in TITLES:
                opened.append(Tracker(name, folder.name, settings, folder))
    except ConfigError:
        Events(opened).close()
        raise
    return opened


def _length(step: Step, session: Session, method: Method, appended: int) -> int:
    """Count what a step does before its test: its iterations, and the batches of its pass without gradients."""
    config, plan = session.config, method.accumulates(step)
    number = iterations_of(step, config.train, appended) if method.trains(step) else 0
    if plan is None:
        return number
    views, world = views_of(step.train, session.datasets), session.accelerator.num_processes
    order = order_of(plan, views, config.data, config.train, seed=config.seed, step=step.index, world=world)
    return number + length_of(order, config.train)


def _record_scenario(
    folder: RunFolder, prepared: Prepared, scenario: ScenarioConfig, *, several: bool
) -> None:
    """Write scenario.json, which says what the steps are made of, or check that it is still the same.

    Args:
        several: whether the run has several domains, so that the masks are named with theirs.
    """
    sources = (s for step in prepared.steps for s in (*step.train, *step.test))
    used = sorted({(s.dataset, s.split) for s in sources})
    # Runs begun before a setting existed have no such entry, and must be able to continue.
    unused = {
        name
        for name in ("bundle", "domain", "branch", "like", "memory", "partition_draw")
        if getattr(scenario, name) == ScenarioConfig.model_fields[name].default
    }
    settings = scenario.model_dump(mode="json", exclude=unused)
    policies = policy_set(scenario.policy)
    if scenario.kind == "extension":
        policies = extension.tested(policies)
    record = scenario_json(prepared.steps, policies, settings)
    record["masks"] = {
        f"{key}/{name}" if several else name: prepared.datasets[key].splits[name].fingerprint()
        for key, name in used
    }
    images = _images(prepared.steps)
    maps = {
        f"{key}/{split}/{name}": MapFolder(where, prepared.datasets[key].splits[split]).fingerprint(indices)
        for (key, split), indices in images.items()
        for name, where in prepared.datasets[key].extra.items()
    }
    if maps:
        record["extra"] = maps
    path = folder.path / "scenario.json"
    if not path.exists():
        write_document(path, {**record, **({"notes": list(prepared.notes)} if prepared.notes else {})})
        return
    stored = folder.scenario()
    stored.pop("notes", None)  # sentences for people: another version may word them in another way
    # The round trip through JSON turns tuples into lists, as they are in the file.
    if stored != json.loads(json.dumps(record)):
        raise DataError(
            f"the images, masks, maps or lists have changed since {folder.path} was started; "
            "restore them, or start again under another name (name=...)"
        )


def _job(session: Session, step: Step, offset: int, memory: Memory | None) -> StepJob:
    """Make the job of a step: its model, teacher and method come from what the step before left on disk."""
    config, folder = session.config, session.folder
    method = build_method(config.method)
    teacher, parent = None, None
    if step.is_first:
        torch.manual_seed(derive_seed(config.seed, "model"))
        channels = one_kind_of_channels(session.datasets.values())
        model = build_model(config.model, config.data.normalisation, _in_channels(channels))
    else:
        builder = user_builder(config.model)
        model, spaces, state, parent = folder.load_final(step.index - 1, builder)
        _check_known(step, spaces, folder.final(step.index - 1))
        method.load_state_dict(state)
        if method.needs_teacher:
            teacher = frozen_copy(model)
    views = views_of(step.train, session.datasets, extra=None)
    return StepJob(session, step, views, model, teacher, method, offset=offset, parent=parent, memory=memory)


def _check_known(step: Step, spaces: Mapping[str, LabelSpace], where: Path) -> None:
    """Stop unless a checkpoint knows exactly the branches and classes that the steps before this one teach."""
    needed = {b: space.names[: step.num_old(b)] for b, space in step.spaces.items() if step.num_old(b)}
    known = {branch: space.names for branch, space in spaces.items()}
    if known != needed:
        told = [
            "; ".join(f"{branch} ({', '.join(names)})" for branch, names in every.items())
            for every in (known, needed)
        ]
        raise CheckpointError(
            f"{where} is a checkpoint with other domains or classes: it knows {told[0]}; step {step.index} of this "
            f"run continues {told[1]}; put the right one there, or delete {where.parent} and later steps"
        )


def _train(job: StepJob) -> None:
    job.train()
    session = job.session
    if session.accelerator.is_main_process:
        state = job.method.state_dict()
        form = InputForm.of_config(session.config.data, session.datasets.values())
        chosen = job.chosen
        session.folder.save_final(
            job.step, job.model, state, form, job.parent, job.raw,
            memory=chosen.memory if chosen else None, copies=chosen.copies if chosen else None,
        )  # fmt: skip
    session.accelerator.wait_for_everyone()
    session.accelerator.free_memory()  # Accelerate holds every model and optimiser that it has prepared


def _score(session: Session, step: Step, iteration: int, trained_now: bool) -> None:
    """Score a finished step (test and, where asked for, validation images) and write the results.

    Args:
        trained_now: whether this call of the program trained the step. If so, the time budget may stop the test. A
            call that begins with the test finishes it, however short its budget is. So every call makes progress.
    """
    config, folder, accelerator = session.config, session.folder, session.accelerator

    def stop_if_asked() -> None:
        code = session.stop.code()
        if code == StopRequest.TIME_BUDGET and not trained_now:
            return
        # Several processes have unequal numbers of test batches, so they could not all stop at the same one.
        if code and accelerator.num_processes == 1:
            session.progress.end()
            raise StopRequest.error(code, f"the end of step {step.index}, before its test")

    builder = user_builder(config.model)

    def scored(sources: Sequence[Source]) -> tuple[Evaluation, dict[str, Any]]:
        return score_step(
            folder, step.index, sources, session.datasets, config.data, accelerator, session.progress,
            batch=config.train.eval_batch, builder=builder, metrics=config.metrics, between=stop_if_asked,
        )  # fmt: skip

    result, scores = scored(step.test)
    metrics: dict[str, Any] = {"step": step.index, "branches": scores}
    if step.val:
        metrics["validation"] = scored(step.val)[1]
    before, others = dict[str, np.ndarray](), dict[str, np.ndarray]()
    if config.scenario.bundle is not None:
        before = _before(session, step, builder, stop_if_asked)
        others = _with_others(session, step, builder, stop_if_asked)
    if accelerator.is_main_process:
        for name, values in scores.items():
            session.events.evaluation(
                iteration,
                step.index,
                values["classes"],
                values,
                result.counts[name],
                result.samples[name],
                background=step.spaces[result.branches[name]].background,
                domain=name if config.data.domains else None,
            )
        folder.save_result(step.index, result.counts, metrics, result.images, before, others, result.boundary)
        session.journal.add("test", step=step.index, iteration=iteration, scores=scores)
        session.events.sequence(iteration, Results(folder).sequence)
    accelerator.wait_for_everyone()


def _before(session: Session, step: Step, builder: Any, between: Callable[[], None]) -> dict[str, np.ndarray]:
    """Count the model of the bundle on the images that its extension is tested on, against the same classes.

    Returns:
        Name of the results -> (C, C) int64, rows = truth. New classes are among the truth; the model calls nothing so.
    """
    model, spaces, _, _ = session.folder.load_final(step.index - 1, builder)
    known = [source for source in step.test if source.branch in spaces]
    found = evaluate(
        model, known, session.datasets, session.config.data, session.accelerator, session.progress,
        batch=session.config.train.eval_batch, title="the deployed model on the same images", keep=0,
        outputs={source.name: step.spaces[source.branch].num_classes for source in known}, between=between,
    )  # fmt: skip
    return found.counts


def _with_others(
    session: Session, step: Step, builder: Any, between: Callable[[], None]
) -> dict[str, np.ndarray]:
    """Count a model without background once more, with what none of its classes is as a further class of the truth.

    Returns:
        `RunFolder.others`.
    """
    sources, outputs = list[Source](), dict[str, int]()
    for source in step.test:
        space = step.spaces[source.branch]
        names = session.datasets[source.dataset].labels.names
        other = [raw for raw in names if raw < len(source.lut) and source.lut[raw] == source.ignored]
        if not step.grows or space.background is not None or not other or space.num_classes >= IGNORED - 1:
            continue
        table = list(source.lut)
        for raw in other:
            table[raw] = space.num_classes
        sources.append(replace(source, lut=packed(table, space.num_classes + 1)))
        outputs[source.name] = space.num_classes + 1
    if not sources:
        return {}
    model, _, _, _ = session.folder.load_final(step.index, builder)
    return evaluate(
        model, sources, session.datasets, session.config.data, session.accelerator, session.progress,
        batch=session.config.train.eval_batch, title="what else is called a new class", keep=0, outputs=outputs,
        between=between,
    ).images  # fmt: skip


def place_start(
    folder: RunFolder, step: Step, scenario: ScenarioConfig, network: ModelConfig, chosen: MethodConfig
) -> None:
    """Copy the bundle to where the step looks for its parent, or check that an existing copy is of this bundle.

    The copy records the bundle's digest as its parent, so that the chain of hashes continues. The method's state is
    copied only if the same method made it. A branch that the step trains and the bundle does not have is put into the
    copy, equal to the branch `scenario.like`. So the step, its teacher and its comparisons find it there as any other.
    Norms that the branches share become each branch's own first, where the configuration asks for it.

    Args:
        scenario: names the bundle.
        network: names the user's own architecture, if the bundle has one.
        chosen: the run's method.

    Raises:
        CheckpointError: the bundle is missing or damaged, or is not the one that the run began with.
        ConfigError: the method needs the state it gathered in earlier steps, but another method made the bundle.
    """
    source, target = Path(str(scenario.bundle)), folder.final(step.index - 1)
    if target.is_dir():
        if source.is_dir() and verify(source) != parent_of(target):
            raise CheckpointError(
                f"{source} is not the bundle that {folder.path} began with; restore it, or take another name (name=...)"
            )
        return
    digest = verify(source)
    lineage = read_lineage(source)
    memory = read_memory(source)
    copies = (
        {name: (source / name).read_bytes for copy in memory.copies for name in copy.names} if memory else {}
    )
    about, weights = read_model_file(source), load_tensors(source / "model.safetensors")
    asked = network.options.get("per_branch") == "norm"
    own = own_norms(about.architecture, Sizes.of(weights)) if asked else None
    if own is not None or step.branch not in about.spaces:
        model, _ = load_model(source, user_builder(network), about)
        if own is not None:
            model = with_own_norms(model, own)
            about = replace(about, architecture=model.describe())
        if step.branch not in about.spaces:
            about = with_branch(model, about, step.branch, str(scenario.like))
        weights = model.state_dict()
    save_model(
        target,
        about,
        weights,
        _state(source, lineage, chosen),
        domains=read_domains(source, about.spaces),
        parent=digest,
        documents={Path(LINEAGE).stem: lineage, **({Path(MEMORY).stem: memory.document()} if memory else {})},
        files=copies,
    )


def _state(source: Path, lineage: dict[str, Any], chosen: MethodConfig) -> dict[str, Any]:
    """Read the method's state from a bundle; {} if another method made the bundle and the chosen one needs no state.

    Raises:
        ConfigError: another method made the bundle, and the chosen one needs the state it gathered in earlier steps.
    """
    method = chosen.name
    if lineage.get("method") == method:
        return load_tensors(source / "method_state.safetensors")
    # A method that has state even before its first step depends on what earlier steps gathered.
    if build_method(chosen).state_dict():
        made_by = f"trained with '{lineage['method']}'" if lineage.get("method") else "not trained by everseg"
        raise ConfigError(
            f"method '{method}' needs statistics that only a run of '{method}' saves, and {source} was {made_by}; "
            f"choose a method that needs the model alone, such as mib or lwf, or train {source} again with '{method}'"
        )
    return {}
