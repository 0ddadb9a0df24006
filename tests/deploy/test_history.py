"""What a bundle tells of its line, the way back, and a bundle's scores on images that the user names."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import everseg
from everseg.data.datasets.folder import build as folder_data
from everseg.deploy.bundle import open_bundle
from everseg.deploy.extend import extend
from everseg.display import percent
from saying import must_say

QUICK = ["data.workers=0", "train.max_iterations=1", "report=false"]


@pytest.fixture(scope="module")
def line(tmp_path_factory, deployed, new_data, old_data) -> Path:
    """A folder with a bundle and the two bundles extended from it: by forklifts, then refined."""
    folder = tmp_path_factory.mktemp("line")
    shutil.copytree(deployed, folder / "b")
    changes = [*QUICK, f"out={folder / 'runs'}"]
    extend(folder / "b", data=new_data, add=["forklift"], quiet=True, overrides=changes)
    extend(folder / "b-v2", data=old_data, quiet=True, overrides=changes)
    return folder


def hashes(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def test_history_tells_every_step_and_every_bundle_before(line, call):
    code, out, err = call("history", line / "b-v3")
    assert code == 0, err
    digests = [open_bundle(line / name).digest[:12] for name in ("b-v2", "b")]
    must_say(out, "after 2 steps", digests[0], line / "b-v2")
    must_say(out, "after 1 step", digests[1], line / "b")
    last = open_bundle(line / "b-v3").lineage["history"]
    told = json.loads(call("history", line / "b-v3", "--json")[1])
    assert told["steps"] == last
    assert [entry["method"] for entry in last] == ["mib", "mib", "complete"]
    assert [one["steps"] for one in told["ancestors"]] == [2, 1]
    rows = everseg.history(line / "b-v3")
    shown = str(rows)
    must_say(shown, 1, "mib", "forklift", percent(last[1]["scores"]["default"]["miou"]["new"]))
    must_say(shown, 2, "complete", "more images")
    for entry in last:
        assert entry["train"][0]["sha256"][:4] in shown


def test_rollback_finds_verifies_and_copies_an_earlier_bundle(line, tmp_path, call):
    code, out, err = call("rollback", line / "b-v3", "--json")
    assert code == 0, err
    assert json.loads(out)["path"] == str(line / "b-v2")
    (tmp_path / "back.tmp").mkdir()  # the user's own
    code, out, err = call("rollback", line / "b-v3", "--to", 1, "-o", tmp_path / "back")
    assert code == 0, err
    assert hashes(tmp_path / "back") == hashes(line / "b")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "back.tmp"]
    assert call("rollback", line / "b-v3", "--to", 1, "-o", tmp_path / "back")[0] == 2  # it exists
    code, _, err = call("rollback", line / "b-v3", "--to", 7)
    assert code == 2
    must_say(err, "--to 7", "2, 1")
    code, _, err = call("rollback", line / "b")
    assert code == 2
    must_say(err, "not extended")


def test_an_ancestor_elsewhere_missing_or_damaged(line, tmp_path, call):
    shutil.copytree(line / "b-v3", tmp_path / "alone" / "b-v3")
    code, out, _ = call("history", tmp_path / "alone" / "b-v3")
    assert code == 0
    must_say(out, "after 2 steps", "not at hand", "--look")
    must_say(out, "after 1 step", "not at hand")  # the line is known without any of its bundles
    code, _, err = call("rollback", tmp_path / "alone" / "b-v3")
    assert code == 4
    must_say(err, "--look")
    assert call("rollback", tmp_path / "alone" / "b-v3", "--look", line)[0] == 0
    assert call("rollback", tmp_path / "alone" / "b-v3", "--look", tmp_path / "nowhere")[0] == 2
    shutil.copytree(line / "b-v2", tmp_path / "alone" / "b-v2")
    (tmp_path / "alone" / "b-v2" / "MODEL_CARD.md").write_text("changed")
    code, _, err = call("rollback", tmp_path / "alone" / "b-v3", "-o", tmp_path / "copy")
    assert code == 4
    must_say(err, "MODEL_CARD.md")
    assert not (tmp_path / "copy").exists()


def test_a_bundle_is_scored_on_every_image_of_the_data_given(line, old_data, call):
    """An own count with `predict` gives the same IoU."""
    code, out, err = call("eval", line / "b-v2", f"data={old_data}", "data.workers=0", "--json", "--quiet")
    assert code == 0, err
    told = json.loads(out)
    (scores,) = told["branches"].values()
    split, model = folder_data(None, descriptor=str(old_data)).splits["val"], everseg.load(line / "b-v2")
    assert told["images"] == len(split)
    pairs = [(model.predict(image).ids, mask) for image, mask in map(split.read, range(len(split)))]
    valid = [mask != 3 for _, mask in pairs]  # crates, which the model does not know, are not scored
    for name, output, raw in (("red", 1, 2), ("forklift", 3, 1)):
        hit = sum(int(((ids == output) & (mask == raw)).sum()) for ids, mask in pairs)
        either = sum(
            int((((ids == output) | (mask == raw)) & ok).sum())
            for (ids, mask), ok in zip(pairs, valid, strict=True)
        )
        assert dict(zip(scores["classes"], scores["class_iou"], strict=True))[name] == pytest.approx(
            np.float64(hit) / either, abs=1e-6
        )
    code, _, err = call("eval", line / "b-v2", "--step", 0, "--quiet")
    assert code == 2
    must_say(err, "--step")
    must_say(err, "data=DATA.yaml")
    code, _, err = call("eval", line / "b-v2", f"data={old_data}", "train.lr=1", "--quiet")
    assert code == 2
    must_say(err, "train.lr", "bundle")
