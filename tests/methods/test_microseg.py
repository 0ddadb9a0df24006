"""MicroSeg: what is trained, which map decides, what is refused; and the numbers of its original code."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import pytest
import torch

from saying import must_say

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
from benchmarks import golden_microseg  # noqa: E402
from benchmarks.golden_checks import EXACT  # noqa: E402
from benchmarks.golden_microseg import check_microseg, replay_microseg  # noqa: E402

from everseg.errors import ConfigError  # noqa: E402
from everseg.labels import IGNORED  # noqa: E402
from everseg.losses import binary_cross_entropy, completed_labels  # noqa: E402
from everseg.losses.reading import read_ids  # noqa: E402
from everseg.methods.microseg import MicroSeg  # noqa: E402
from everseg.methods.unknown import output_labels  # noqa: E402
from everseg.models.build import from_description  # noqa: E402
from everseg.models.region_head import pooled_over_regions  # noqa: E402

FOLDER = ROOT.parent / "shared" / "golden"
STEMS = sorted(path.stem for path in FOLDER.glob("train_microseg*.npz"))
SMALL = {"head_width": 6, "clusters": 2, "proposals": 5}


@pytest.mark.parametrize(("small", "size"), [((3, 4), (9, 8)), ((5, 5), (5, 5)), ((4, 4), (10, 10))])
def test_pooling_takes_the_mean_of_the_cells_whose_nearest_pixel_is_in_the_region(small, size):
    torch.manual_seed(1)
    features = torch.randn(2, 3, *small, dtype=torch.float64)
    regions = torch.randint(0, 5, (2, *size))
    regions[:, 0] = 255
    found = pooled_over_regions(features, regions, 6)
    for b in range(2):
        for n in range(6):
            cells = [
                features[b, :, i, j]
                for i in range(small[0])
                for j in range(small[1])
                if int(regions[b, i * size[0] // small[0], j * size[1] // small[1]]) == n
            ]
            wanted = torch.stack(cells).sum(0) / (len(cells) + 1e-7) if cells else torch.zeros(3).double()
            torch.testing.assert_close(found[b, n], wanted)


def everywhere(values: torch.Tensor, regions: torch.Tensor) -> torch.Tensor:
    """Logits of regions (B, O, N, 1) at every pixel, 0 where there is no region: (B, O, H, W)."""
    padded = torch.nn.functional.pad(values[..., 0], (0, 1))
    places = torch.where(regions < values.shape[2], regions, values.shape[2])
    return torch.stack([one[:, place] for one, place in zip(padded, places, strict=True)])


def test_the_terms_of_a_later_step_are_those_of_logits_at_every_pixel(toy):
    method, model = MicroSeg(threshold=0.5, **SMALL), toy.model()
    toy.train(method, model, toy.steps[0])
    run = toy.begin(method, model, toy.steps[1])
    run.teacher.head("a").classifiers[0].of_regions.bias[0] += 2.0
    batch = toy.batches(toy.steps[1], 1)[0]
    regions = batch.extra["proposals"]
    with torch.no_grad():
        student, teacher = (
            m(batch.image, ("a",), extra=batch.extra)["a"].features for m in (run.model, run.teacher)
        )
        pixels, taught = (
            torch.cat(
                [
                    everywhere(taps["regions.unknown"], regions).sum(1, keepdim=True),
                    everywhere(taps["regions"], regions),
                ],
                dim=1,
            )
            for taps in (student, teacher)
        )
        label = output_labels(batch, 5, "all")
        filled = completed_labels(taught, label, num_classes=6, threshold=0.5, num_open=2)
        assert not filled.equal(label)
        maps = torch.nn.functional.normalize(
            everywhere(student["regions.unknown"], regions).flatten(2), dim=2
        )
        similarity = maps @ maps.transpose(1, 2)
    terms = run.take(batch).terms[0]
    assert set(terms) == {"bce", "unseen"}
    expected = binary_cross_entropy(pixels, filled, over="valid")
    torch.testing.assert_close(terms["bce"].detach(), expected, rtol=1e-5, atol=0)
    unseen = -similarity.log_softmax(2).diagonal(dim1=1, dim2=2).mean()
    torch.testing.assert_close(terms["unseen"].detach(), unseen, rtol=1e-5, atol=0)


def test_a_later_step_trains_what_sees_regions_and_leaves_the_rest(toy):
    method, model = MicroSeg(**SMALL), toy.model()
    toy.train(method, model, toy.steps[0])
    run = toy.begin(method, model, toy.steps[1])
    start = {name: value.clone() for name, value in model.state_dict().items()}
    run.take(*toy.batches(toy.steps[1]))
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, start[name])}
    parts = ("classifiers.1", "others.unknown", "others.background")
    places = (*[f"blocks.{n}.conv.weight" for n in range(3)], "of_regions.weight", "of_regions.bias")
    assert moved == {f"heads.a.{part}.{place}" for part in parts for place in places}
    assert {name for name, weight in model.named_parameters() if weight.requires_grad} == moved


def test_a_region_has_one_class_and_pixels_without_are_background(toy):
    method, model = MicroSeg(**SMALL), toy.model()
    toy.train(method, model, *toy.steps)
    model.eval()
    batch = toy.batches(toy.steps[1], 1)[0]
    head = model.head("a")
    with torch.no_grad():
        for name in ("unknown", "background"):  # else nothing exceeds their sum
            head.parts[name].of_regions.bias.fill_(-4.0)
        output = model(batch.image, ("a",), extra=batch.extra)["a"]
    ids = read_ids(output, model.readout, batch.label.shape[1:])
    regions = batch.extra["proposals"]
    for b in range(2):
        assert not ids[b][regions[b] == 255].any()
        for n in range(5):
            assert len(ids[b][regions[b] == n].unique()) <= 1
    assert ids.any()


def test_its_head_comes_back_from_a_description(toy):
    method, model = MicroSeg(**SMALL), toy.model()
    toy.train(method, model, *toy.steps)
    again = from_description(model.describe())
    again.load_state_dict(model.state_dict(), strict=True)
    batch = toy.batches(toy.steps[1], 1)[0]
    one, other = (
        m.eval()(batch.image, ("a",), extra=batch.extra)["a"].features["regions"] for m in (model, again)
    )
    assert torch.equal(one, other)
    assert one.shape == (2, 5, 5, 1)


def test_no_region_at_all_and_nothing_but_ignored_pixels_are_fine(toy):
    method, model = MicroSeg(**SMALL), toy.model()
    toy.train(method, model, toy.steps[0])
    batch = toy.batches(toy.steps[1], 1)[0]
    none = dataclasses.replace(batch, extra={"proposals": torch.full_like(batch.label, 255)})
    empty = dataclasses.replace(batch, label=torch.full_like(batch.label, IGNORED))
    run = toy.begin(method, model, toy.steps[1]).take(none, empty)
    assert all(torch.isfinite(value) for terms in run.terms for value in terms.values())
    assert float(run.terms[1]["bce"]) == 0


def test_without_regions_it_says_so(toy):
    method, model = MicroSeg(**SMALL), toy.model()
    run = toy.begin(method, model, toy.steps[0])
    with pytest.raises(ConfigError) as error:
        run.take(dataclasses.replace(toy.batches(toy.steps[0], 1)[0], extra={}))
    must_say(error.value, "proposals", "data.extra")
    assert method.needs_extra == ("proposals",)


@pytest.mark.golden
@pytest.mark.parametrize("stem", STEMS)
def test_replay_agrees_with_the_original(golden, stem):
    found = replay_microseg(golden, stem)
    assert not {name: entry for name, entry in found.items() if not entry.largest <= EXACT}
    quantities = {"labels", "targets", "bce", "bce_pixel", "unseen", "gradient norms", "final weights"}
    assert quantities | {"confusion counts", "learning rate"} <= found.keys()


@pytest.mark.golden
def test_functions_agree_with_the_original(golden):
    rows = check_microseg(golden)
    assert not [row for row in rows if not row.difference <= row.limit]
    assert {"unseen, value", "unseen, gradient"} <= {row.quantity for row in rows}


@pytest.mark.golden
@pytest.mark.parametrize(
    ("wrong", "quantity"),
    [
        ({"unseen_weight": 0.5}, "final weights"),
        ({"encoder_rate": 1.0}, "learning rate"),
        ({"proposals": 100}, "bce"),
    ],
)
def test_a_wrong_rule_shows(golden, monkeypatch, wrong, quantity):
    right = golden_microseg.MicroSeg
    monkeypatch.setattr(golden_microseg, "MicroSeg", lambda **options: right(**(options | wrong)))
    assert replay_microseg(golden, "train_microseg_A")[quantity].largest > 1e-4
