"""What surrounds a step of any method: switches that compose with every method, a user's own included."""

from __future__ import annotations

from everseg.methods.base import Method, StepContext


def begin(method: Method, ctx: StepContext) -> None:
    """Run what comes before the first iteration of a step."""
    method.begin_step(ctx)


def finish(method: Method, ctx: StepContext) -> None:
    """Run what comes after the last iteration of a step, before its model is saved."""
    method.finish_model(ctx)
    method.end_step(ctx)
