"""Wrong input to a loss raises a ValueError that says what is wrong."""

from __future__ import annotations

import pytest
import torch

from everseg import losses

X, T = torch.zeros(2, 5, 4, 6), torch.zeros(2, 3, 4, 6)
Y = torch.zeros(2, 4, 6, dtype=torch.long)
LABELLED = {
    "cross_entropy": lambda x, y, **k: losses.cross_entropy(x, y, **k),
    "unbiased_cross_entropy": lambda x, y, **k: losses.unbiased_cross_entropy(x, y, num_old=3, **k),
    "replayed_cross_entropy": lambda x, y, **k: losses.replayed_cross_entropy(x, y, num_old=3, **k),
    "moved_distillation": lambda x, y, **k: losses.moved_distillation(x, y, T, **k),
    "binary_cross_entropy": lambda x, y, **k: losses.binary_cross_entropy(x, y, **k),
    "focal": lambda x, y, **k: losses.focal(x, y, **k),
    "icarl": lambda x, y, **k: losses.icarl(x, y, T, **k),
}
DISTILLING = {
    "distillation": losses.distillation,
    "unbiased_distillation": losses.unbiased_distillation,
    "icarl_distillation": losses.icarl_distillation,
    "kl_divergence": losses.kl_divergence,
}


@pytest.mark.parametrize("name", LABELLED)
@pytest.mark.parametrize("value", [-1, 5, 254, 256, -100])
def test_label_out_of_range_is_named(name, value):
    label = Y.clone()
    label[1, 2, 3] = value
    with pytest.raises(ValueError, match=rf"{name}: .*\[{value}\].*0\.\.4"):
        LABELLED[name](X, label)


@pytest.mark.parametrize("name", LABELLED)
def test_label_of_another_shape_or_type_is_refused(name):
    with pytest.raises(ValueError, match="upsample the logits"):
        LABELLED[name](X, torch.zeros(2, 8, 12, dtype=torch.long))
    with pytest.raises(ValueError, match="label of shape"):
        LABELLED[name](X, Y.unsqueeze(1))
    with pytest.raises(ValueError, match=r"integer label, got torch\.float32"):
        LABELLED[name](X, Y.float())


@pytest.mark.parametrize("name", LABELLED)
def test_logits_of_wrong_rank_or_type_are_refused(name):
    with pytest.raises(ValueError, match="non-empty floating logits"):
        LABELLED[name](X[0], Y[0])
    with pytest.raises(ValueError, match="non-empty floating logits"):
        LABELLED[name](X.long(), Y)
    with pytest.raises(ValueError, match="non-empty floating logits"):
        LABELLED[name](X[:0], Y[:0])


def test_a_class_whose_train_id_would_mean_ignored_is_refused():
    with pytest.raises(ValueError, match=r"65535 classes.*65533"):
        losses.cross_entropy(torch.zeros(1, 65535, 1, 1), Y[:1, :1, :1])


@pytest.mark.parametrize("name", DISTILLING)
@pytest.mark.parametrize("shape", [(2, 6, 4, 6), (1, 3, 4, 6), (2, 3, 2, 3)])
def test_teacher_that_does_not_fit_is_refused(name, shape):
    with pytest.raises(ValueError, match=f"{name}: expected teacher logits"):
        DISTILLING[name](X, torch.zeros(shape))


def test_kl_divergence_needs_the_same_classes_and_a_known_form():
    with pytest.raises(ValueError, match=r"teacher.* 3 classes.*student 5.*distillation"):
        losses.kl_divergence(X, T)
    with pytest.raises(ValueError, match=r"form: .*'log'.*'probabilities'.*'logprob'"):
        losses.kl_divergence(X, X, form="logprob")
    with pytest.raises(ValueError, match="mask of shape"):
        losses.kl_divergence(X, X, mask=torch.ones(4, 6))


def test_unbiased_distillation_needs_a_new_class():
    with pytest.raises(ValueError, match="new classes"):
        losses.unbiased_distillation(X, X)


@pytest.mark.parametrize("num_old", [-1, 0, 5, 6])
def test_unbiased_cross_entropy_needs_old_and_new_classes(num_old):
    with pytest.raises(ValueError, match=r"num_old.*1\.\.4.*5 classes"):
        losses.unbiased_cross_entropy(X, Y, num_old=num_old)


@pytest.mark.parametrize("name", ["distillation", "unbiased_distillation"])
def test_distillation_checks_alpha_mask_and_num_old(name):
    loss = DISTILLING[name]
    for alpha in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"alpha .*positive"):
            loss(X, T, alpha=alpha)
    with pytest.raises(ValueError, match="mask of shape"):
        loss(X, T, mask=torch.ones(4, 6))
    with pytest.raises(ValueError, match=r"num_old.* 4.*teacher.* 3 classes"):
        loss(X, T, num_old=4)
    assert torch.equal(loss(X, T, num_old=3), loss(X, T))


def test_classes_outside_the_logits_are_refused():
    with pytest.raises(ValueError, match=r"0\.\.5.*6"):
        losses.binary_cross_entropy(X, Y, first=6)
    with pytest.raises(ValueError, match=r"0\.\.3.*4"):
        losses.icarl_distillation(X, T, first=4)
    for first, last in ((3, 3), (0, 6), (-1, 2)):
        with pytest.raises(ValueError, match="of 5"):
            losses.binary_negatives(X, first=first, last=last)


def test_class_weights_of_another_length_are_refused():
    with pytest.raises(ValueError, match="expected 5 class weights"):
        losses.cross_entropy(X, Y, weight=torch.ones(4))


@pytest.mark.parametrize("kwargs", [{"over": "most"}, {"reduction": "median"}])
def test_unknown_over_or_reduction_is_refused(kwargs):
    with pytest.raises(ValueError, match="expected '"):
        losses.cross_entropy(X, Y, **kwargs)


@pytest.mark.parametrize("gamma", [-1.0, 0.5, float("nan")])
def test_focal_refuses_exponents_without_a_finite_gradient(gamma):
    with pytest.raises(ValueError, match="gamma must be"):
        losses.focal(X, Y, gamma=gamma)


def test_feature_distillation_refuses_other_shapes():
    with pytest.raises(ValueError, match=r"student features.* shape"):
        losses.feature_distillation(X, T)
    with pytest.raises(ValueError, match="reduction"):
        losses.feature_distillation(X, X, reduction="median")


def test_upsample_refuses_other_ranks():
    with pytest.raises(ValueError, match="upsample: expected logits"):
        losses.upsample(X[0], (8, 8))
