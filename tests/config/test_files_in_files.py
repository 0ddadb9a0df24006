"""Paths in a YAML file start from that file, and a preset's domains make way for the user's own."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from everseg.config.loading import load
from everseg.errors import ConfigError
from everseg.sweeps.plan import grid
from saying import must_say

Call = Callable[..., tuple[int, str, str]]


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


OWN = """
preset: {preset}
data:
  domains:
    oslo: {{dataset: oslo.yaml}}
    rome: {{dataset: ../rome.yaml, root: pictures, options: {{skip: bad.txt}}}}
"""


def test_paths_start_from_the_file_they_stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = (
        OWN.format(preset="camvid-day-dusk-mdil")
        + "model: {weights: erfnet.safetensors}\nmethod: mine.py:M\n"
    )
    config = load(write(Path("a/b/x.yaml"), text), import_own=False)
    rome = config.data.domains["rome"]
    assert config.data.domains["oslo"].dataset == "a/b/oslo.yaml"
    assert (rome.dataset, rome.root, rome.options) == ("a/rome.yaml", "a/b/pictures", {"skip": "a/b/bad.txt"})
    assert (config.model.weights, config.method.name, config.out) == (
        "a/b/erfnet.safetensors",
        "a/b/mine.py:M",
        "runs",
    )
    # So do those of a base, each from its own; names, absolute paths and addresses stay.
    write(
        Path("a/c/y.yaml"), "base: ../b/x.yaml\nmodel: {weights: hf:org/name}\nscenario: {lists: published}\n"
    )
    config = load(Path("a/c/y.yaml"), ["data.root=there"], import_own=False)
    assert (config.data.domains["oslo"].dataset, config.model.weights) == ("a/b/oslo.yaml", "hf:org/name")
    assert (config.scenario.lists, config.data.root) == ("published", "there")
    whole = tmp_path / "z/data.yaml"
    assert load(write(Path("a/z.yaml"), f"data: {whole}\n")).data.dataset == str(whole)
    assert load(write(Path("a/z.yaml"), "data: data.yaml\n")).data.dataset == "a/data.yaml"


def test_a_missing_file_is_told_with_the_place_that_was_looked_in(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: Call
) -> None:
    monkeypatch.chdir(tmp_path)
    write(Path("a/x.yaml"), "preset: camvid-6-5-ft\ndata: {dataset: data.yaml}\n")
    code, _, err = call("run", "a/x.yaml", "--dry-run")
    assert code == 2
    must_say(err, "a/data.yaml", tmp_path)
    write(Path("a/data.yaml"), "root: pictures\nclasses: [road, tree]\n")
    code, _, err = call("run", "a/x.yaml", "--dry-run")
    assert code == 2
    must_say(err, tmp_path / "a/pictures")


@pytest.mark.parametrize("preset", ["camvid-day-dusk-mdil", "demo-day-dusk-ft", "cs-bdd-idd-multi"])
def test_a_preset_does_not_keep_its_domains_beside_the_users_own(tmp_path: Path, preset: str) -> None:
    file = write(tmp_path / "x.yaml", OWN.format(preset=preset))
    assert list(load(file).data.domains) == ["oslo", "rome"]
    # Settings of the preset's own domains are no new domains, and a further one beside a file's is one more.
    own = list(load(preset).data.domains)
    assert list(load(preset, [f"data.domains.{own[0]}.root=D"]).data.domains) == own
    given = ["data.domains.riga.dataset=demo", "data.domains.oslo.root=D"]
    assert list(load(file, given).data.domains) == ["oslo", "rome", "riga"]
    # One of the preset's that the user names again keeps its settings, at the user's place.
    text = f"preset: {preset}\ndata:\n  domains:\n    oslo: {{dataset: demo}}\n    {own[0]}: {{root: D}}\n"
    again = write(tmp_path / "y.yaml", text)
    found = load(again).data.domains
    assert list(found) == ["oslo", own[0]]
    assert found[own[0]].dataset == load(preset).data.domains[own[0]].dataset


METHODS = ("single", "multi", "fe", "mdil-authors", "mdil", "ft", "lwf", "joint")


@pytest.mark.parametrize("own", ["mdil", "mdil-authors", "fe", "multi"])
def test_a_sweep_over_ones_own_domains_has_the_methods_of_the_presets(tmp_path: Path, own: str) -> None:
    file = write(tmp_path / "x.yaml", OWN.format(preset=f"demo-day-dusk-{own}"))
    runs = {run.method: run.config for run in grid(str(file), METHODS, [0])}
    for method in METHODS[:-1]:
        right = load(f"demo-day-dusk-{method}")
        config = runs[method]
        assert list(config.data.domains) == ["oslo", "rome"]
        assert (config.scenario, config.model, config.method) == (
            right.scenario,
            right.model,
            right.method,
        ), method
        assert config.data.shift_fill == right.data.shift_fill
    assert runs["joint"].scenario.joint


def test_a_sweep_keeps_what_a_file_says_of_its_own_method(tmp_path: Path) -> None:
    text = OWN.format(preset="demo-day-dusk-mdil") + "method: {kd_weight: 0.7}\n"
    runs = {
        r.method: r.config for r in grid(str(write(tmp_path / "x.yaml", text)), ["mdil", "mdil-authors"], [0])
    }
    assert runs["mdil"].method.kd_weight == 0.7
    assert runs["mdil-authors"].method == load("demo-day-dusk-mdil-authors").method


def test_a_sweep_over_one_data_set_has_no_methods_of_domains(tmp_path: Path) -> None:
    file = write(tmp_path / "x.yaml", "preset: demo-4-2-ft\n")
    with pytest.raises(ConfigError, match="single"):
        grid(str(file), ["single"], [0])
