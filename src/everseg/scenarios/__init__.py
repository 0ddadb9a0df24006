"""Scenarios: which classes are taught when, from which images, under which label convention."""

from everseg.scenarios.class_incremental import class_incremental
from everseg.scenarios.combine import chain, cross_validation, joint, single, singles
from everseg.scenarios.domain_incremental import domain_incremental
from everseg.scenarios.lists import published
from everseg.scenarios.step_weights import weighted
from everseg.scenarios.steps import Source, Step
from everseg.scenarios.summary import digests, scenario_json, summarise
from everseg.scenarios.tasks import known_orders, known_tasks, task_groups

__all__ = [
    "Source",
    "Step",
    "chain",
    "class_incremental",
    "cross_validation",
    "digests",
    "domain_incremental",
    "joint",
    "known_orders",
    "known_tasks",
    "published",
    "scenario_json",
    "single",
    "singles",
    "summarise",
    "task_groups",
    "weighted",
]
