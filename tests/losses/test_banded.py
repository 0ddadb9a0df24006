"""Pixel-wise losses band by band equal the plain losses of resized logits."""

from __future__ import annotations

import doctest

import pytest
import torch
import torch.nn.functional as F
from loss_oracle import per_pixel
from loss_oracle import unbiased_distillation as slow_unbiased_distillation
from no_waiting import NoWaiting
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

from everseg.losses import (
    background_shift,
    banded,
    binary_cross_entropy,
    binary_negatives,
    classification,
    cross_entropy,
    distillation,
    focal,
    icarl,
    icarl_distillation,
    kl_divergence,
    moved_distillation,
    replayed,
    replayed_cross_entropy,
    unbiased_cross_entropy,
    unbiased_distillation,
)
from everseg.losses.banded import Term, pixelwise_losses

B, C, K = 2, 6, 4
SIZES = {
    "odd": ((3, 4), (11, 13)),
    "same": ((7, 5), (7, 5)),
    "one row each way": ((1, 4), (6, 4)),
    "smaller": ((9, 8), (5, 6)),
    "stride": ((2, 3), (16, 24)),
}
WEIGHTS = torch.tensor([0.5, 2.0, 1.0, 0.3, 1.7, 0.9], dtype=torch.float64)
TERMS = {
    "ce": Term(cross_entropy),
    "ce valid": Term(cross_entropy, over="valid"),
    "ce weights": Term(cross_entropy, options={"weight": WEIGHTS}, over="valid", weight=3.0),
    "unce": Term(unbiased_cross_entropy, options={"num_old": K}),
    "unce weights": Term(unbiased_cross_entropy, options={"num_old": K, "weight": WEIGHTS}, over="valid"),
    "unce other old": Term(unbiased_cross_entropy, options={"num_old": 2}),
    "replayed": Term(replayed_cross_entropy, options={"num_old": K}),
    "replayed void": Term(replayed_cross_entropy, options={"num_old": K, "void": "background"}, weight=0.5),
    "moved": Term(moved_distillation, weight=25.0),
    "kd": Term(distillation, weight=100.0),
    "kd alpha": Term(distillation, options={"alpha": 2.5}),
    "kd class weights": Term(distillation, options={"weight": WEIGHTS[:K]}),
    "unkd": Term(unbiased_distillation, weight=10.0, options={"num_old": K}),
    "unkd alpha": Term(unbiased_distillation, options={"alpha": 0.5}),
    "bce": Term(binary_cross_entropy),
    "bce weights": Term(binary_cross_entropy, options={"weight": WEIGHTS}, over="valid"),
    "bce new": Term(binary_cross_entropy, options={"first": K}),
    "bce dkd": Term(
        binary_cross_entropy, options={"first": K, "pos_weight": 35.0, "unlabelled": "negative"}, weight=2.0
    ),
    "bce weights and positives": Term(
        binary_cross_entropy, options={"weight": WEIGHTS, "pos_weight": 2.0, "first": 1}
    ),
    "negatives": Term(binary_negatives, options={"last": 1}),
    "icarl": Term(icarl),
    "icarl background": Term(icarl, options={"background_from_label": True}),
    "icarl kd": Term(icarl_distillation, weight=10.0),
    "icarl kd foreground": Term(icarl_distillation, options={"first": 1}),
    "focal": Term(focal, over="valid"),
}
TOGETHER = {
    "mib": {"ce": TERMS["unce"], "kd": TERMS["unkd"]},
    "mib with weights": {"ce": TERMS["unce weights"], "kd": TERMS["unkd alpha"]},
    "mib with memory": {"ce": TERMS["unce"], "replayed": TERMS["replayed void"], "kd": TERMS["unkd"]},
    "lwf": {"ce": TERMS["ce"], "kd": TERMS["kd"]},
    "lwf with sigmoids": {"bce": TERMS["bce"], "kd": TERMS["kd"]},
    "lwf-mc": {"bce": TERMS["bce"], "kd": TERMS["icarl kd"]},
    "dkd": {"bce": TERMS["bce dkd"], "kd": TERMS["icarl kd foreground"], "ac": TERMS["negatives"]},
    "everything": TERMS,
}


def full(logits, size, align_corners=False):
    if logits.shape[2:] == tuple(size):
        return logits
    return F.interpolate(logits, size, mode="bilinear", align_corners=align_corners)


def plain(terms, logits, label, teacher=None, align_corners=False):
    """Every term from the losses of equal resolution, and the gradient of their sum."""
    x = full(logits, label.shape[1:], align_corners)
    values = {}
    for name, term in terms.items():
        given = (
            {"teacher_logits": full(teacher, label.shape[1:], align_corners)} if teacher is not None else {}
        )
        given |= {"label": label, **term.options}
        if term.loss is distillation or term.loss is unbiased_distillation:
            given |= {"mask": term.mask, "over": term.over}
        elif term.over != "all":
            given["over"] = term.over
        code = term.loss.__code__
        known = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
        values[name] = term.weight * term.loss(x, **{k: v for k, v in given.items() if k in known})
    return values, torch.autograd.grad(sum(values.values()), logits, retain_graph=True)[0]


def tensors(small, size, *, num_old=K, ignored=0.2, scale=4.0, dtype=torch.float64):
    logits = (scale * torch.randn(B, C, *small, dtype=dtype)).requires_grad_()
    teacher = scale * torch.randn(B, num_old, *small, dtype=dtype)
    label = torch.randint(0, C, (B, *size))
    label[torch.rand(B, *size) < ignored] = 255
    return logits, label, teacher


def check(terms, logits, label, teacher, *, align_corners=False, rtol=1e-9, **options):
    expected, expected_grad = plain(terms, logits, label, teacher, align_corners)
    found = pixelwise_losses(terms, logits, label, teacher, align_corners=align_corners, **options)
    assert list(found) == list(terms)
    for name in terms:
        assert_close(found[name], expected[name], rtol=rtol, atol=1e-12)
    grad = torch.autograd.grad(sum(found.values()), logits)[0]
    assert_close(grad, expected_grad, rtol=rtol, atol=1e-15 + 1e-13 * expected_grad.abs().max().item())


@pytest.mark.parametrize("align_corners", [False, True])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("method", TOGETHER)
def test_terms_together_equal_the_plain_losses(method, size, align_corners):
    check(TOGETHER[method], *tensors(*SIZES[size]), band=3, align_corners=align_corners)


@pytest.mark.parametrize("band", [*range(1, 13), None])
def test_every_height_of_the_bands_gives_the_same(band):
    given = tensors((3, 4), (11, 13))
    check(TOGETHER["mib with weights"], *given, band=band)
    check(TOGETHER["lwf with sigmoids"], *given, band=band)
    check({"focal": TERMS["focal"]}, *given, band=band)


@pytest.mark.parametrize("ignored", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("name", TERMS)
def test_each_term_alone_equals_the_plain_loss(name, ignored):
    check({name: TERMS[name]}, *tensors((3, 4), (11, 13), ignored=ignored), band=4)


@pytest.mark.parametrize("form", ["log", "probabilities"])
def test_divergence_of_equal_classes(form):
    terms = {"ce": Term(cross_entropy), "kl": Term(kl_divergence, options={"form": form}, weight=0.1)}
    check(terms, *tensors((3, 4), (11, 13), num_old=C), band=2)


def test_distillation_of_all_classes_and_of_the_background_alone():
    check({"kd": TERMS["kd"]}, *tensors((3, 4), (7, 9), num_old=C))
    check({"kd": TERMS["unkd alpha"], "kd2": TERMS["kd"]}, *tensors((3, 4), (7, 9), num_old=1))


def test_teacher_of_another_resolution():
    logits, label, _ = tensors((3, 4), (12, 8))
    teacher = torch.randn(B, K, 12, 8, dtype=torch.float64)
    check(TOGETHER["mib"], logits, label, teacher, band=5)


def test_threads_share_the_bands_without_changing_a_bit():
    given = tensors((3, 4), (11, 13))
    results = []
    for threads in (1, 3):
        torch.set_num_threads(threads)
        found = pixelwise_losses(TERMS, *given, band=1)
        results.append([*found.values(), *torch.autograd.grad(sum(found.values()), given[0])])
        assert torch.get_num_threads() == threads
    assert all(torch.equal(one, three) for one, three in zip(*results, strict=True))


def test_an_error_inside_a_band_reaches_the_caller():
    def picky(logits):
        if logits.shape[2] > 1:
            raise ValueError("one row")
        return logits.sum(dim=1)

    torch.set_num_threads(2)
    with pytest.raises(ValueError, match="one row"):
        pixelwise_losses({"picky": Term(picky)}, *tensors((3, 4), (11, 13))[:2], band=2)
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize("size", ["odd", "same"])
def test_channels_last(size):
    logits, label, teacher = tensors(*SIZES[size])
    logits = logits.detach().to(memory_format=torch.channels_last).requires_grad_()
    check(TOGETHER["mib"], logits, label, teacher.to(memory_format=torch.channels_last), band=2)


@pytest.mark.parametrize("over", ["all", "valid"])
def test_masks_weigh_pixels(over):
    logits, label, teacher = tensors((3, 4), (11, 13))
    mask = torch.rand(B, 11, 13, dtype=torch.float64) * (torch.rand(B, 11, 13) < 0.5)
    terms = {
        "kd": Term(distillation, mask=mask, over=over),
        "unkd": Term(unbiased_distillation, mask=mask > 0, over=over),
    }
    check(terms, logits, label, teacher, band=3)


def test_a_mask_on_the_labels_loss_is_a_pseudo_labels_confidence():
    logits, label, _ = tensors((3, 4), (11, 13))
    sure = torch.rand(B, 11, 13, dtype=torch.float64)
    found = pixelwise_losses({"ce": Term(cross_entropy, mask=sure, over="valid")}, logits, label, band=2)[
        "ce"
    ]
    entropy = F.cross_entropy(full(logits, (11, 13)), label, ignore_index=255, reduction="none")
    assert_close(found, (entropy * sure).sum() / sure[label != 255].sum())


@pytest.mark.parametrize("over", ["all", "valid"])
def test_an_image_weight_scales_the_image_and_leaves_the_divisor(over):
    logits, label, _ = tensors((3, 4), (11, 13))
    weight = torch.rand(B, dtype=torch.float64)
    term = Term(cross_entropy, image_weight=weight, over=over, weight=2.0)
    found = pixelwise_losses({"ce": term}, logits, label, band=2)["ce"]
    entropy = F.cross_entropy(full(logits, (11, 13)), label, ignore_index=255, reduction="none")
    divisor = label.numel() if over == "all" else (label != 255).sum()
    expected = 2 * sum(w * image.sum() for w, image in zip(weight, entropy, strict=True)) / divisor
    assert_close(found, expected)
    grads = [torch.autograd.grad(value, logits)[0] for value in (found, expected)]
    assert_close(*grads)


def test_value_and_gradient_against_the_pixel_by_pixel_oracle():
    logits, label, teacher = tensors((2, 2), (3, 5))
    found = pixelwise_losses({"kd": Term(unbiased_distillation)}, logits, label, teacher)["kd"]
    (grad,) = torch.autograd.grad(found, logits)

    def slow(x):
        x, t = full(x, (3, 5)).detach().numpy(), full(teacher, (3, 5)).numpy()
        return per_pixel(slow_unbiased_distillation, x, t).mean()

    assert_close(found.item(), slow(logits), rtol=1e-10, atol=0)
    for at in [(0, 0, 0, 0), (0, 2, 1, 1), (1, 5, 0, 1)]:
        step = torch.zeros_like(logits)
        step[at] = 1e-5
        assert_close(
            grad[at].item(), (slow(logits + step) - slow(logits - step)) / 2e-5, rtol=1e-6, atol=1e-9
        )


def test_a_function_of_the_users_own_is_a_term():
    def margin(logits, label, teacher_logits, *, by):
        top = logits.amax(dim=1) - logits.gather(1, label.masked_fill(label == 255, 0)[:, None])[:, 0]
        return F.relu(top - by + teacher_logits[:, 0] ** 2) * (label != 255)

    terms = {"margin": Term(margin, options={"by": 0.5}, over="valid"), "kd": TERMS["unkd"]}
    logits, label, teacher = tensors((3, 4), (11, 13))
    x, t = full(logits, (11, 13)), full(teacher, (11, 13))
    expected = margin(x, label, t, by=0.5).sum() / (label != 255).sum()
    expected_grad = torch.autograd.grad(expected + 10 * unbiased_distillation(x, t), logits)[0]
    found = pixelwise_losses(terms, logits, label, teacher, band=3)
    assert_close(found["margin"], expected)
    assert_close(torch.autograd.grad(sum(found.values()), logits)[0], expected_grad)


def test_terms_may_be_weighed_after_the_pass():
    logits, label, teacher = tensors((3, 4), (11, 13))
    terms = TOGETHER["everything"]
    factors = [0.5 * i for i in range(len(terms))]
    expected, _ = plain(terms, logits, label, teacher)
    found = pixelwise_losses(terms, logits, label, teacher, band=3)
    totals = [sum(f * v for f, v in zip(factors, x.values(), strict=True)) for x in (expected, found)]
    grads = [torch.autograd.grad(total, logits)[0] for total in totals]
    assert_close(grads[1], grads[0])


def passes(monkeypatch):
    """Count the passes over the bands."""
    made, run = [], banded._Plan.run
    monkeypatch.setattr(banded._Plan, "run", lambda *given: made.append(1) or run(*given))
    return made


def test_a_plain_sum_costs_one_pass_and_no_look_at_its_gradients(monkeypatch):
    logits, label, teacher = tensors((3, 4), (11, 13))
    made = passes(monkeypatch)
    for total in (lambda found: torch.stack([*found]).sum(), sum, lambda found: 3 * sum(found)):
        found = pixelwise_losses(TOGETHER["mib"], logits, label, teacher)
        total(found.values()).backward()
    assert len(made) == 3
    found = pixelwise_losses(TOGETHER["mib"], logits, label, teacher)
    (found["ce"] + 2 * found["kd"]).backward()
    assert len(made) == 5


@pytest.mark.parametrize("method", TOGETHER)
def test_devices_without_closed_forms_get_the_plain_functions_and_never_wait(method, monkeypatch):
    monkeypatch.setattr(banded, "_CLOSED_ON", frozenset())
    given = tensors((3, 4), (11, 13))
    check(TOGETHER[method], *given, band=4)
    monkeypatch.setattr(
        banded, "checked_label", lambda name, label, logits: label
    )  # looks at values on the CPU
    for module in (classification, replayed, background_shift):
        monkeypatch.setattr(module, "checked_label", lambda name, label, logits: label)
    with NoWaiting():
        sum(pixelwise_losses(TOGETHER[method], *given, band=4).values()).backward()


def test_a_label_that_no_term_reads_may_belong_to_another_branch():
    logits, label, teacher = tensors((3, 4), (11, 13))
    terms = {"kd": TERMS["kd"]}
    label[label != 255] += 200
    found = pixelwise_losses(terms, logits, label, teacher)["kd"]
    assert_close(found, pixelwise_losses(terms, logits, torch.zeros_like(label), teacher)["kd"])


def test_a_common_factor_scales_the_gradient():
    logits, label, teacher = tensors((3, 4), (11, 13))
    _, expected = plain(TOGETHER["mib"], logits, label, teacher)
    found = pixelwise_losses(TOGETHER["mib"], logits, label, teacher)
    assert_close(torch.autograd.grad(8 * torch.stack([*found.values()]).sum(), logits)[0], 8 * expected)


@pytest.mark.parametrize("method", ["mib", "lwf", "lwf with sigmoids", "everything"])
def test_logits_far_apart_lose_nothing(method):
    """Groups of classes whose exponentials are 0 next to the largest of the pixel, in student and teacher."""
    logits, label, teacher = tensors((3, 4), (11, 13), scale=2000.0)
    check(TOGETHER[method], logits, label, teacher, band=3)


def test_float32_where_a_group_underflows_is_as_good_as_the_plain_loss():
    logits = torch.tensor([0.0, -1.0, -300.0, -301.0]).view(1, 4, 1, 1).requires_grad_()
    label = torch.full((1, 2, 2), 3)
    found = pixelwise_losses({"ce": Term(unbiased_cross_entropy, options={"num_old": 2})}, logits, label)[
        "ce"
    ]
    assert_close(found, torch.tensor(301.3133), rtol=1e-6, atol=0)
    expected = torch.tensor([0.7311, 0.2689, 0.0, -1.0]).view_as(logits)
    assert_close(torch.autograd.grad(found, logits)[0], expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    logits, label, teacher = tensors((3, 4), (32, 40), dtype=torch.float32)
    logits, teacher = logits.detach().to(dtype).requires_grad_(), teacher.to(dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = pixelwise_losses(TOGETHER["mib"], logits, label, teacher)
    precise = logits.detach().double().requires_grad_()
    expected, expected_grad = plain(TOGETHER["mib"], precise, label, teacher.double())
    for name, value in found.items():
        assert value.dtype == torch.float32
        assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-6)
    grad = torch.autograd.grad(sum(found.values()), logits)[0]
    assert grad.dtype == dtype
    assert_close(grad.double(), expected_grad, rtol=1e-2, atol=1e-5)


def test_nothing_is_differentiated_without_need():
    logits, label, teacher = tensors((3, 4), (11, 13))
    expected, _ = plain(TERMS, logits, label, teacher)
    with torch.no_grad():
        found = pixelwise_losses(TERMS, logits, label, teacher)
    assert not any(value.requires_grad for value in found.values())
    for name, value in found.items():
        assert_close(value, expected[name])
    assert not pixelwise_losses({"ce": TERMS["ce"]}, logits.detach(), label)["ce"].requires_grad


def test_inputs_are_left_as_they_are():
    given = tensors((7, 5), (7, 5))
    before = [tensor.detach().clone() for tensor in given]
    sum(pixelwise_losses(TERMS, *given, band=2).values()).backward()
    assert all(torch.equal(tensor, old) for tensor, old in zip(given, before, strict=True))


def test_nothing_of_full_resolution_is_made():
    """The largest tensor that any operation gives is a band, the label's maps, or the rows at small width."""

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor):
                self.size = max(getattr(self, "size", 0), result.untyped_storage().nbytes())
            return result

    classes, old, small, size = 120, 30, (4, 4), (64, 64)
    logits = torch.randn(1, classes, *small, requires_grad=True)
    label = torch.randint(0, classes, (1, *size))
    terms = {"ce": Term(unbiased_cross_entropy, options={"num_old": old}), "kd": Term(unbiased_distillation)}
    teacher = torch.randn(1, old, *small)
    with Largest() as seen:
        sum(pixelwise_losses(terms, logits, label, teacher, band=4).values()).backward()
    assert seen.size == classes * 4 * 64 * 4 == classes * 64 * 64 * 4 / 16


def test_second_derivatives_are_refused():
    logits, label, _ = tensors((3, 4), (11, 13))
    value = pixelwise_losses({"ce": TERMS["ce"]}, logits, label)["ce"]
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(value, logits, create_graph=True)


def test_no_terms_no_losses():
    logits, label, _ = tensors((3, 4), (11, 13))
    assert pixelwise_losses({}, logits, label) == {}


@pytest.mark.parametrize(
    ("terms", "change", "message"),
    [
        ({"kd": Term(distillation)}, {"teacher_logits": None}, "kd: .*reads the teacher"),
        ({"ce": Term(cross_entropy)}, {"label": torch.zeros(B, 11, 12)}, "integer label"),
        ({"ce": Term(cross_entropy)}, {"label": torch.full((B, 11, 13), C)}, "out of range"),
        ({"ce": Term(cross_entropy)}, {"label": torch.zeros(1, 11, 13).long()}, "label of shape"),
        ({"ce": Term(cross_entropy)}, {"label": torch.zeros(11, 13).long()}, r"label \(B, H, W\)"),
        ({"ce": Term(cross_entropy)}, {"band": 0}, "at least 1 row"),
        ({"ce": Term(cross_entropy, over="some")}, {}, "ce: over"),
        ({"ce": Term(cross_entropy, mask=torch.ones(B, 3, 4))}, {}, "ce: .*mask"),
        ({"ce": Term(cross_entropy, image_weight=torch.ones(B + 1))}, {}, "ce: .*image_weight"),
        ({"ce": Term(cross_entropy, options={"weight": torch.ones(3)})}, {}, "6 class weights"),
        ({"ce": Term(unbiased_cross_entropy, options={"num_old": C})}, {}, "num_old must be in"),
        ({"kd": Term(distillation, options={"alpha": 0.0})}, {}, "distillation: alpha"),
        ({"kl": Term(kl_divergence)}, {}, "kl_divergence: the teacher has 4 classes"),
        ({"sum": Term(lambda logits: logits.sum())}, {}, "sum: .*pixel-wise"),
        ({"kd": Term(distillation)}, {"teacher_logits": torch.zeros(B, C + 1, 3, 4)}, "K <= C"),
        ({"ce": Term(cross_entropy)}, {"logits": torch.zeros(B, C)}, "logits"),
    ],
)
def test_bad_input_is_refused(terms, change, message):
    logits, label, teacher = tensors((3, 4), (11, 13))
    given = {"logits": logits, "label": label, "teacher_logits": teacher, **change}
    with pytest.raises(ValueError, match=message):
        pixelwise_losses(terms, **given)


def test_docstring_example_holds():
    result = doctest.testmod(banded)
    assert (result.attempted > 0, result.failed) == (True, 0)


@pytest.mark.parametrize("case", SIZES)
def test_an_image_in_stripes_is_the_image_at_once(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Many classes: rows are resized a stripe at a time, and neighbouring stripes share small rows."""
    small, size = SIZES[case]
    torch.manual_seed(1)
    logits, teacher = torch.randn(B, C, *small).double(), torch.randn(B, K, *small).double()
    label = torch.randint(0, C, (B, *size)).masked_fill(torch.rand(B, *size) < 0.2, 255)
    mask = torch.rand(B, *size) < 0.7
    terms = {"unce": Term(unbiased_cross_entropy, options={"num_old": K}, mask=mask), "kd": TERMS["kd"]}
    found = []
    for whole in (2**25, 0):
        monkeypatch.setattr(banded, "_WHOLE_BYTES", whole)
        monkeypatch.setattr(banded, "_STRIPE_BYTES", 2 * 8 * C * small[1])  # two rows of float64
        given = logits.clone().requires_grad_()
        losses = pixelwise_losses(terms, given, label, teacher, band=1)
        torch.stack([*losses.values()]).sum().backward()
        found.append((losses, given.grad))
    stripes = banded._stripes(logits, size[0], 1)
    assert len(stripes) == (1 if small[0] == size[0] else -(-size[0] // 2))
    assert_close(found[0], found[1], rtol=1e-12, atol=1e-13)
