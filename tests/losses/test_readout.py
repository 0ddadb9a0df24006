"""Readouts by bands and by windows give the class that a direct evaluation at full resolution gives."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from everseg.inference.windows import sliding_ids
from everseg.losses import argmax
from everseg.losses.argmax import predict_ids
from everseg.losses.readout import (
    full_values,
    merge_background,
    merged_outputs,
    small_values,
    with_residual,
)
from everseg.runs.input_form import Windows
from everseg.types import Readout, SegOutput

READOUTS = {
    "default": Readout(),
    "ssul": Readout("sigmoid", merge=("unknown",)),
    "two merges": Readout("sigmoid", merge=("unknown", "other")),
    "merge at once": Readout("sigmoid", before=True, merge=("unknown",)),
    "merged logits": Readout(merge=("unknown",)),
    "barm": Readout("sigmoid", before=True, residual="residual"),
    "barm after": Readout("sigmoid", residual="residual"),
    "acil": Readout("sigmoid", before=True),
    "threshold": Readout("sigmoid", threshold=0.7),
    "threshold before": Readout("sigmoid", before=True, threshold=0.7),
    "threshold of logits": Readout(threshold=0.3),
}


def directly(output: SegOutput, readout: Readout, size: tuple[int, int]) -> np.ndarray:
    """Values (B, C, H, W) by NumPy and full-size maps, in the order that the readout's documentation gives."""

    def large(maps: np.ndarray) -> np.ndarray:
        return F.interpolate(
            torch.from_numpy(maps), size, mode="bilinear", align_corners=False
        ).numpy()  # the only torch: how maps are resized is everseg's definition

    def active(x: np.ndarray) -> np.ndarray:
        with np.errstate(over="ignore"):
            return x if readout.activation == "none" else 1 / (1 + np.exp(-x))

    z = output.logits.double().numpy().copy()
    extra = {name: value.double().numpy() for name, value in output.auxiliary.items()}
    if readout.residual in extra:
        z[:, 0] += np.minimum(extra[readout.residual], 0).sum(axis=1)
    merged = [extra[name].sum(axis=1, keepdims=True) for name in readout.merge]
    if readout.before:
        z, merged = large(active(z)), [large(active(one)) for one in merged]
    else:
        z, merged = active(large(z)), [active(large(one)) for one in merged]
    if readout.threshold is not None:
        z[:, 0] = readout.threshold
    for one in merged:
        z[:, :1] += one
    return z


def output_of(seed: int, classes: int = 4, small: tuple[int, int] = (5, 7), scale: float = 3.0) -> SegOutput:
    draw = torch.Generator().manual_seed(seed)

    def maps(channels: int) -> torch.Tensor:
        return scale * torch.randn(2, channels, *small, generator=draw, dtype=torch.float64)

    return SegOutput(maps(classes), {}, {"unknown": maps(3), "other": maps(1), "residual": maps(2)})


@pytest.fixture(params=["cpu", "elsewhere"])
def way(request, monkeypatch) -> str:
    """The CPU's form, or that of other devices, here on the CPU."""
    if request.param == "elsewhere":
        monkeypatch.setattr(argmax, "_on_the_cpu", argmax._elsewhere)
    return request.param


def check(ids: torch.Tensor, values: np.ndarray) -> None:
    """The chosen value is the largest but for its last digits; hardly any pixel has another class."""
    chosen = np.take_along_axis(values, ids.numpy().astype(np.int64)[:, None], axis=1)[:, 0]
    best = values.max(axis=1)
    assert (best - chosen <= 1e-12 * np.maximum(1, np.abs(best))).all()
    assert (ids.numpy() != values.argmax(axis=1)).mean() < 1e-3


@pytest.mark.parametrize("name", READOUTS)
@pytest.mark.parametrize("size", [(41, 53), (5, 7), (5, 30), (3, 4)])
def test_by_bands_as_directly(way, name, size, monkeypatch):
    monkeypatch.setattr(argmax, "_BAND_PIXELS", 7 * size[1])
    monkeypatch.setattr(argmax, "_BAND_BYTES", 8 * 5 * 7 * size[1])
    readout = READOUTS[name]
    output = output_of(1)
    values = small_values(output, readout)
    merged = merged_outputs(readout)
    assert values.shape[1] == 4 + merged
    check(predict_ids(values, size, merged), directly(output, readout, size))
    check(full_values(output, readout, size).argmax(1), directly(output, readout, size))


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 2**32 - 1),
    name=st.sampled_from(list(READOUTS)),
    classes=st.integers(2, 6),
    small=st.tuples(st.integers(1, 6), st.integers(1, 6)),
    size=st.tuples(st.integers(1, 30), st.integers(1, 30)),
    scale=st.sampled_from([0.1, 1.0, 8.0]),
)
def test_any_size_and_scale(seed, name, classes, small, size, scale):
    output, readout = output_of(seed, classes, small, scale), READOUTS[name]
    ids = predict_ids(small_values(output, readout), size, merged_outputs(readout))
    values = directly(output, readout, size)
    chosen = np.take_along_axis(values, ids.numpy().astype(np.int64)[:, None], axis=1)[:, 0]
    assert (values.max(axis=1) - chosen <= 1e-11 * np.maximum(1, np.abs(values).max())).all()


def test_a_sigmoid_that_saturates_loses_no_class():
    """Where probabilities are 1 in floating point, the larger logit still wins, as in exact arithmetic."""
    logits = torch.tensor([-50.0, 40.0, 60.0]).view(1, 3, 1, 1)
    output = SegOutput(logits, {}, {"unknown": torch.full((1, 1, 1, 1), -60.0)})
    readout = READOUTS["ssul"]
    assert predict_ids(small_values(output, readout), (2, 2), 1).unique().tolist() == [2]
    low = SegOutput(-logits - 400, {}, {"unknown": torch.full((1, 1, 1, 1), -800.0)})
    assert predict_ids(small_values(low, readout), (2, 2), 1).unique().tolist() == [0]
    # Background and unknown together are certain: nothing is above them.
    sure = SegOutput(
        torch.tensor([1.0, 99.0]).view(1, 2, 1, 1), {}, {"unknown": torch.full((1, 1, 1, 1), 1.0)}
    )
    assert predict_ids(small_values(sure, readout), (2, 2), 1).unique().tolist() == [0]


@settings(deadline=None, max_examples=100)
@given(st.lists(st.floats(-30, 30), min_size=2, max_size=4))
def test_the_merged_logit_is_that_of_the_summed_probabilities(logits):
    found = float(merge_background(*(torch.tensor(x, dtype=torch.float64) for x in logits[:1]),
                                   [torch.tensor(x, dtype=torch.float64) for x in logits[1:]]))  # fmt: skip
    total = math.fsum(1 / (1 + math.exp(-x)) for x in logits)
    if total >= 1 + 1e-12:
        assert found == math.inf
    elif total < 1 - 1e-9:
        assert found == pytest.approx(math.log(total / (1 - total)), rel=1e-6, abs=1e-9)


def test_a_residual_only_lowers_the_background():
    logits = torch.randn(1, 3, 2, 2)
    residual = torch.tensor([2.0, -3.0, -0.5]).view(1, 3, 1, 1).expand(1, 3, 2, 2)
    found = with_residual(logits, residual)
    assert torch.equal(found[:, 1:], logits[:, 1:])
    torch.testing.assert_close(found[:, 0], logits[:, 0] - 3.5)


@pytest.mark.parametrize("name", READOUTS)
def test_windows_mean_what_is_resized(way, name):
    """Windows see the image as it is; their small values are resized, then averaged, then merged."""
    readout, windows = READOUTS[name], Windows(16, 0.5)
    image = torch.randn(3, 37, 29, dtype=torch.float64)
    weight = 3 * torch.randn(10, 3, 4, 4, dtype=torch.float64)

    def network(part: torch.Tensor) -> SegOutput:
        maps = F.conv2d(part, weight, stride=4)
        return SegOutput(
            maps[:, :4], {}, {"unknown": maps[:, 4:7], "other": maps[:, 7:8], "residual": maps[:, 8:]}
        )

    total, number = 0, torch.zeros(37, 29, dtype=torch.float64)
    logits = torch.zeros(1, 4 + merged_outputs(readout), 37, 29, dtype=torch.float64)
    for top in windows.starts(37):
        for left in windows.starts(29):
            area = (..., slice(top, top + 16), slice(left, left + 16))
            values = small_values(network(image[None][area]), readout)
            logits[area] += F.interpolate(values, (16, 16), mode="bilinear", align_corners=False)
            number[area[1:]] += 1
            total += 1
    assert total > 4
    mean = logits / number
    merged = merged_outputs(readout)
    if merged:
        p = mean.sigmoid()
        mean = torch.cat([p[:, :1] + p[:, 4:].sum(dim=1, keepdim=True), p[:, 1:4]], dim=1)
    ids = sliding_ids(lambda part: small_values(network(part), readout), image, windows, merged)
    assert (ids != mean.argmax(1)[0]).float().mean() < 2e-3


def test_the_default_is_the_argmax_of_the_logits_bit_for_bit():
    output = output_of(3)
    assert small_values(output, Readout()) is output.logits
    ids = predict_ids(output.logits, (33, 21))
    for name in ("default", "acil"):
        assert merged_outputs(READOUTS[name]) == 0
    assert torch.equal(predict_ids(small_values(output, Readout()), (33, 21), 0), ids)
    assert torch.equal(predict_ids(small_values(output, Readout("sigmoid")), (33, 21)), ids)


def test_an_output_that_is_missing_is_named():
    output = SegOutput(torch.zeros(1, 2, 1, 1), {})
    with pytest.raises(ValueError, match="'unknown'"):
        small_values(output, READOUTS["ssul"])
    assert small_values(output, READOUTS["barm"]).shape == (1, 2, 1, 1)  # the first step has no residual


@pytest.mark.parametrize("readout", READOUTS.values(), ids=list(READOUTS))
def test_a_readout_is_read_back_from_json(readout):
    found, problems = Readout.of_json(json.loads(json.dumps(readout.to_json())))
    assert (found, problems) == (readout, [])


@pytest.mark.parametrize(
    "stored",
    [
        [],
        {"activation": "softplus"},
        {"merge": "unknown"},
        {"merge": [1]},
        {"before": 1},
        {"threshold": True},
        {"threshold": float("nan")},
        {"later": 1},
        {"activation": "sigmoid", "threshold": 1.5},
        {"merge": ["unknown"], "threshold": 0.5},
    ],
)
def test_another_form_is_told(stored):
    assert Readout.of_json(stored)[1]
