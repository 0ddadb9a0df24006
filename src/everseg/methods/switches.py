"""What surrounds a step of any method: switches that compose with every method, a user's own included."""

from __future__ import annotations

from collections.abc import Sequence

from everseg.errors import ConfigError
from everseg.methods.base import Method, StepContext
from everseg.methods.fusion import check_structure, fuse, new_share, unfit_for_fusion
from everseg.methods.pretuning import check_classifiers, pretune, pretuned_branch
from everseg.models.model import SegmentationModel
from everseg.scenarios.steps import Step


def unfit(method: Method, steps: Sequence[Step]) -> list[str]:
    """List what the method's switches cannot do in a run, each as a sentence that says why.

    Args:
        steps: all steps of the run.
    """
    found = [unfit_for_fusion(step) for step in steps] if method.fuse != "none" else []
    if method.fuse != "none" and method.restructures and not all(step.is_first for step in steps):
        found.append(
            "method.fuse: the method changes the network's structure before each later step, so weights from before "
            "and after it do not correspond; leave method.fuse out"
        )
    if method.pretune and not any(pretuned_branch(step) for step in steps):
        found.append(
            "method.pretune: no step adds classes to a branch that knows some, with a background among them, and "
            "trains that branch alone; leave method.pretune out"
        )
    return [problem for problem in found if problem]


def check_model(method: Method, model: SegmentationModel) -> None:
    """Check that the method and its switches can work with a model.

    Raises:
        ConfigError: they cannot.
    """
    if method.reads_attention and not model.gives_attention:
        raise ConfigError(
            "model: the method compares attention maps over the whole image, and this network has none; use a "
            "SegFormer (model.name=mlp model.encoder=hf:segformer)"
        )
    if method.pretune:
        check_classifiers(model)


def begin(method: Method, ctx: StepContext) -> None:
    """Run what comes before the first iteration of a step.

    Raises:
        ConfigError: a switch of the method cannot serve this step or this model.
    """
    if method.fuse != "none" and ctx.teacher is not None:
        if problem := unfit_for_fusion(ctx.step):
            raise ConfigError(problem)
        check_structure(ctx.module, ctx.teacher)  # before hours of training, not only after them
    if method.pretune:
        pretune(method, ctx)
    method.begin_step(ctx)


def finish(method: Method, ctx: StepContext) -> None:
    """Run what comes after the last iteration of a step, before its model is saved."""
    if method.fuse != "none" and ctx.teacher is not None:
        # Before `finish_model`: the structure that it may change is still that of the teacher.
        largest = method.fuse_changed if method.fuse == "changed" else None
        fuse(ctx.module, ctx.teacher, new_share(ctx.step), largest)
    method.finish_model(ctx)
    method.end_step(ctx)
