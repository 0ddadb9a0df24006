"""`everseg features`: the same pixels before and after a step; numbers against plain loops, pictures that open."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from toy import HERE, build, settings

import everseg
from everseg import api
from everseg.data.batches.transforms import center_transform, normalise
from everseg.errors import CheckpointError, ConfigError, DataError
from everseg.labels import LabelSpace
from everseg.reports import feature_shift as feature_report
from everseg.reports.feature_shift import (
    Drift,
    Pixels,
    class_drift,
    draw_pixels,
    labels_at,
    mean_drift,
    pca,
    pictures,
    tsne,
)
from everseg.runs.run_folder import RunFolder
from everseg.scenarios.steps import Source
from everseg.types import SegOutput
from saying import must_say

USER_CODE = f"data={HERE}"
Outcome = Callable[..., tuple[int, str, str]]


def pixels_of(before: np.ndarray, after: np.ndarray, label: Sequence[int], domain: Sequence[int]) -> Pixels:
    names = tuple(f"class {i}" for i in range(max(label) + 1))
    domains = ("day", "dusk")[: max(domain) + 1]
    return Pixels(np.float32(before), np.float32(after), np.array(label), np.array(domain), names, domains)


def some_pixels(shift: np.ndarray, *, each: int = 12) -> Pixels:
    """Two domains with three classes around centres of their own; `shift` (2, 3, C) is added after."""
    rng = np.random.default_rng(0)
    label, domain = np.tile(np.repeat(np.arange(3), each), 2), np.repeat([0, 1], 3 * each)
    before = rng.normal(size=(6 * each, shift.shape[-1])) + 3.0 * label[:, None]
    return pixels_of(before, before + shift[domain, label], label, domain)


# ---------------------------------------------------------------- numbers


def test_a_known_shift_gives_its_length_and_the_other_numbers_of_a_plain_loop() -> None:
    shift = np.zeros((2, 3, 5))
    shift[0, 1] = [3, 0, 4, 0, 0]
    shift[1, 2] = [0, 0, 0, 0, -0.5]
    pixels = some_pixels(shift)
    rows = class_drift(pixels)
    assert [(row.domain, row.class_name, row.pixels) for row in rows] == [
        (domain, f"class {label}", 12) for domain in ("day", "dusk") for label in range(3)
    ]
    assert [row.distance for row in rows] == pytest.approx([0, 5, 0, 0, 0, 0.5], abs=1e-5)
    for row in rows:
        mine = (pixels.domain == pixels.domains.index(row.domain)) & (
            pixels.label == pixels.classes.index(row.class_name)
        )
        old, new = pixels.before[mine].astype(float), pixels.after[mine].astype(float)
        spread = sum(float(np.sqrt(((x - old.mean(0)) ** 2).sum())) for x in old) / 12
        cosine = float(old.mean(0) @ new.mean(0)) / np.sqrt(
            (old.mean(0) ** 2).sum() * (new.mean(0) ** 2).sum()
        )
        assert row.spread == pytest.approx(spread)
        assert row.relative == pytest.approx(row.distance / spread)
        assert row.cosine == pytest.approx(cosine)


def test_accuracy_asks_for_the_nearest_centre_before_of_the_own_domain() -> None:
    """Day: centres 0 and 10, the first class walks 8 towards the other; dusk: centres 100 and 104 stay."""
    before = np.array([[-1, 0], [1, 0], [9, 0], [11, 0], [99, 0], [101, 0], [103.5, 0], [104.5, 0]])
    after = before.copy()
    after[:2] += [8, 0]
    pixels = pixels_of(before, after, [0, 0, 1, 1, 0, 0, 1, 1], [0, 0, 0, 0, 1, 1, 1, 1])
    rows = class_drift(pixels)
    assert [row.accuracy_before for row in rows] == [1, 1, 1, 1]
    assert [row.accuracy_after for row in rows] == [0, 1, 1, 1]
    assert [row.distance for row in rows] == [8, 0, 0, 0]


def test_what_is_not_defined_is_none_and_left_out_of_the_means() -> None:
    rows = class_drift(pixels_of(np.zeros((2, 3)), np.ones((2, 3)), [0, 0], [0, 0]))
    assert rows == [Drift("day", "class 0", 2, 3**0.5, 0.0, None, None, 1.0, 1.0)]
    assert mean_drift(rows)["relative"] is None
    other = Drift("day", "b", 2, 1.0, 4.0, 0.25, -1.0, 0.5, 0.0)
    assert mean_drift([*rows, other]) == {
        "distance": pytest.approx((3**0.5 + 1) / 2), "spread": 2.0, "relative": 0.25, "cosine": -1.0,
        "accuracy_before": 0.75, "accuracy_after": 0.5,
    }  # fmt: skip


def test_pca_is_fitted_before_and_only_applied_after() -> None:
    rng = np.random.default_rng(1)
    pixels = some_pixels(rng.normal(size=(2, 3, 5)) * 4)
    flat = pca(pixels)
    mean = pixels.before.mean(0)
    axes = np.linalg.svd(pixels.before - mean, full_matrices=False)[2][:2]
    for found, features in ((flat.before, pixels.before), (flat.after, pixels.after)):
        expected = (features - mean) @ axes.T
        signs = np.sign((expected * found).sum(0))
        np.testing.assert_allclose(found * signs, expected, atol=1e-4)
    assert abs(flat.after.mean(0)).max() > 0.1, "features after are centred: fitted again"
    assert np.array_equal(flat.chosen, np.arange(72))


def test_tsne_is_a_function_of_its_seed_and_keeps_every_class_when_there_are_too_many_pixels() -> None:
    pixels = some_pixels(np.ones((2, 3, 4)))
    first, again = tsne(pixels, seed=3, most=40), tsne(pixels, seed=3, most=40)
    np.testing.assert_array_equal(first.before, again.before)
    np.testing.assert_array_equal(first.after, again.after)
    assert not np.array_equal(first.before, first.after)
    assert len(first.chosen) == 36
    groups = {(pixels.domain[i], pixels.label[i]) for i in first.chosen}
    assert len(groups) == 6
    assert first.before.shape == first.after.shape == (36, 2)


# ---------------------------------------------------------------- the draw


@pytest.mark.parametrize("size", [(1, 1), (3, 7), (5, 4), (12, 10), (20, 30)])
def test_labels_are_those_under_the_middle_of_each_cell(size: tuple[int, int]) -> None:
    label = torch.randint(0, 256, (2, 12, 10), dtype=torch.uint8)
    expected = F.interpolate(label[:, None].float(), size, mode="nearest-exact")[:, 0]
    assert torch.equal(labels_at(label, size).float(), expected)


class Marked:
    """Features that say where they come from: image number, cell, label; plus a constant of model and branch."""

    def __init__(self, constant: float) -> None:
        self.constant = constant

    def __call__(self, image: Tensor, branches: tuple[str, ...]) -> dict[str, SegOutput]:
        own = {"a": 0.0, "b": 0.5}
        maps = {b: image[:, :, ::2, ::2] + self.constant + own[b] for b in branches}
        return {b: SegOutput(torch.empty(0), {"encoder": value}) for b, value in maps.items()}


SPACES = {
    "a": LabelSpace(((0, 1, 2),), ("ground", "red", "green")),
    "b": LabelSpace(((0, 1, 2),), ("ground", "green", "red")),
}
SOURCES = (
    Source("a", "toy", "val", tuple(range(6)), bytes(256), domain="day"),
    Source("b", "toy", "val", tuple(range(6, 9)), bytes(256), domain="dusk"),
)


def marked_batches(size: int) -> Callable[[Source], Iterator[tuple[Tensor, Tensor, list[str]]]]:
    """Images (3, 8, 8) = (number, cell, label); labels of 2 x 2 blocks, some ignored."""

    def batches(source: Source) -> Iterator[tuple[Tensor, Tensor, list[str]]]:
        for start in range(0, len(source.indices), size):
            numbers = source.indices[start : start + size]
            images, labels = [], []
            for number in numbers:
                small = torch.from_numpy(np.random.RandomState(number).choice([0, 1, 2, 2, 255], (4, 4)))
                label = small.repeat_interleave(2, 0).repeat_interleave(2, 1)
                cell = torch.arange(16).view(4, 4).repeat_interleave(2, 0).repeat_interleave(2, 1)
                images.append(torch.stack([torch.full((8, 8), number), cell, label]).float())
                labels.append(label)
            yield torch.stack(images), torch.stack(labels).to(torch.uint8), [f"image {n}" for n in numbers]

    return batches


def draw(
    *,
    limit: int,
    seed: int = 0,
    size: int = 2,
    constants: tuple[float, float] = (0, 100),
    spaces: dict[str, LabelSpace] = SPACES,
) -> Pixels:
    models = (Marked(constants[0]), Marked(constants[1]))
    return draw_pixels(models, SOURCES, spaces, marked_batches(size), limit=limit, seed=seed)


def test_the_same_pixels_are_drawn_in_both_models_and_carry_their_own_label() -> None:
    pixels = draw(limit=5)
    np.testing.assert_array_equal(pixels.after - pixels.before, 100)
    assert pixels.domains == ("day", "dusk")
    assert pixels.classes == ("ground", "red", "green")
    names = np.array([["ground", "red", "green"], ["ground", "green", "red"]])
    branch = np.array([0.0, 0.5])[pixels.domain]
    number, _, train_id = (pixels.before - branch[:, None]).T
    assert names[pixels.domain, train_id.astype(int)].tolist() == [pixels.classes[i] for i in pixels.label]
    assert ((number < 6) == (pixels.domain == 0)).all()
    counts = {(d, c): len(at) for d, c, at in pixels.groups()}
    assert counts == {(d, c): 5 for d in (0, 1) for c in (0, 1, 2)}
    assert len(np.unique(pixels.before, axis=0)) == 30, "a pixel was drawn twice"
    assert len(np.unique(number[pixels.domain == 0])) > 1, "all from one image"


def test_a_class_that_domains_spell_each_in_its_own_way_is_one() -> None:
    spelt = {**SPACES, "b": LabelSpace(((0, 1, 2),), ("Ground", "GREEN", "r-ed"))}
    pixels, plain = draw(limit=5, spaces=spelt), draw(limit=5)
    assert pixels.classes == plain.classes
    np.testing.assert_array_equal(pixels.label, plain.label)


def test_with_room_for_all_every_labelled_pixel_is_there_once() -> None:
    pixels = draw(limit=1000)
    expected = []
    for source in SOURCES:
        for image, label, _ in marked_batches(1)(source):
            for y, x in zip(*np.nonzero(label[0, ::2, ::2].numpy() != 255), strict=True):
                own = 0.5 * (source.branch == "b")
                expected.append((image[0, :, 2 * y, 2 * x] + own).tolist())
    assert sorted(pixels.before.tolist()) == sorted(expected)


def test_the_draw_is_a_function_of_the_seed_alone() -> None:
    first = draw(limit=4)
    for other in (draw(limit=4, size=5), draw(limit=4, constants=(7, -3))):
        np.testing.assert_array_equal(other.before - other.before.mean(), first.before - first.before.mean())
        np.testing.assert_array_equal(other.label, first.label)
    assert not np.array_equal(draw(limit=4, seed=1).before, first.before)


def test_features_that_are_not_finite_and_too_few_pixels_are_told() -> None:
    with pytest.raises(CheckpointError, match="not finite"):
        draw(limit=4, constants=(0, float("nan")))
    with pytest.raises(DataError, match="0 labelled pixels"):
        draw_pixels((Marked(0), Marked(1)), (), SPACES, marked_batches(1), limit=3, seed=0)


def test_one_picture_per_projection_and_another_by_domain_where_there_are_several() -> None:
    pixels = some_pixels(np.ones((2, 3, 4)))
    strange = Pixels(
        pixels.before, pixels.after, pixels.label, pixels.domain, ("_a", "$b", "c\n" * 30), pixels.domains
    )
    files = pictures(strange, run="$un_known$", steps=(1, 2), seed=0, background=0)
    assert list(files) == ["pca_class.png", "pca_domain.png", "tsne_class.png", "tsne_domain.png"]
    for data in files.values():
        picture = Image.open(io.BytesIO(data)).convert("RGB")
        assert picture.height > 600
        assert len(picture.getcolors(1 << 24)) > 50
    one = Pixels(pixels.before, pixels.after, pixels.label, 0 * pixels.domain, pixels.classes, ("all",))
    assert list(pictures(one, run="toy", steps=(0, 1), seed=0, background=None)) == [
        "pca_class.png",
        "tsne_class.png",
    ]


# ---------------------------------------------------------------- the command

THREE_DOMAINS = """
from everseg.labels import LabelSpace
from everseg.scenarios.steps import Source, Step

def build(config, dataset, counts, *, seed):
    space = LabelSpace(((0, 1, 2, 3),), ("background", "red", "green", "blue"))
    lut = bytes([0, 1, 2, 3]) + bytes([255]) * 252
    names, steps = ("day", "dusk", "night"), []
    for index, name in enumerate(names):
        known = names[: index + 1]
        train = (Source(name, dataset.name, "train", tuple(range(8)), lut),)
        test = tuple(Source(b, dataset.name, "val", tuple(range(i, 10, 3)), lut) for i, b in enumerate(known))
        steps.append(Step(index, train, test, {b: space for b in known}, {name: 4}))
    return tuple(steps)
"""


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> everseg.Run:
    """A run of two steps: background, red, green; then blue."""
    return everseg.run(settings(tmp_path_factory.mktemp("two"), train={"max_iterations": 6}), quiet=True)


def test_the_drift_on_disk_is_that_of_the_two_models_on_all_pixels(
    finished: everseg.Run, tmp_path: Path, call: Outcome
) -> None:
    out = tmp_path / "out"
    code, printed, err = call("features", finished.path, USER_CODE, "--before", 0, "--after", 1, "--out", out,
                              "--pixels", 10_000, "--json", "--quiet")  # fmt: skip
    assert code == 0, err
    stored = json.loads((out / "drift.json").read_text())
    assert json.loads(printed) == {**stored, "path": str(out)}
    expected = centres_by_hand(finished.folder)
    assert [row["class_name"] for row in stored["classes"]] == ["background", "red", "green", "blue"]
    assert [row["new"] for row in stored["classes"]] == [False, False, False, True]
    for row, (count, old, new) in zip(stored["classes"], expected, strict=True):
        assert row["pixels"] == count
        assert row["distance"] == pytest.approx(float(np.linalg.norm(new - old)), rel=1e-4)
        assert row["distance"] > 0
    with (out / "drift.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["distance"]) for row in rows] == [row["distance"] for row in stored["classes"]]
    assert sorted(path.name for path in out.iterdir()) == [
        "drift.csv", "drift.json", "pca_class.png", "tsne_class.png"
    ]  # fmt: skip


def centres_by_hand(folder: RunFolder) -> list[tuple[int, np.ndarray, np.ndarray]]:
    """Pixels, and centre in both models, of every class of the toy's `val` split."""
    models = [folder.load_final(index)[0] for index in (0, 1)]
    split = build().splits["val"]
    cells: list[list[tuple[np.ndarray, np.ndarray]]] = [[], [], [], []]
    for index in range(len(split)):
        image, mask = center_transform(*split.read(index), crop=32)
        with torch.no_grad():
            maps = [
                m(normalise(torch.from_numpy(image))[None], ("default",))["default"]
                .features["encoder"][0]
                .numpy()
                for m in models
            ]
        stride = 32 // maps[0].shape[-1]
        for y in range(maps[0].shape[1]):
            for x in range(maps[0].shape[2]):
                raw = mask[y * stride + stride // 2, x * stride + stride // 2]
                cells[raw].append((maps[0][:, y, x], maps[1][:, y, x]))
    return [(len(c), *(np.mean([pair[i] for pair in c], 0, np.float64) for i in (0, 1))) for c in cells]


def test_by_default_the_last_step_is_compared_with_the_one_before_in_the_run_s_folder(
    finished: everseg.Run, call: Outcome
) -> None:
    code, out, err = call("features", finished.path, USER_CODE, "--pixels", 5, "--images", 3)
    assert code == 0, err
    target = finished.path / "features" / "before-0-after-1"
    assert "blue (new)" in out
    assert "mean of classes" in out
    assert str(target) in out
    assert "3/3" in err, "more images than asked for"
    files = {path.name: path.read_bytes() for path in target.iterdir()}
    again = api.features(finished.path, overrides=[USER_CODE], pixels=5, images=3, quiet=True)
    assert {path.name: path.read_bytes() for path in target.iterdir()} == files
    assert all(row.pixels <= 5 for row in again.classes)


def test_every_domain_goes_through_its_own_branch_and_a_new_one_is_left_out(
    tmp_path: Path, call: Outcome
) -> None:
    plug_in = tmp_path / "domains.py"
    plug_in.write_text(THREE_DOMAINS)
    kind = f"scenario.kind={plug_in}:build"
    done = everseg.run(
        settings(tmp_path, scenario={"kind": kind.partition("=")[2]}, method={"name": "ft"},
                 train={"max_iterations": 1}),
        quiet=True,
    )  # fmt: skip
    options = (USER_CODE, kind, "--pixels", 6)
    code, out, err = call("features", done.path, *options, "--before", 1, "--after", 2)
    assert code == 0, err
    must_say(err, "left out", "after step 1: night")
    stored = json.loads((done.path / "features" / "before-1-after-2" / "drift.json").read_text())
    assert stored["branches"] == {"day": "day", "dusk": "dusk"}
    assert stored["left_out"] == ["night"]
    assert {row["domain"] for row in stored["classes"]} == {"day", "dusk"}
    assert stored["pictures"] == ["pca_class.png", "pca_domain.png", "tsne_class.png", "tsne_domain.png"]
    assert out.count("mean of classes") == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--before", 0, "--after", 4), "finished steps.*0, 1"),
        (("--before", 1, "--after", 0), "earlier"),
        (("--before", 1), "earlier"),
        (("--pixels", 0), "pixels"),
    ],
)
def test_steps_and_numbers_that_cannot_be_are_told(
    finished: everseg.Run, call: Outcome, arguments: tuple[object, ...], message: str
) -> None:
    code, _, err = call("features", finished.path, USER_CODE, *arguments)
    assert code == 2
    with pytest.raises(ConfigError, match=f"(?s){message}"):
        raise ConfigError(err)


def test_a_run_of_one_step_has_nothing_to_compare(tmp_path: Path) -> None:
    done = everseg.run(settings(tmp_path, scenario={"joint": True}, train={"max_iterations": 1}), quiet=True)
    with pytest.raises(ConfigError, match=r"two finished steps.* 0$"):
        api.features(done.path, overrides=[USER_CODE], quiet=True)


def test_without_the_extra_it_says_what_to_install_before_any_work(
    finished: everseg.Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setattr(feature_report, "prepare", lambda *_: pytest.fail("the data were opened"))
    with pytest.raises(ConfigError, match=r"sklearn: pip install 'everseg\[plot\]'"):
        api.features(finished.path, overrides=[USER_CODE], quiet=True)


def test_code_that_only_the_run_names_is_not_imported(finished: everseg.Run) -> None:
    with pytest.raises(ConfigError, match="your own code"):
        api.features(finished.path, quiet=True)
    with pytest.raises(ConfigError, match="cannot be changed"):
        api.features(finished.path, overrides=[USER_CODE, "train.lr=1"], quiet=True)


def test_data_with_other_classes_are_refused(finished: everseg.Run, tmp_path: Path) -> None:
    plug_in = tmp_path / "renamed.py"
    plug_in.write_text(
        f"import sys\nsys.path.insert(0, {str(Path(HERE.rpartition(':')[0]).parent)!r})\n"
        "import toy\nfrom dataclasses import replace\nfrom everseg.labels import RawLabels\n"
        "def build(root=None):\n"
        "    labels = RawLabels({0: 'background', 1: 'red', 2: 'green', 3: 'violet'}, background=0)\n"
        "    return replace(toy.build(), labels=labels)\n"
    )
    with pytest.raises(DataError, match="other classes"):
        api.features(finished.path, overrides=[f"data={plug_in}:build"], quiet=True)
