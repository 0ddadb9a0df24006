"""What a bundle keeps of its old features, and what an extension learns from it."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from untrained import SMALL

from everseg.deploy.extend import Extension, extend
from everseg.deploy.feature_sketch import (
    Movement,
    Stays,
    can_sketch,
    predicted,
    remapped,
    sampled,
    vector_draws,
    what_stays,
)
from everseg.deploy.reclass import ClassChanges
from everseg.errors import CheckpointError
from everseg.labels import LabelSpace
from everseg.models.build import deeplabv3_tiny
from everseg.models.heads import Head
from everseg.models.model import frozen_copy
from everseg.runs.model_folder import SKETCH
from everseg.runs.sketch import MOST_NUMBERS, PER_CLASS, Sketch, most, read_sketch, tensors
from saying import must_say

FEW = ["data.workers=0", "report=false", "train.max_iterations=3"]


def small() -> torch.nn.Module:
    torch.manual_seed(0)
    model = deeplabv3_tiny(**SMALL)
    model.grow({"default": 4})
    return model.eval()


def test_vectors_are_what_the_classifiers_saw():
    """Each vector gives, through the classifiers, the class that it is stored under; and there are not too many."""
    model = small()
    images = [torch.randn(1, 3, 64, 96) for _ in range(3)]
    found = sampled(model, "default", [10, 11, 12, 13], images)
    assert torch.equal(predicted(model, "default", found.features.float()) + 10, found.ids.long())
    assert found.ids.unique(return_counts=True)[1].max() <= PER_CLASS
    assert torch.equal(found.ids.sort()[0], found.ids)
    every = torch.cat([model(image)["default"].features["decoder"].flatten(2)[0].T for image in images])
    distances = torch.cdist(found.features.float(), every).min(1)[0]
    assert distances.max() < 0.01
    assert most(2**20, 150) * 2**20 * 150 <= MOST_NUMBERS
    # those of before keep their places where the images show nothing of a class, and half of them elsewhere
    before = Sketch(torch.ones(70, 8).half(), torch.tensor([10] * 40 + [99] * 30, dtype=torch.int32))
    joined = sampled(model, "default", [10, 11, 12, 13], images, before)
    assert (joined.ids == 99).sum() == 30
    assert torch.equal(joined.features[joined.ids == 99], before.features[40:])


def test_a_movement_is_found_and_repeated():
    """f' = 1.1 f + 0.3 turned a little, from a thousand cells; other vectors move the same way."""
    torch.manual_seed(1)
    x, turn = torch.randn(1000, 6), torch.randn(6, 6) * 0.05 + 1.1 * torch.eye(6)
    moved = Movement(6)
    moved.add(x, x @ turn + 0.3)
    other = torch.randn(20, 6)
    torch.testing.assert_close(moved.of(other), other @ turn + 0.3, rtol=0, atol=0.02)
    still = Movement(6)
    still.add(x, x.clone())
    assert torch.equal(still.of(other), other)


def test_what_stays_counts_vectors_that_keep_their_class():
    model = small()
    space = LabelSpace(((0, 11, 12, 13),), ("background", "a", "b", "c"))
    sketch = sampled(model, "default", [0, 11, 12, 13], [torch.randn(1, 3, 64, 96) for _ in range(3)])
    still = Movement(8)
    same = what_stays(model, "default", space, sketch, still)
    assert {c: one.kept for c, one in same.items()} == {c: one.vectors for c, one in same.items()}
    assert 0 not in same
    after = frozen_copy(model)
    after.grow({"default": 1})
    with torch.no_grad():
        after.head("default").classifiers[1].bias.fill_(100.0)  # a new class that takes everything
    assert {one.kept for one in what_stays(after, "default", space, sketch, still).values()} == {0}
    values = vector_draws(Stays(50, 40), 2000, 3)
    assert values.mean() == pytest.approx(0.8, abs=0.01)
    assert values.std() == pytest.approx(np.sqrt(0.8 * 0.2 / 50), rel=0.1)


def test_heads_that_see_more_than_a_cell_are_not_asked():
    model = deeplabv3_tiny(**SMALL)
    model.grow({"default": 2}, heads={"default": Head(hidden=4)})
    assert not can_sketch(model, "default")
    assert can_sketch(small(), "default")


def test_a_bundle_holds_them_and_an_extension_asks_them(deployed, old_data, new_data, tmp_path, monkeypatch):
    """The first extension stores them; the second one asks."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(deployed, tmp_path / "bundle")
    assert (
        read_sketch(Path("bundle")) == {}
    )  # the data of its run are a reader of the user's own, which nobody named
    options = {"overrides": FEW, "quiet": True, "onnx": False}
    first = extend("bundle", data=old_data, **options)
    assert isinstance(first, Extension)
    assert "stored" not in first.kept.classes["red"]
    stored = read_sketch(first.bundle.path)["default"]
    assert set(stored.ids.tolist()) == {0, 1, 2}
    must_say((first.bundle.path / "MODEL_CARD.md").read_text(), "vectors", "without labels")
    done = extend(first.bundle.path, data=new_data, add=["forklift"], **options)
    assert isinstance(done, Extension)
    for name in ("red", "green"):
        figures = done.kept.classes[name]
        assert figures["share"] == np.fmin(figures["agreement"], figures["stored"])
    must_say(done.kept.text, "stored features", "2 of 2")
    assert done.kept.interval is not None
    low, high = done.kept.interval
    assert low - 1e-6 <= done.kept.share <= high + 1e-6
    assert set(read_sketch(done.bundle.path)["default"].ids.tolist()) >= {0, 1, 2}
    # changed classes keep what is theirs
    changed = extend(first.bundle.path, merge={"colour": ["red", "green"]}, out="merged", onnx=False)
    assert isinstance(changed, ClassChanges)
    assert set(read_sketch(Path("merged"))["default"].ids.tolist()) == {0, 3}


def test_vectors_go_with_their_classes():
    one = Sketch(torch.arange(6.0).reshape(3, 2).half(), torch.tensor([1, 2, 5], dtype=torch.int32))
    found = remapped({"default": one}, {1: 7, 5: 0})["default"]
    assert found.ids.tolist() == [0, 7]
    assert found.features.tolist() == [[4, 5], [0, 1]]


@pytest.mark.parametrize(
    "stored",
    [
        {"default.features": torch.ones(2, 3)},
        {"default.features": torch.ones(2, 3).half()},
        {"default.features": torch.ones(2, 3).half(), "default.ids": torch.ones(3, dtype=torch.int32)},
        {"default.features": torch.ones(2, 3).half(), "default.ids": -torch.ones(2, dtype=torch.int32)},
        {"default.features": torch.full((1, 3), torch.inf).half(), "default.ids": torch.ones(1, dtype=torch.int32)},
        {"default.features": torch.ones(2, 3), "default.ids": torch.ones(2, dtype=torch.int32)},
        {**tensors({"a": Sketch(torch.ones(1, 2), torch.ones(1))}), "a.more": torch.ones(1)},
    ],
)  # fmt: skip
def test_a_damaged_file_is_refused(tmp_path, stored):
    class Committed:
        def read(self, name: str) -> bytes:
            return safetensors.torch.save(stored)

    (tmp_path / SKETCH).touch()
    with pytest.raises(CheckpointError) as caught:
        read_sketch(tmp_path, Committed())
    must_say(caught.value, "sketch.safetensors", "damaged")
