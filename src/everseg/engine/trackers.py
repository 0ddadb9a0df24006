"""W&B, MLflow and Trackio as places for a run's numbers, through Hugging Face Accelerate's trackers.

What they are sent: the numbers of `everseg.engine.events`, and the settings that decide a run's result (`identity`), so
not where its files lie. Whatever else these services record (host, program, git commit) they add by themselves.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import sys
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from everseg.engine.events import Record
from everseg.errors import ConfigError, first_line
from everseg.files import UnreadableError, read_regular
from everseg.runs.commit import write_bytes

TITLES = {"wandb": "Weights & Biases", "mlflow": "MLflow", "trackio": "Trackio"}
"""Tracker of the settings -> its name; the extra and the module to import are called as in the settings."""
PROJECT = "everseg"
"""Project (W&B, Trackio) or experiment (MLflow) where the user's variables name no other."""
_ID = re.compile(rb"[0-9a-f]{12}")


def check_installed(chosen: Sequence[str]) -> None:
    """Stop before anything is prepared if a tracker that the user asks for is not installed.

    Args:
        chosen: the setting `tracker`.

    Raises:
        ConfigError: all that are missing.
    """
    missing = [name for name in chosen if name in TITLES and importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(
            [
                f"tracker: {TITLES[name]} is not installed: pip install 'everseg[{name}]', or leave {name} out"
                for name in missing
            ]
        )


class Tracker:
    """One such service.

    A run that is resumed goes on in the service's run of the same id, which the run folder keeps.

    Args:
        kind: a name of `TITLES`.
        name: of the run.
        settings: dotted key -> value, the run's `identity`.
        folder: of the run.

    Raises:
        ConfigError: the service refuses to start: no login, no connection, no place to write.
    """

    errors: tuple[type[Exception], ...] = (Exception,)  # their clients raise anything

    def __init__(self, kind: str, name: str, settings: Mapping[str, Any], folder: Path) -> None:
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        self.name, self._kind = TITLES[kind], kind
        identifier = _identifier(folder / "trackers" / "id")
        try:
            with _quiet_stdout():
                self._tracker: Any = LOGGER_TYPE_TO_CLASS[kind](
                    **_beginning(kind, name, identifier, folder / "trackers")
                )
                self._tracker.start()
                self._tracker.store_init_configuration(_plain(settings))
        except Exception as error:
            raise ConfigError(
                f"tracker: {self.name} does not start ({first_line(error)[:300]}); {_WAYS_OUT[kind]}, or leave "
                f"{kind} out of tracker=..., which changes nothing else of the run"
            ) from None

    def write(self, iteration: int, record: Record) -> None:
        with _quiet_stdout():
            if record.values:
                self._tracker.log(dict(record.values), step=iteration)
            if (
                record.pictures and self._kind == "wandb"
            ):  # the only one of the three whose tracker takes pictures
                pictures = {tag: [picture] for tag, picture in record.pictures.items()}
                self._tracker.log_images(pictures, step=iteration)

    def close(self) -> None:
        with _quiet_stdout():
            self._tracker.finish()


_WAYS_OUT = {
    "wandb": "log in (wandb login), or set WANDB_MODE=offline",
    "mlflow": "set MLFLOW_TRACKING_URI to a server or to sqlite:///FILE",
    "trackio": "set TRACKIO_DIR to a folder that can be written",
}


def _beginning(kind: str, name: str, identifier: str, folder: Path) -> dict[str, Any]:
    """Arguments of Accelerate's tracker: a new run of the service, or the one that this run has begun."""
    if kind == "wandb":
        import wandb

        return {
            "run_name": os.environ.get("WANDB_PROJECT", PROJECT), "name": name, "id": identifier, "resume": "allow",
            "dir": str(folder),
            # It would stand between the program and its terminal otherwise, progress bar included.
            "settings": wandb.Settings(console="off"),
        }  # fmt: skip
    if kind == "mlflow":
        import mlflow

        experiment, tag = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT), "everseg.run"
        begun = mlflow.search_runs(
            experiment_names=[experiment],
            filter_string=f"tags.`{tag}` = '{identifier}'",
            output_format="list",
        )
        found = {"run_id": begun[0].info.run_id} if begun else {"run_name": name}
        return {"experiment_name": experiment, "tags": {tag: identifier}, **found}
    return {
        "run_name": os.environ.get("TRACKIO_PROJECT", PROJECT), "name": f"{name}-{identifier}", "resume": "allow"
    }  # fmt: skip


def _identifier(path: Path) -> str:
    """Read the id under which the services know this run, or make one."""
    with contextlib.suppress(UnreadableError, OSError):
        stored = read_regular(path, 100, root=path.parent)
        if _ID.fullmatch(stored):
            return stored.decode()
    made = uuid.uuid4().hex[:12]
    path.parent.mkdir(exist_ok=True)
    write_bytes(path, made.encode())
    return made


def _plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Make numbers and texts of the settings, as the trackers take nothing else."""
    return {
        key: value if value is None or isinstance(value, (bool, int, float, str)) else json.dumps(value)
        for key, value in settings.items()
    }


@contextlib.contextmanager
def _quiet_stdout() -> Iterator[None]:
    """Send what the services print to stderr: stdout belongs to the result of the command (`--json`)."""
    with contextlib.redirect_stdout(sys.stderr):
        yield
