"""The MDIL benchmark as a user meets it: polygons to masks, then Cityscapes -> BDD100K -> IDD, on miniature trees."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from street import HEIGHT, WIDTH, write

import everseg

Outcome = Callable[..., tuple[int, str, str]]
SMALL = [
    "data.size=[24,48]", "data.workers=0", "train.epochs=1", "train.batch=2", "train.max_iterations=2",
    "train.eval_batch=2", "tracker=[]", "model.options.widths=[6,8,10]", "model.options.blocks=[1,1]",
]  # fmt: skip


@pytest.fixture(scope="module")
def street(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("street"))


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
