"""The objects that all steps of a run share."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from accelerate import Accelerator

from everseg.config.fields import RunConfig
from everseg.data.base import Dataset
from everseg.engine.events import Events
from everseg.engine.runtime import StopRequest
from everseg.progress import Progress
from everseg.runs.journal import Journal
from everseg.runs.run_folder import RunFolder
from everseg.scenarios.steps import Step


@dataclass(frozen=True)
class Session:
    """The objects that all steps of a run share."""

    config: RunConfig
    datasets: Mapping[str, Dataset]
    folder: RunFolder
    accelerator: Accelerator
    journal: Journal
    progress: Progress
    events: Events
    stop: StopRequest
    steps: tuple[Step, ...]
    """All steps of the run."""
    counts: Mapping[str, np.ndarray]
    """"key/split" -> (N, ids) pixels per raw id of every image."""
