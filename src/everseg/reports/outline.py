"""`everseg show`: what each step of a configuration will see, and every setting with its meaning, before training."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from everseg.config.fields import DataConfig, RunConfig, ScenarioConfig
from everseg.config.loading import dump, fields, load, to_json
from everseg.config.words import value_text
from everseg.data.datasets import ade, camvid, voc
from everseg.display import Piece, Result, html_of, table
from everseg.engine.prepare import prepare
from everseg.errors import ConfigError, some
from everseg.labels import RawLabels
from everseg.progress import Progress
from everseg.reports import terminal
from everseg.reports.memory import planned_text
from everseg.reports.text import columns
from everseg.scenarios.summary import summarise
from everseg.scenarios.tasks import task_groups

_HEAD = ("key", "value", "help")


@dataclass(frozen=True)
class Setting:
    """One setting of a configuration."""

    key: str
    """Its name, as it is written on the command line: "train.lr"."""
    value: Any
    help: str


@dataclass(frozen=True, repr=False)
class Outline(Result):
    """What a configuration asks for: every setting with its meaning, and what every step will see."""

    config: RunConfig
    """The configuration, checked and complete."""
    scenario: tuple[Mapping[str, Any], ...] | None
    """What every step will see (`everseg.scenarios.summary.summarise`); None where the data were not opened."""
    notes: tuple[str, ...] = ()
    """How class names were treated that differ in spelling or that no step teaches."""

    @property
    def settings(self) -> tuple[Setting, ...]:
        """Every setting, the method's hyper-parameters included. Their helps stand in the method's own class."""
        return tuple(Setting(*row) for row in fields(self.config))

    @property
    def yaml(self) -> str:
        """The configuration as a YAML file to start from."""
        return dump(self.config)

    def shown(self) -> Iterator[Piece]:
        yield from self._what_steps_see()
        yield "Settings"
        yield columns(_HEAD, self._rows())

    def _repr_html_(self) -> str:
        """A notebook shows the settings as a table; the terminal sets them in columns, which appear sooner."""
        notes = [f"note: {text}" for text in self.notes]
        return html_of([*notes, *self._what_steps_see(), table(_HEAD, self._rows(), title="Settings")])

    def _rows(self) -> list[tuple[str, str, str]]:
        return [(one.key, value_text(one.value), one.help) for one in self.settings]

    def _what_steps_see(self) -> Iterator[Piece]:
        if self.scenario is None:
            taught = _taught(self.config.data, self.config.scenario)
            if taught:
                rows = [[index, len(names), some(names, 8)] for index, names in enumerate(taught)]
                yield table(["step", "classes", "new classes"], rows, title="Steps", right="step|classes")
            yield "With the data at hand (data.root=DIR), images and pixels are shown too.\n"
        else:
            yield from terminal.scenario_tables(self.scenario)
            if self.config.scenario.memory.size:
                yield planned_text(self.config.scenario.memory, self.config.train.batch, self.scenario)

    def to_json(self) -> dict[str, Any]:
        steps = None if self.scenario is None else list(self.scenario)
        return {"config": to_json(self.config), "scenario": steps, "notes": list(self.notes)}


def _taught(data: DataConfig, scenario: ScenarioConfig) -> list[list[str]]:
    """List the classes that each step teaches, where they are known without the files of the data set; else []."""
    names = {"voc": voc.NAMES, "ade": ("background", *ade.NAMES), "camvid": camvid.NAMES}.get(data.dataset)
    if names is None or data.domains or data.options or scenario.kind != "class-incremental":
        return []
    labels = RawLabels(dict(enumerate(names)), None if data.dataset == "camvid" else 0)
    try:
        steps = task_groups(scenario.task, labels, data.dataset, scenario.order)
    except ConfigError:  # `run` tells it with everything else that is wrong
        return []
    taught = [[labels.names[raw] for raw in step] for step in steps]
    return [[name for step in taught for name in step]] if scenario.joint else taught


def show(
    source: str | Path | Mapping[str, Any] | None = None,
    *,
    overrides: Sequence[str] = (),
    scenario: bool | None = None,
    quiet: bool = False,
    **sections: Any,
) -> Outline:
    """Resolve a preset, a YAML file or a mapping as `everseg.run` does, and say what it asks for. Nothing is trained.

    Args:
        source: preset name, path of a YAML file, or a mapping.
        overrides: "key=value" strings, as on the command line.
        scenario: whether to open the data and find out what every step will see: images, pixels per class, leaks
            between steps. By default this is done if the data are at hand.
        quiet: print no progress.
        sections: further settings as keywords, as for `everseg.run`.

    Raises:
        EversegError: with what, where and what to do.
    """
    config = load(source, overrides, **sections)
    if not (_at_hand(config.data) if scenario is None else scenario):
        return Outline(config, None)
    prepared = prepare(config.data, config.scenario, Progress(quiet=quiet), seed=config.seed)
    return Outline(config, tuple(summarise(prepared.steps, prepared.counts)), prepared.notes)


def _at_hand(data: DataConfig) -> bool:
    """Whether the data set, or that of every domain, can be read now: it is generated, or its folder is there."""
    sets = data.domains.values() or [data]
    places = [(one.dataset, one.root or data.root) for one in sets]
    return all(
        name == "demo"
        or name.endswith((".yaml", ".yml"))
        or (root is not None and Path(root).expanduser().is_dir())
        for name, root in places
    )
