"""What surrounds a step of any method: switches that compose with every method, a user's own included."""

from __future__ import annotations

from collections.abc import Sequence

from everseg.errors import ConfigError
from everseg.methods.base import Method, StepContext
from everseg.methods.fusion import fuse, new_share, unfit_for_fusion
from everseg.scenarios.steps import Step


def unfit(method: Method, steps: Sequence[Step]) -> list[str]:
    """List the steps that a switch of the method cannot serve, each as a sentence that says why."""
    found = [unfit_for_fusion(step) for step in steps if method.fuse != "none"]
    return [problem for problem in found if problem]


def begin(method: Method, ctx: StepContext) -> None:
    """Run what comes before the first iteration of a step.

    Raises:
        ConfigError: a switch of the method cannot serve this step.
    """
    if problems := unfit(method, [ctx.step]):
        raise ConfigError(problems)
    method.begin_step(ctx)


def finish(method: Method, ctx: StepContext) -> None:
    """Run what comes after the last iteration of a step, before its model is saved."""
    if method.fuse != "none" and ctx.teacher is not None:
        # Before `finish_model`: the structure that it may change is still that of the teacher.
        largest = method.fuse_changed if method.fuse == "changed" else None
        fuse(ctx.module, ctx.teacher, new_share(ctx.step), largest)
    method.finish_model(ctx)
    method.end_step(ctx)
