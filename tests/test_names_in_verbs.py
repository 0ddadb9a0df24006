"""What each verb does with class names that are spelt otherwise or meet nobody: matched, told or refused.

One small run and the bundle made of it serve all tests: three classes on a background, two of them taught first.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import toy
import trees
from constant_model import constant
from PIL import Image

import everseg
from everseg.data.datasets.folder import build as folder_data
from everseg.deploy.bundle import Contents, open_bundle, write_bundle
from everseg.deploy.export import export
from everseg.labels import LabelSpace
from everseg.models.build import deeplabv3_tiny
from saying import must_say
from sealed import rewrite

Call = Callable[..., tuple[int, str, str]]
QUICK = ("data.workers=0", "train.max_iterations=1", "train.threads=1", "tracker=[]", "report=false")
CLASSES = "[background, red, green, blue]"


def write_data(root: Path, classes: str, *, moved: dict[int, int] | None = None, name: str = "data") -> Path:
    """The toy's pictures as files, and a data.yaml beside them.

    Args:
        moved: id of the toy -> id in the masks; others stay.
    """
    table = np.arange(4, dtype=np.uint8)
    for old, new in (moved or {}).items():
        table[old] = new
    for split, data in toy.build().splits.items():
        for index in range(len(data)):
            image, mask = data.read(index)
            trees.save(root / "images" / split / f"{index:02}.png", image)
            trees.save(root / "masks" / split / f"{index:02}.png", table[mask])
    return described(root, classes, name)


def described(root: Path, classes: str, name: str) -> Path:
    """One more description of the same pictures; all say that they are the same data set."""
    return trees.write(root / f"{name}.yaml", f"name: squares\nclasses: {classes}\n")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_data(tmp_path_factory.mktemp("squares"), CLASSES)


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has learnt red and green, then blue."""
    out = tmp_path_factory.mktemp("runs")
    config = toy.settings(out, train={"epochs": 25, "epochs_next": 4})
    config["data"]["dataset"] = str(data)
    return everseg.run(config, quiet=True).path


@pytest.fixture(scope="module")
def bundle(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What that run knew after its first step: red and green."""
    return export(run, tmp_path_factory.mktemp("bundles") / "first", step=0, onnx=False).path


def pixels(root: Path, raw: int, split: str = "val") -> int:
    """Pixels of an id in the masks on disk."""
    masks = [np.asarray(Image.open(file)) for file in (root / "masks" / split).iterdir()]
    return sum(int((mask == raw).sum()) for mask in masks)


# ---------------------------------------------------------------- eval


def test_eval_counts_a_class_that_the_data_spell_otherwise_and_says_so(
    run: Path, data: Path, call: Call
) -> None:
    other = described(data.parent, "[BG, RED, 'Gre en', blue]", "spelt")
    own = json.loads(call("eval", run, "--json", "--quiet")[1])
    assert own["notes"] == []
    code, out, err = call("eval", run, f"data={other}", "--json", "--quiet")
    assert code == 0, err
    found = json.loads(out)
    assert found["confusion"] == own["confusion"]
    assert found["branches"]["default"]["miou"] == own["branches"]["default"]["miou"]
    for told in (found["notes"], [line for line in err.splitlines() if line.startswith("note: ")]):
        assert len(told) == 2
        assert "'RED' of data set 'squares' is taken for 'red'" in told[0]
        assert "'Gre en' of data set 'squares' is taken for 'green'" in told[1]


def test_eval_says_which_classes_met_nobody_and_what_becomes_of_their_pixels(
    run: Path, data: Path, call: Call
) -> None:
    other = described(data.parent, "[background, red, truck, blue]", "truck")
    code, out, err = call("eval", run, f"data={other}", "--json", "--quiet")
    assert code == 0, err
    found = json.loads(out)
    scores = dict(
        zip(found["branches"]["default"]["classes"], found["branches"]["default"]["class_iou"], strict=True)
    )
    assert scores["green"] is None
    assert sum(found["confusion"]["default"][2]) == 0  # no true pixel of green
    lonely, absent = found["notes"]
    assert found["images"] == 10  # all of them show red or blue too
    assert f"'truck' ({pixels(data.parent, 2):,} pixels)" in lonely
    assert "they are ignored" in lonely
    must_say(absent, "no class 'green'", "mean")
    assert lonely in err
    assert absent in err
    code, out, _ = call("eval", run, f"data={other}", "scenario.policy=plop", "--json", "--quiet")
    must_say(json.loads(out)["notes"][0], "count as background")


def test_eval_names_pictures_without_any_known_class(run: Path, tmp_path: Path, call: Call) -> None:
    other = write_data(tmp_path, "[background, red, truck, bus]")
    found = json.loads(call("eval", run, f"data={other}", "--json", "--quiet")[1])
    split = folder_data(None, descriptor=str(other)).splits["val"]
    without = sum(not (split.read_mask(i) == 1).any() for i in range(len(split)))
    assert 0 < without < found["images"] == 10  # what is found in them is wrong, so they count
    must_say(found["notes"][-1], f"{without} of the 10 images", "'val'", "'squares'", "wrong")


def test_eval_refuses_a_name_that_may_mean_two_classes(run: Path, data: Path, call: Call) -> None:
    other = described(data.parent, "[background, red, green, Red]", "twice")
    code, _, err = call("eval", run, f"data={other}", "--quiet")
    assert code == 2
    must_say(err, "classes.3", "'Red'", "id 1", "'red'")


def test_eval_stops_where_nothing_is_shared(run: Path, data: Path, call: Call) -> None:
    other = described(data.parent, "[background, a, b, c]", "strange")
    code, _, err = call("eval", run, f"data={other}", "--quiet")
    assert code == 3
    must_say(err, "shares no class name")


# ---------------------------------------------------------------- run, show, check


@pytest.mark.parametrize("name", ["Background", "__background__", "BG"])
def test_the_background_is_recognised_under_its_usual_names(
    data: Path, tmp_path: Path, call: Call, name: str
) -> None:
    other = described(data.parent, f"[{name}, red, green, blue]", "empty")
    code, out, err = call("show", "demo-mib", f"data={other}", "task=2-1", "--scenario", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert [step["new_classes"] for step in found["scenario"]] == [["red", "green"], ["blue"]]
    (note,) = found["notes"]
    must_say(note, f"class '{name}'", "'squares'", "background")
    assert note in err


def test_a_background_denied_is_no_second_one(data: Path, call: Call) -> None:
    text = "name: squares\nclasses: [Background, red, green, blue]\nbackground: null\n"
    other = trees.write(data.parent / "denied.yaml", text)
    code, _, err = call("show", "demo-mib", f"data={other}", "task=2-2", "--scenario")
    assert code == 2
    must_say(err, "0 'background' and 1 'Background'", "one name")
    assert "background: Background" in err


def test_tasks_name_classes_in_any_spelling_and_untaught_ones_are_told(data: Path, call: Call) -> None:
    line = ("show", "demo-mib", f"data={data}", "--scenario", "--json")
    code, out, err = call(*line, "task=[[RED], [Gre-en]]")
    assert code == 0, err
    found = json.loads(out)
    assert [step["new_classes"] for step in found["scenario"]] == [["red"], ["green"]]
    (note,) = found["notes"]
    assert note.startswith("no step teaches 'blue' (")
    assert note.endswith("trained as background")
    assert note in err
    code, _, err = call(*line, "task=[[red], [violet]]")
    assert code == 2
    assert "unknown class 'violet'" in err


def test_a_run_keeps_what_it_said_of_class_names_and_says_it_again(
    data: Path, tmp_path: Path, call: Call
) -> None:
    given = (
        "demo-mib", f"data={data}", "task=[[red], [green]]", f"out={tmp_path}", "train.max_iterations=1",
        "data.crop=32", "train.batch=4", "report=false", "tracker=[]",
    )  # fmt: skip
    for _ in range(2):  # the second call finds the run finished
        code, out, err = call("run", *given, "--json", "--quiet")
        assert code == 0, err
        (note,) = json.loads(out)["notes"]
        assert note.startswith("no step teaches 'blue' (")
        assert f"note: {note}" in err
    done = everseg.run(given[0], overrides=given[1:], quiet=True)
    assert done.notes == (note,)
    assert f"note: {note}" in str(done)
    # Another version may word the note in another way: the run continues all the same.
    file = done.path / "scenario.json"
    rewrite(file, lambda stored: stored.update(notes=[note.replace("no step", "nobody")]))
    (done.path / "steps/01/metrics.json").unlink()
    again = everseg.run(given[0], overrides=given[1:], quiet=True)
    assert again.notes == (note.replace("no step", "nobody"),)
    assert [step.index for step in again.steps] == [0, 1]
    rewrite(file, lambda stored: stored.update(notes=3))
    code, _, err = call("run", *given, "--json", "--quiet")
    assert code == 4
    assert "scenario.json is damaged" in err


def test_domains_that_share_a_branch_join_classes_in_two_spellings(
    data: Path, tmp_path: Path, call: Call
) -> None:
    dusk = write_data(tmp_path / "dusk", "[background, Red, GREEN, violet]")
    dusk.write_text(dusk.read_text().replace("squares", "evening"))
    domains = {"day": {"dataset": str(data)}, "dusk": {"dataset": str(dusk), "rename": {"VIOLET": "blue"}}}
    steps = [{"domain": "day", "branch": "all"}, {"domain": "dusk", "branch": "all"}]
    config = {
        "data": {"domains": domains, "crop": 32},
        "scenario": {"kind": "domain-incremental", "steps": steps},
    }
    file = trees.write(tmp_path / "run.yaml", json.dumps(config))
    code, out, err = call("show", file, "--scenario", "--json")
    assert code == 0, err
    found = json.loads(out)
    assert found["scenario"][1]["branches"] == {"all": {"num_old": 4, "num_classes": 4}}
    assert list(found["scenario"][1]["classes"]) == ["red", "green", "blue"]
    assert [note.partition(" is taken for ")[0] for note in found["notes"]] == [
        "class 'Red' of data set 'evening' (domain 'dusk')",
        "class 'GREEN' of data set 'evening' (domain 'dusk')",
    ]
    domains["dusk"]["rename"] = {"vilet": "blue"}
    trees.write(file, json.dumps(config))
    code, _, err = call("show", file, "--scenario")
    assert code == 2
    must_say(err, "data.domains.dusk.rename.vilet", "'evening'", "did you mean 'violet'")
    domains["dusk"]["rename"] = {"violet": "RED"}
    trees.write(file, json.dumps(config))
    code, _, err = call("show", file, "--scenario")
    assert code == 2
    must_say(err, "'Red' and 'RED'", "two classes")


def test_published_weights_are_found_in_any_spelling(tmp_path: Path, call: Call) -> None:
    city = write_data(tmp_path, "[Road, SIDE WALK, Building, Traffic-Light]")
    city.write_text("name: cityscapes\nbackground: null\n" + city.read_text().partition("\n")[2])
    config = {
        "data": {"domains": {"city": {"dataset": str(city)}}, "crop": 32},
        "scenario": {"kind": "domain-incremental", "class_weights": "published"},
    }
    file = trees.write(tmp_path / "run.yaml", json.dumps(config))
    code, out, err = call("show", file, "--scenario", "--json")
    assert code == 0, err
    from everseg.data.class_weights import published_weights

    known = published_weights("cityscapes")
    weights = json.loads(out)["scenario"][0]["class_weights"]
    assert list(weights.values()) == [known[n] for n in ("road", "sidewalk", "building", "traffic light")]
    city.write_text(city.read_text().replace("Building", "castle"))
    code, _, err = call("show", file, "--scenario")
    assert code == 2
    assert "no weight of 'castle' is published" in err


# ---------------------------------------------------------------- extend


def test_extend_takes_names_in_any_spelling_and_says_who_met_nobody(
    bundle: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: Call
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(bundle, "b")
    site = write_data(tmp_path / "site", "[background, RED, crate, Fork-Lift]")
    old = described(data.parent, "[background, Red, truck, van]", "old")
    line = ("extend", "b", "--data", site, "--add", "fork lift", "--method", "ft", "--no-onnx", *QUICK)
    code, out, err = call(*line, "--old-val", old, "--json")
    assert code == 0, err
    found = json.loads(out)
    assert list(found["new"]) == ["Fork-Lift"]
    assert open_bundle("b-v2").spaces["default"].names == ("background", "red", "green", "Fork-Lift")
    must_say(err, "labels of red")
    crates = pixels(site.parent, 2, "train")
    for facts in (
        ("class 'RED'", "'squares'", "'red'", "branch 'default'"),
        ("teaches 'crate'", f"{crates:,} training pixels", "'squares'", "as background"),
        ("class 'Red'", "'squares'", "'red' of the model"),
        ("not know 'truck'",),
        ("'squares'", "no class 'green'"),
    ):
        must_say(found["notes"], *facts)
        must_say(err, "note:", *facts)
    code, _, err = call(*line[:5], "GREEN,fork-lift,FORKLIFT,vans", *line[6:])
    assert code == 2
    must_say(err, "class 'GREEN'", "already as 'green'")
    must_say(err, "class 'FORKLIFT'", "twice")
    must_say(err, "class 'vans'", "'squares'", "crate, Fork-Lift")


# ---------------------------------------------------------------- bundles of other models


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two models that call everything traffic light, which they spell each in its own way."""
    out = tmp_path_factory.mktemp("pair")
    a = constant(out / "a", ("background", "traffic light", "bus"), "traffic light")
    b = constant(out / "b", ("background", "tram", "Traffic_Light"), "Traffic_Light")
    return a, b


def test_diff_compares_classes_in_two_spellings_and_says_so(
    pair: tuple[Path, Path], data: Path, call: Call
) -> None:
    a, b = pair
    code, out, err = call("diff", a, b, "--images", data.parent / "images/val", "--json", "--quiet")
    assert code == 0, err
    found = json.loads(out)
    assert found["share"] == 0.0
    assert (found["only_a"], found["only_b"]) == (["bus"], ["tram"])
    assert found["notes"][0] == f"class 'Traffic_Light' of {b} is taken for 'traffic light' of {a}"
    assert found["notes"][1].startswith(f"only {a} knows: bus; every pixel")
    _, _, err = call("diff", a, b, "--images", data.parent / "images/val", "--quiet")
    assert err.count("counts as different") == 2


def test_serve_lists_such_a_class_once_and_says_so(
    pair: tuple[Path, Path], call: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    from everseg.deploy import serve

    seen = []

    def answer(server: serve.Server, *rest: object) -> None:
        seen.append(server.info())  # and end, as when the page is stopped

    monkeypatch.setattr(serve.Server, "serve_forever", answer)
    code, _, err = call("serve", *pair, "--port", 0)
    assert code == 0, err
    assert [(row["name"], row["ids"]) for row in seen[0]["classes"]] == [
        ("background", [0, 0]),
        ("traffic light", [1, 2]),
        ("bus", [2, None]),
        ("tram", [None, 1]),
    ]
    for text in seen[0]["notes"]:
        assert f"note: {text}" in err
    spelt, of_a, of_b = seen[0]["notes"]
    must_say(spelt, "'Traffic_Light' of b", "'traffic light' of a")
    must_say(of_a, "only a", "bus")
    must_say(of_b, "only b", "tram")
    assert "note:" not in call("serve", pair[0], "--port", 0)[2]


def test_branches_that_spell_a_class_each_in_its_own_way_have_one_id_for_it(tmp_path: Path) -> None:
    model = deeplabv3_tiny(widths=[8, 8, 8, 8])
    spaces = {
        "day": LabelSpace(((0, 1),), ("background", "road")),
        "dusk": LabelSpace(((0, 1, 2),), ("background", "car", "Road")),
    }
    for path, space in spaces.items():
        model.grow({path: space.num_classes})
    made = write_bundle(tmp_path / "b", Contents(model.eval(), spaces), onnx=False)
    again = open_bundle(made.path)
    assert [(entry.id, entry.name, entry.branches) for entry in again.registry.classes] == [
        (0, "background", ("day", "dusk")),
        (1, "road", ("day", "dusk")),
        (2, "car", ("dusk",)),
    ]
    assert again.registry.ids(spaces["dusk"]) == [0, 2, 1]


def test_what_older_versions_took_for_two_classes_of_one_branch_keeps_two_ids(tmp_path: Path) -> None:
    made = constant(tmp_path / "b", ("background", "Background", "road"), "road")
    assert [(entry.id, entry.name) for entry in open_bundle(made).registry.classes] == [
        (0, "background"),
        (1, "Background"),
        (2, "road"),
    ]
