"""complete: which labels it completes by the teacher, and where it keeps the teacher's outputs."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from everseg.labels import LabelSpace
from everseg.methods.base import StepContext
from everseg.methods.complete import Complete
from everseg.models.build import deeplabv3_tiny
from everseg.models.model import frozen_copy
from everseg.scenarios.steps import Source, Step
from everseg.types import Batch, SegOutput

NAMES = ("background", "road", "tree", "car")
SURE, UNSURE = 9.0, 0.4


def completed(
    label: list[int], teacher: list[tuple[int, float]], *, table: list[int], background: int | None = 0
) -> tuple[list[int], list[bool]]:
    """Complete one row of pixels.

    Args:
        label: train ids.
        teacher: class and logit of each pixel.
        table: raw id -> train id of the data; what it does not name is void.
    """
    space = LabelSpace(((0, 1, 2), (3,)), NAMES, background)
    lut = bytes(table + [255] * (256 - len(table)))
    source = Source("default", "site", "train", (0,), lut)
    step = Step(1, (source,), (source,), {"default": space}, {"default": 1})
    logits = torch.zeros(1, 3, 1, len(label))
    for place, (best, value) in enumerate(teacher):
        logits[0, best, 0, place] = value
    batch = Batch(torch.zeros(1, 3, 1, len(label)), torch.tensor([[label]]), "default")
    found, kept = Complete().completed(batch, SimpleNamespace(step=step), SegOutput(logits, {}))
    return found[0, 0].tolist(), kept[0, 0].tolist()


def test_a_hidden_old_class_is_never_taught_as_background():
    """The data label road and car. A tree may stand in their background."""
    label = [0, 0, 0, 0, 1, 1, 3, 255]
    teacher = [(2, SURE), (0, SURE), (2, UNSURE), (1, SURE), (1, SURE), (2, SURE), (1, SURE), (2, SURE)]
    found, kept = completed(label, teacher, table=[0, 1, 3])
    assert found == [2, 0, 255, 255, 1, 1, 3, 255]
    # kept: no label contradicts the teacher
    assert kept == [True, True, True, True, True, False, False, True]


def test_without_background_what_is_not_labelled_is_completed():
    label = [255, 255, 3, 255]
    found, kept = completed(
        label, [(0, SURE), (2, UNSURE), (0, SURE), (1, SURE)], table=[255, 3, 1], background=None
    )
    assert found == [0, 255, 3, 255]  # the data would have labelled the last pixel's class
    assert kept == [True, True, False, True]


@pytest.mark.parametrize("background", [0, None])
def test_labels_of_data_that_label_every_old_class_stay_as_they_are(background):
    table = [0, 1, 2, 3]
    label = [0, 1, 255, 3]
    teacher = [(2, SURE), (2, SURE), (1, SURE), (0, SURE)]
    assert completed(label, teacher, table=table, background=background)[0] == label


def test_other_branches_are_held_by_the_teacher():
    """Each adds the mean over pixels of -(1/K) sum q log p; and what the branches share learns slowly."""
    torch.manual_seed(0)
    model = deeplabv3_tiny(widths=[8, 8, 8, 8], per_branch="norm").eval()
    model.grow({"day": 3})
    model.grow({"dusk": 4})
    teacher = frozen_copy(model)
    with torch.no_grad():
        for weight in model.parameters():
            weight += 0.05 * torch.randn_like(weight)
    image, label = torch.rand(2, 3, 32, 32), torch.randint(0, 4, (2, 32, 32))
    dusk = LabelSpace(((0, 1, 2, 3),), NAMES)
    day = LabelSpace(((0, 1, 2),), NAMES[:3])
    source = Source("dusk", "site", "train", (0,), bytes([0, 1, 2, 3] + [255] * 252))
    found = {}
    for number, spaces in enumerate(({"dusk": dusk}, {"day": day, "dusk": dusk})):
        step = Step(2, (source,), (source,), spaces, {})
        ctx = StepContext(step=step, model=model, module=model, teacher=teacher)
        (terms,) = Complete(kd_weight=3.0).losses(Batch(image, label, "dusk"), ctx)
        found[number] = terms
        rates = {group["lr_scale"] for group in Complete().param_groups(model, step)}
        assert rates == ({1.0, 0.01} if number else {1.0})
    with torch.no_grad():
        x, t = (
            torch.nn.functional.interpolate(
                m(image, ("day",))["day"].logits, (32, 32), mode="bilinear", align_corners=False
            )
            for m in (model, teacher)
        )
    expected = -(t.softmax(1) * x.log_softmax(1)).sum(1).mean() / 3
    assert found[1]["ce"].item() == found[0]["ce"].item()
    assert (found[1]["kd"] - found[0]["kd"]).item() == pytest.approx(3.0 * expected.item(), rel=1e-4)
