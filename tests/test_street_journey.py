"""The MDIL benchmark as a user meets it: polygons to masks, then Cityscapes -> BDD100K -> IDD, on miniature trees."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import everseg

Outcome = Callable[..., tuple[int, str, str]]
WIDTH, HEIGHT = 96, 48
SMALL = [
    "data.size=[24,48]", "data.workers=0", "train.epochs=1", "train.batch=2", "train.max_iterations=2",
    "train.eval_batch=2", "tensorboard=false", "model.options.widths=[6,8,10]", "model.options.blocks=[1,1]",
]  # fmt: skip


def picture(path: Path, number: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(number).integers(0, 255, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def annotation(path: Path, labels: list[str]) -> None:
    """Stripes from left to right, a polygon each."""
    path.parent.mkdir(parents=True, exist_ok=True)
    step = WIDTH // len(labels)
    objects = [
        {"label": label, "polygon": [[left, 0], [left + step - 1, 0], [left + step - 1, 47], [left, 47]]}
        for left, label in zip(range(0, WIDTH, step), labels, strict=False)
    ]
    path.write_text(json.dumps({"imgHeight": HEIGHT, "imgWidth": WIDTH, "objects": objects}))


@pytest.fixture(scope="module")
def street(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three data sets: Cityscapes and IDD with polygons only, BDD100K with its masks."""
    base = tmp_path_factory.mktemp("street")
    for split in ("train", "val"):
        for number in range(4):
            city = f"aachen/aachen_{number:06d}_000019"
            picture(base / f"cs/leftImg8bit/{split}/{city}_leftImg8bit.png", number)
            annotation(base / f"cs/gtFine/{split}/{city}_gtFine_polygons.json", ["road", "cargroup", "sky"])
            picture(base / f"bdd/images/10k/{split}/b{number}.jpg", 10 + number)
            mask = np.full((HEIGHT, WIDTH), 255, np.uint8)
            mask[:, : WIDTH // 2], mask[:, 60:] = 0, 13
            target = base / f"bdd/labels/sem_seg/masks/{split}/b{number}.png"
            target.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(mask).save(target)
            picture(base / f"idd/leftImg8bit/{split}/201/frame{number:04d}_leftImg8bit.jpg", 20 + number)
            place = base / f"idd/gtFine/{split}/201/frame{number:04d}_gtFine_polygons.json"
            annotation(place, ["road", "autorickshaw", "fallback background"])
    return base


def test_polygons_become_masks_and_the_sequence_runs_to_its_end(
    street: Path, tmp_path: Path, call: Outcome
) -> None:
    roots = [f"data.domains.{name}.root={street / name}" for name in ("cs", "bdd", "idd")]
    where = [f"out={tmp_path}", *roots, *SMALL]
    code, _, err = call("run", "cs-bdd-idd-mdil", *where, "--quiet")
    assert code == 3
    assert "everseg data prepare cityscapes" in err
    for name in ("cityscapes", "idd"):
        code, _, err = call("data", "prepare", name, street / {"cityscapes": "cs"}.get(name, name))
        assert code == 0, err
    code, out, err = call("run", "cs-bdd-idd-mdil", *where, "--quiet", "--json")
    assert code == 0, err
    result = json.loads(out)
    assert [row["trained"] for row in result["table"]] == ["cs", "bdd", "idd"]
    assert [row["name"] for row in result["steps"]] == ["cs", "cs", "bdd", "cs", "bdd", "idd"]
    assert set(result["forgetting"]["domains"]) == {"cs", "bdd", "idd"}
    code, again, err = call("run", "cs-bdd-idd-mdil", *where, "--quiet", "--json")
    assert (code, json.loads(again)) == (0, result), err
    model = everseg.load(tmp_path / "cs-bdd-idd-mdil")
    assert {name: space.num_classes for name, space in model.spaces.items()} == {
        "cs": 20,
        "bdd": 20,
        "idd": 27,
    }
    image = next((street / "idd").rglob("*.jpg"))
    assert model.predict(image, branch="idd").ids.shape == (HEIGHT, WIDTH)
    code, out, _ = call("eval", tmp_path / "cs-bdd-idd-mdil", "--infer-domain", "--quiet", "--json")
    assert code == 0
    assert sum(sum(taken.values()) for taken in json.loads(out)["inferred"].values()) == 12


@pytest.mark.parametrize("method", ["mdil-authors", "fe", "multi", "single"])
def test_every_preset_of_the_sequence_goes_through_every_stage(
    street: Path, tmp_path: Path, call: Outcome, method: str
) -> None:
    for name in ("cityscapes", "idd"):
        call("data", "prepare", name, street / {"cityscapes": "cs"}.get(name, name))
    roots = [f"data.domains.{name}.root={street / name}" for name in ("cs", "bdd", "idd")]
    code, out, err = call("run", f"cs-bdd-idd-{method}", *roots, *SMALL, "--dry-run", "--quiet", "--json")
    assert code == 0, err
    result = json.loads(out)
    expected = 3 if method in ("single", "multi") else 6
    assert len(result["steps"]) == expected
