"""What surrounds a step of any method: switches that compose with every method, a user's own included."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence

import torch

from everseg.errors import ConfigError
from everseg.methods.base import Method, StepContext
from everseg.methods.fusion import check_structure, fuse, new_share, unfit_for_fusion
from everseg.methods.pretuning import check_classifiers, pretune, pretuned_branch
from everseg.models.blocks import PRE, is_stage
from everseg.models.model import SegmentationModel
from everseg.scenarios.steps import Step


def unfit(method: Method, steps: Sequence[Step]) -> list[str]:
    """List what the method and its switches cannot do in a run, each as a sentence that says why.

    Args:
        steps: all steps of the run.
    """
    found = method.unfit(steps)
    later = [step for step in steps if not step.is_first]
    if method.fuse != "none":
        found += [unfit_for_fusion(step) for step in later]
        if not later:
            found.append(
                "method.fuse: no later step, so nothing is fused; leave it out, or set method.fuse=none"
            )
        elif method.restructures:
            found.append(
                "method.fuse: the method changes the network's structure before each later step, so weights from "
                "before and after it do not correspond; leave method.fuse out"
            )
    untrained = [str(step.index) for step in later if not method.trains(step)]
    if untrained and (method.fuse != "none" or method.pretune):
        switch = "fuse" if method.fuse != "none" else "pretune"
        found.append(
            f"method.{switch}: the method computes the weights of step {', '.join(untrained)} without gradients, so "
            f"there is nothing to {'move back' if switch == 'fuse' else 'tune before'}; leave it out"
        )
    # Only where the method can make its heads at all.
    if method.pretune and not any(found) and any(method.heads(step) for step in steps):
        found.append(
            "method.pretune: it mixes the rows of 1x1 classifiers that have the background among them, and this method "
            "has other heads; leave method.pretune out"
        )
    if method.pretune and not any(pretuned_branch(step) for step in steps):
        found.append(f"method.pretune: {_without_pretuning(steps)}; leave it out, or set method.pretune=0")
    return [problem for problem in found if problem]


def _without_pretuning(steps: Sequence[Step]) -> str:
    """Say why no step of a run is pre-tuned."""
    if len(steps) == 1 and steps[0].is_first:
        return "it acts before later steps that add classes, and this run has a single step"
    if len({branch for step in steps for branch in step.spaces}) > 1:
        return (
            "it acts before a step that adds classes to a domain known before. That domain needs a background, and "
            "must be the only one that the step trains. No step of this run is such a one"
        )
    return (
        "it acts before later steps that add classes, where the classes have a background. No step of this run is such "
        "a one"
    )


def idle(method: Method) -> list[str]:
    """List settings of switches that are off, each as a sentence: somebody changed them, and they do nothing."""
    pretuning = ("pretune", method.pretune > 0, "EPOCHS")
    needs = {
        "fuse_changed": ("fuse", method.fuse == "changed", "changed"),
        "pretune_lr_scale": pretuning,
        "pretune_kd_weight": pretuning,
        "pretune_unbiased_ce": pretuning,
    }
    defaults = {field.name: field.default for field in dataclasses.fields(method)}
    return [
        f"method.{name}={str(getattr(method, name)).lower()} does nothing without method.{switch}={value}"
        for name, (switch, on, value) in needs.items()
        if not on and getattr(method, name) != defaults[name]
    ]


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
    if method.reads_tokens and not model.gives_tokens:
        raise ConfigError(
            "model: the method compares class tokens, and the classes of this network are none; use a Segmenter "
            "(model.name=segmenter model.encoder=hf:segformer)"
        )
    if method.pretune:
        check_classifiers(model)


def compared_otherwise(method: Method, model: SegmentationModel) -> list[str]:
    """List what the method compares of this network in place of what it asks for, each as a sentence."""
    if not method.reads_before_activation:
        return []
    if not model.branches and getattr(model.encoder, "by_branch", False):  # it runs through a branch only
        with torch.random.fork_rng(devices=[]):
            model = copy.deepcopy(model)
            model.grow({"trial": 1})
    try:
        names = model.tap_names()
    except (
        ConfigError
    ) as error:  # a network of the user's that takes images of one size; training may well work
        return [
            f"the method compares the stages' maps before their last activation, if there are any ({error})"
        ]
    if stages := [name for name in names if is_stage(name) and name + PRE not in names]:
        return [
            f"the method compares the stages' maps before their last activation; {', '.join(stages)} of this network "
            "have none, so they are compared as they are"
        ]
    return []


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
