"""Values and gradients of the original authors' losses (`losses_A.npz`)."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from everseg import losses

pytestmark = pytest.mark.golden

PRECISIONS = {"f64": (torch.float64, 1e-12), "f32": (torch.float32, 1e-5)}
REDUCED = ["none", "mean", "sum"]


@pytest.fixture(scope="module")
def arrays(golden):
    with np.load(golden / "losses_A.npz") as file:
        return {name: file[name] for name in file.files}


def terms(arrays, dtype):
    """Golden name -> the same term with our functions; `{red}` names keep the authors' class-level reduction."""
    old = torch.from_numpy(arrays["old_logits"]).to(dtype)
    seen = torch.from_numpy(arrays["labels"])  # only new classes labelled
    full = torch.from_numpy(arrays["labels_full"])
    mask = torch.from_numpy(arrays["mask"])
    alpha, num_old = float(arrays["alpha"]), int(arrays["old_cl"])
    weight, domain = torch.from_numpy(arrays["mdil/class_weights"]), torch.from_numpy(arrays["mdil/labels"])
    table = {
        "UnbiasedCrossEntropy.trainer": lambda x: losses.unbiased_cross_entropy(x, seen, num_old=num_old),
        "PlainCE255.trainer": lambda x: losses.cross_entropy(x, full),
        "BCE.trainer": lambda x: losses.binary_cross_entropy(x, full),
        "IcarlCombinedTerm": lambda x: 10 * losses.icarl_distillation(x, old),
        "Focal_a.25_g3.mean": lambda x: losses.focal(x, full, alpha=0.25, gamma=3.0),
        "mdil_CE_nll": lambda x: losses.cross_entropy(x, domain, weight=weight, over="valid"),
        "mdil_CE_nll2d": lambda x: losses.cross_entropy(x, domain, weight=weight, over="valid"),
    }
    kd, ukd = losses.distillation, losses.unbiased_distillation
    for red in REDUCED:
        table |= {
            f"UnbiasedCrossEntropy.{red}": lambda x, r=red: losses.unbiased_cross_entropy(
                x, seen, num_old=num_old, over="valid", reduction=r
            ),
            f"KD.{red}": lambda x, r=red: kd(x, old, reduction=r),
            f"KD_alpha.{red}": lambda x, r=red: kd(x, old, alpha=alpha, reduction=r),
            f"KD_mask.{red}": lambda x, r=red: kd(x, old, mask=mask, reduction=r),
            f"UnbiasedKD.{red}": lambda x, r=red: ukd(x, old, reduction=r),
            f"UnbiasedKD_alpha.{red}": lambda x, r=red: ukd(x, old, alpha=alpha, reduction=r),
            f"UnbiasedKD_mask.{red}": lambda x, r=red: ukd(x, old, mask=mask, reduction=r),
            f"BCE.{red}": lambda x, r=red: losses.binary_cross_entropy(x, full, over="valid", reduction=r),
            f"PlainCE255.{red}": lambda x, r=red: losses.cross_entropy(x, full, over="valid", reduction=r),
            f"Icarl.{red}": lambda x, r=red: losses.icarl(x, full, old, reduction=r),
            f"Icarl_bkg.{red}": lambda x, r=red: losses.icarl(
                x, full, old, background_from_label=True, reduction=r
            ),
        }
        if red != "none":
            table[f"Focal.{red}"] = lambda x, r=red: losses.focal(x, full, reduction=r)
    teacher = torch.from_numpy(arrays["mdil/teacher_logits"]).to(dtype)
    batch, classes = teacher.shape[:2]
    for name, form in (("as_written", "probabilities"), ("logprob", "log")):
        kl = partial(losses.kl_divergence, teacher_logits=teacher, form=form)
        table |= {  # ours is a mean over the classes whatever the reduction over pixels, theirs is not
            f"mdil_KLD_{name}_mean": kl,
            f"mdil_KLD_{name}_sum": lambda x, f=kl: classes * f(x, reduction="sum"),
            f"mdil_KLD_{name}_batchmean": lambda x, f=kl: classes / batch * f(x, reduction="sum"),
        }
    table["mdil_KLD_as_written"] = table["mdil_KLD_as_written_mean"]
    return table


def run(term, logits, cotangent):
    logits = logits.clone().requires_grad_()
    out = term(logits)
    out.backward(cotangent if out.dim() else None)
    return out.detach(), logits.grad


def agree(value, expected, tolerance):
    """Compare relative to the largest expected value."""
    expected = torch.from_numpy(np.asarray(expected)).to(value.dtype)
    assert_close(value, expected, rtol=tolerance, atol=tolerance * float(expected.abs().max()))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_values_and_gradients_agree(arrays, precision):
    dtype, tolerance = PRECISIONS[precision]
    logits = torch.from_numpy(arrays["logits"]).to(dtype)
    cotangent = torch.from_numpy(arrays["grad_weight"]).to(dtype)
    for name, term in terms(arrays, dtype).items():
        out, gradient = run(term, logits, cotangent)
        agree(out, arrays[f"{precision}/{name}/out"], tolerance)
        agree(gradient, arrays[f"{precision}/{name}/grad"], tolerance)


def test_every_stored_term_of_our_losses_is_compared(arrays):
    stored = {n.split("/")[1] for n in arrays if n.startswith("f64/") and n.endswith("/out")}
    assert stored == set(terms(arrays, torch.float64))


def test_all_ignored_is_zero_where_the_authors_trainer_is_and_where_their_mean_is_nan(arrays):
    logits = torch.from_numpy(arrays["logits"]).double()
    ignored = torch.full(arrays["labels"].shape, 255)
    num_old = int(arrays["old_cl"])
    for name, loss in {
        "UCE": lambda x, over: losses.unbiased_cross_entropy(x, ignored, num_old=num_old, over=over),
        "BCE": lambda x, over: losses.binary_cross_entropy(x, ignored, over=over),
    }.items():
        for over, stored in (("all", "trainer"), ("valid", "mean")):
            out, gradient = run(lambda x, f=loss, o=over: f(x, o), logits, None)
            assert out.item() == np.nan_to_num(arrays[f"edge_allignored/{name}.{stored}/out"])
            assert gradient.abs().max().item() == arrays[f"edge_allignored/{name}.{stored}/grad_absmax"]
    assert np.isnan(arrays["edge_allignored/UCE.mean/out"])  # the difference our docstring states


def test_one_new_class(arrays):
    logits = torch.from_numpy(arrays["logits"]).double()
    old = logits[:, :5].clone()  # the authors' run took the student's first channels as the teacher
    out, gradient = run(lambda x: losses.unbiased_distillation(x, old), logits, None)
    agree(out, arrays["edge_onenew/UnbiasedKD/out"], 1e-12)
    agree(gradient, arrays["edge_onenew/UnbiasedKD/grad"], 1e-12)


def test_forty_fold_logits(arrays):
    scale = float(arrays["big_logits_scale"])
    logits = torch.from_numpy(arrays["logits"]).double()
    old = torch.from_numpy(arrays["old_logits"]).double()
    seen, num_old = torch.from_numpy(arrays["labels"]), int(arrays["old_cl"])
    out, gradient = run(
        lambda x: losses.unbiased_cross_entropy(x, seen, num_old=num_old), logits * scale, None
    )
    agree(out, arrays["big/UCE.trainer/out"], 1e-12)
    agree(gradient, arrays["big/UCE.trainer/grad"], 1e-12)
    out, gradient = run(lambda x: losses.unbiased_distillation(x, old * scale), logits * scale, None)
    agree(out, arrays["big/UKD.mean/out"], 1e-12)
    agree(gradient, arrays["big/UKD.mean/grad"], 1e-12)
