"""Sliding windows: where they lie, what they say together, how much memory they take, and runs that use them."""

from __future__ import annotations

import json
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import domain_toy
import numpy as np
import pytest
import torch
import torch.nn.functional as F
import toy

import everseg
from everseg.errors import ConfigError
from everseg.inference.windows import infer_sliding_branch, sliding_ids
from everseg.models.branch_choice import branch_distances
from everseg.models.erfnet import erfnet
from everseg.runs.input_form import Windows

USER_CODE = f"data={toy.HERE}"
SLIDING = {"dataset": toy.HERE, "crop": 32, "evaluation": "sliding", "window": 24, "workers": 0}


@pytest.mark.parametrize("length", [1, 31, 32, 33, 50, 64, 500])
@pytest.mark.parametrize("overlap", [0.0, 1 / 3, 0.5, 0.9])
def test_windows_cover_an_axis_overlap_enough_and_end_flush(length, overlap):
    starts = Windows(32, overlap).starts(length)
    side = min(32, length)
    covered = np.zeros(length, int)
    for start in starts:
        covered[start : start + side] += 1
    assert covered.min() >= 1
    assert (starts[0], starts[-1] + side) == (0, length)
    assert list(starts) == sorted(set(starts))
    assert all(a + 32 - b >= int(32 * overlap) for a, b in pairwise(starts))


def see(windows: torch.Tensor) -> torch.Tensor:
    """A small network: three features at stride 4, which depend on the whole window."""
    small = F.avg_pool2d(windows.float(), 4, ceil_mode=True)
    return torch.cat([small, small.flip(1) * small.mean((1, 2, 3), keepdim=True), small.cos()], 1)


def plain_mean(image: torch.Tensor, windows: Windows) -> torch.Tensor:
    """Mean logits (C, H, W) of all windows at full size, and nothing clever."""
    height, width = image.shape[1:]
    tall, wide = min(windows.side, height), min(windows.side, width)
    total, number = torch.zeros(9, height, width), torch.zeros(height, width)
    for top in windows.starts(height):
        for left in windows.starts(width):
            here = slice(top, top + tall), slice(left, left + wide)
            logits = see(image[:, *here][None])
            total[:, *here] += F.interpolate(logits, (tall, wide), mode="bilinear", align_corners=False)[0]
            number[here] += 1
    assert number.min() >= 1
    return total / number


@pytest.mark.parametrize("size", [(50, 70), (32, 33), (20, 90), (90, 20), (12, 12), (64, 64)])
@pytest.mark.parametrize("overlap", [0.0, 1 / 3, 0.75])
def test_ids_are_the_argmax_of_the_mean_at_full_size(size, overlap):
    image = torch.randn(3, *size, generator=torch.Generator().manual_seed(0))
    windows = Windows(32, overlap, batch=3)
    expected = plain_mean(image, windows)
    ids = sliding_ids(see, image, windows)
    best, chosen = expected.max(0).values, expected.gather(0, ids.long()[None])[0]
    assert (ids.dtype, ids.shape) == (torch.uint8, size)
    assert (best - chosen).max() < 1e-5
    assert (ids != expected.argmax(0)).float().mean() < 2e-3


def test_windows_go_through_the_network_in_batches_and_rows_are_let_go():
    sizes = []

    def note(windows: torch.Tensor) -> torch.Tensor:
        sizes.append(len(windows))
        return see(windows)

    sliding_ids(note, torch.zeros(3, 64, 200), Windows(32, 0.0, batch=4))
    assert sizes == [4, 3, 4, 3]  # 7 windows in each of 2 rows


def test_the_path_is_that_with_the_smallest_mean_distance_over_windows():
    torch.manual_seed(0)
    model = erfnet(per_branch="norm", widths=(6, 8, 12), blocks=(1, 1), dropout=(0, 0))
    for branch, mean in (("day", 0.8), ("night", 0.1)):
        model.grow({branch: 2})
        model.train()
        model(mean + 0.05 * torch.randn(4, 3, 32, 32), (branch,))
    image = 0.1 + 0.05 * torch.randn(3, 50, 70)
    windows = Windows(32, 1 / 3, batch=4)
    crops = [image[:, t : t + 32, x : x + 32] for t in windows.starts(50) for x in windows.starts(70)]
    distances = torch.cat([branch_distances(model.eval(), crop[None]) for crop in crops]).mean(0)
    expected = model.branches[int(distances.argmin())]
    assert infer_sliding_branch(model, lambda part: part, image, windows) == expected
    other = model.branches[1 - int(distances.argmin())]
    assert infer_sliding_branch(model, lambda part: part, image, windows, [other]) == other


# ---------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> everseg.Run:
    out = tmp_path_factory.mktemp("sliding")
    return everseg.run(toy.settings(out, data=SLIDING, train={"epochs": 10, "epochs_next": 6}), quiet=True)


def test_a_run_is_scored_and_predicts_through_its_windows(done):
    classes = json.loads((done.path / "steps/01/final/classes.json").read_text())
    assert (classes["evaluation"], classes["window"], classes["overlap"]) == (
        "sliding",
        24,
        pytest.approx(1 / 3),
    )
    model = everseg.load(done.path)
    assert model.form.windows() == Windows(24, 1 / 3)
    counts = np.zeros((4, 4), np.int64)
    split = toy.build().splits["val"]
    for index in range(len(split)):
        image, mask = split.read(index)
        np.add.at(counts, (mask, model.predict(image).ids), 1)
    stored = np.load(done.path / "steps/01/confusion.npz")["default"]
    assert np.abs(stored - counts).sum() <= 4  # batches of other sizes differ in last digits
    assert stored.sum() == counts.sum()
    assert (stored.sum(0) > 0).sum() > 1  # it has learnt something that windows can change


def test_a_finished_run_can_be_scored_in_every_way(done):
    own = everseg.evaluate(done.path, overrides=[USER_CODE], quiet=True)
    again = everseg.evaluate(done.path, overrides=[USER_CODE, "data.evaluation=sliding"], quiet=True)
    assert own.confusion["default"].tolist() == again.confusion["default"].tolist()
    ways = {}
    for text in ("data.evaluation=whole", "data.window=40", "data.window=16 data.overlap=0.5"):
        found = everseg.evaluate(done.path, overrides=[USER_CODE, *text.split()], quiet=True)
        ways[text] = found.confusion["default"].tolist()
        assert np.sum(ways[text]) == np.sum(own.confusion["default"])
    assert ways["data.window=40"] == ways["data.evaluation=whole"]  # one window, the whole image
    assert ways["data.window=16 data.overlap=0.5"] != own.confusion["default"].tolist()


def test_domains_and_inferred_paths_go_through_windows(tmp_path):
    data = {"transform": "resize", "evaluation": "sliding", "window": 24}
    run = everseg.run(domain_toy.settings(tmp_path, data=data, train={"max_iterations": 4}), quiet=True)
    overrides = [f"data.domains.{name}.dataset={domain_toy.HERE}" for name in ("day", "dusk")]
    plain = everseg.evaluate(run.path, overrides=overrides, quiet=True)
    found = everseg.evaluate(run.path, overrides=overrides, infer_domain=True, quiet=True)
    assert {name: sum(paths.values()) for name, paths in found.inferred.items()} == {"day": 6, "dusk": 6}
    assert np.sum(plain.confusion["day"]) == np.sum(found.confusion["day"])
    image, _ = domain_toy.build(light="dusk").splits["val"].read(0)
    predicted = everseg.load(run.path).predict(image, infer_domain=True)
    assert predicted.branch in ("day", "dusk")
    assert predicted.ids.shape == image.shape[:2]


@pytest.mark.parametrize("bad", ["data.overlap=1", "data.window=4", "data.evaluation=slide"])
def test_bad_settings_are_named(done, bad):
    with pytest.raises(ConfigError, match=bad.partition("=")[0].replace(".", r"\.")):
        everseg.evaluate(done.path, overrides=[USER_CODE, bad], quiet=True)


# ---------------------------------------------------------------- memory

PEAK = """
import sys
import numpy as np, torch
from pathlib import Path
from everseg.labels import LabelSpace
from everseg.models.build import deeplabv3_tiny
from everseg.inference.predict import InputForm, LoadedModel

torch.set_num_threads(1)
model = deeplabv3_tiny(widths=(8, 8, 8, 8), hidden=8, norm="bn")
model.grow({"default": 60})
space = LabelSpace((tuple(range(60)),), tuple(map(str, range(60))), None)
loaded = LoadedModel(model, {"default": space}, InputForm("sliding", window=256))
loaded.predict(np.zeros((300, 300, 3), np.uint8))
before = int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])
loaded.predict(np.zeros((int(sys.argv[1]), 600, 3), np.uint8))
print(int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]) - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_memory_of_a_large_image_is_that_of_its_bytes():
    """Per further row: bytes of the image and of the result, nothing per class and pixel."""
    small, large = (
        int(
            subprocess.run(
                [sys.executable, "-c", PEAK, rows], capture_output=True, text=True, check=True
            ).stdout
        )
        for rows in ("600", "3000")
    )
    per_pixel = (large - small) * 1024 / (2400 * 600)
    assert per_pixel < 24  # image twice (6), ids (1) and slack; logits would be 60 * 4
