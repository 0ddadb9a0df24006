"""Loading a configuration: layers, strict YAML, messages, identity."""

from __future__ import annotations

import contextlib
import json
import math
import textwrap
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from everseg.config.checks import expectation, shown
from everseg.config.fields import HARMLESS, RunConfig
from everseg.config.hyperparameters import method_options
from everseg.config.loading import (
    config_hash,
    difference,
    dump,
    fields,
    from_stored,
    identity,
    load,
    own_code,
    refuse_own_code,
    to_json,
)
from everseg.config.yaml import MAX_BYTES, parse, read, scalar
from everseg.errors import ConfigError
from saying import must_say


def problems(source=None, overrides=(), **sections) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load(source, overrides, **sections)
    return caught.value.problems


def write(folder: Path, text: str, name: str = "run.yaml") -> Path:
    path = folder / name
    path.write_text(textwrap.dedent(text), encoding="utf-8")
    return path


# ---------------------------------------------------------------- values


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-3", 0.001), ("1.", 1.0), (".5", 0.5), ("-2E+2", -200.0), ("0x10", 16), ("0o17", 15), ("-7", -7),
        ("true", True), ("False", False), ("~", None), ("", None), ("null", None),
        ("on", "on"), ("yes", "yes"), ("No", "No"), ("15-5", "15-5"), ("19-1b", "19-1b"), ("1_000", "1_000"),
        ("2001-01-01", "2001-01-01"), ("1:30", "1:30"), ("my.py:Name", "my.py:Name"), ("1e", "1e"), (".", "."),
        ("0777", 777), ("9" * 5000, "9" * 5000),
    ],
)  # fmt: skip
def test_scalars_follow_yaml_1_2(text: str, value: object) -> None:
    read_value = scalar(text)
    assert read_value == value
    assert type(read_value) is type(value)


def test_nan_and_inf_are_refused_by_the_schema() -> None:
    assert math.isnan(scalar(".nan"))
    assert problems(None, ["train.lr=.nan"]) == ["train.lr: expected a finite number, got nan"]
    assert problems({"train": {"lr": math.inf}}) == ["train.lr: expected a finite number, got inf"]


@pytest.mark.parametrize(
    ("override", "read_task"), [("task=50", "50"), ("scenario.task=15-5", "15-5"), ("task=1e3", "1e3")]
)
def test_task_names_stay_text(override: str, read_task: str) -> None:
    assert load(None, [override]).scenario.task == read_task


def test_task_numbers_in_files_and_mappings_become_text(tmp_path: Path) -> None:
    assert load(write(tmp_path, "scenario:\n  task: 50\nname: 0123\n")).scenario.task == "50"
    assert load(write(tmp_path, "name: 0123\n")).name == "0123"
    assert load({"scenario": {"task": 50}}).scenario.task == "50"


def test_explicit_steps_and_orders_are_read_as_lists() -> None:
    config = load(None, ["scenario.task=[[road, sky], [car, 7]]", "scenario.order=[3, car]"])
    assert config.scenario.task == [["road", "sky"], ["car", 7]]
    assert config.scenario.order == [3, "car"]


def test_override_values_keep_characters_that_yaml_would_eat() -> None:
    assert load(None, ["name=a # b"]).name == "a # b"
    assert load(None, ["data.root=C: x"]).data.root == "C: x"
    assert load(None, ["name='1'"]).name == "1"
    assert load(None, ["train.lr_next="]).train.lr_next is None


@pytest.mark.parametrize(
    ("override", "get"),
    [
        ("method=lwf", lambda c: c.method.name == "lwf"),
        ("data=voc", lambda c: c.data.dataset == "voc"),
        ("data=sub/my.yaml", lambda c: c.data.dataset == "sub/my.yaml"),
        ("model=deeplabv3-tiny", lambda c: c.model.name == "deeplabv3-tiny"),
        ("scenario=mine.py:build", lambda c: c.scenario.kind == "mine.py:build"),
        ("protocol=disjoint", lambda c: c.scenario.protocol == "disjoint"),
    ],
)
def test_shorthands(override: str, get) -> None:
    assert get(load(None, [override]))


# ---------------------------------------------------------------- layers


def test_later_layers_win(tmp_path: Path) -> None:
    write(tmp_path, "train: {lr: 0.5, batch: 3}\nseed: 1\n", "base.yaml")
    path = write(tmp_path, "base: base.yaml\ntrain:\n  batch: 4\n  epochs: 9\n")
    config = load(path, ["train.epochs=7"], seed=5, train={"power": 2})
    assert (config.train.lr, config.train.batch, config.train.epochs) == (0.5, 4, 7)
    assert (config.seed, config.train.power) == (5, 2.0)


def test_a_file_may_start_from_a_preset(tmp_path: Path) -> None:
    config = load(write(tmp_path, "preset: voc-15-1-mib\nmethod:\n  alpha: 2\nname: mine\n"))
    assert config.scenario.task == "15-1"
    assert config.method.options["kd_weight"] == 100
    assert config.method.options["alpha"] == 2
    assert config.name == "mine"


def test_another_method_does_not_inherit_hyper_parameters() -> None:
    assert load("voc-15-5-mib", ["method=lwf"]).method.options["kd_weight"] == 100
    assert load("voc-15-5-mib", ["method.kd_weight=3", "method=lwf"]).method.options["kd_weight"] == 3
    assert load("voc-15-1-mib", ["method=mib"]).method.options["kd_weight"] == 100


def test_hyper_parameters_not_given_are_filled_in() -> None:
    options = load(None, ["method=ewc"]).method.options
    assert options["weight"] == 500.0
    assert options["normalise"] is True


def test_files_that_are_their_own_base_are_refused(tmp_path: Path) -> None:
    write(tmp_path, "base: b.yaml", "a.yaml")
    write(tmp_path, "base: a.yaml", "b.yaml")
    must_say(problems(tmp_path / "a.yaml"), "a.yaml", "itself", "base")


def test_a_method_of_ones_own_is_checked_too(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        """
        from dataclasses import dataclass
        from everseg.methods.base import Method

        @dataclass(kw_only=True)
        class Mine(Method):
            strength: float = 2.0
            \"\"\"How strong it is.\"\"\"
            needed: int

        class Forgot(Method):
            extra: float = 1.0
        """,
        "mine.py",
    )
    assert problems(None, [f"method={path}:Mine", "method.strenght=1"]) == [
        f"method.needed: needed by '{path}:Mine': int",
        "method.strenght: unknown key; did you mean 'method.strength'?",
    ]
    config = load(None, [f"method={path}:Mine", "method.needed=3"])
    assert ("method.strength", 2.0, "How strong it is.") in fields(config)
    assert "no @dataclass(kw_only=True)" in problems(None, [f"method={path}:Forgot"])[0]


def test_a_stored_configuration_imports_no_code(tmp_path: Path) -> None:
    marker = tmp_path / "imported"
    path = write(tmp_path, f"open({str(marker)!r}, 'w')\nclass Mine: pass\n", "mine.py")
    assert from_stored({"method": {"name": f"{path}:Mine", "a": 1}}).method.options == {"a": 1}
    changed = from_stored({"method": {"name": f"{path}:Mine"}}, ["method=mib"])
    assert changed.method.options["kd_weight"] == 10.0
    assert load({"method": {"name": f"{path}:Mine"}}, import_own=False).method.name == f"{path}:Mine"
    assert not marker.exists()
    with pytest.raises(ConfigError, match="not a subclass"):
        from_stored({}, [f"method={path}:Mine"])
    assert marker.exists(), "the user names it"
    marker.unlink()


@pytest.mark.parametrize(
    ("stored", "said"),
    [
        ("demo-mib", "keys and values, got 'demo-mib'"),
        ([["demo-mib"]], "keys and values"),
        (None, "keys and values"),
        ({"base": "base.yaml"}, "base: unknown key"),
        ({"preset": "demo-mib"}, "preset: unknown key"),
        ({"method": "base.py:Mine"}, "method: expected keys"),
        ({"data": "base.py:build"}, "data: expected keys"),
        ({"task": "4-2"}, "task: unknown key"),
        ({"train": {"epochs": 10**4000}}, "train.epochs: a number beyond"),
        ({"train": {"threads": 10**9}}, "train.threads: expected int >= 1 and <= 4096"),
        ({"data": {"options": {"a": [[[[[[[[[[[[[[[[[[[[[]]]]]]]]]]]]]]]]]]]]]}}}, "nested deeper than 20"),
        ({"seed": True, "train": {"epocs": 3}}, "seed: expected int"),
        ({"seed": True, "train": {"epocs": 3}}, "train.epocs: unknown key"),
    ],
)
def test_what_is_stored_is_plain_keys_and_values(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stored: Any, said: str
) -> None:
    """No preset, no other file, no shorthand: nothing of that is ever written, and a file must not ask for it."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path, "open('imported', 'w')\nclass Mine: pass\n", "base.py")
    write(tmp_path, "method: base.py:Mine\n", "base.yaml")
    with pytest.raises(ConfigError) as caught:
        from_stored(stored)
    assert any(said in problem for problem in caught.value.problems)
    assert not (tmp_path / "imported").exists()


def test_what_was_written_reads_back_equal() -> None:
    config = load("camvid-6-5-mib", ["data.options={bit_depth: 16}", "scenario.task=50", "model.weights=1.5"])
    assert from_stored(to_json(config)) == config
    assert from_stored(json.loads(json.dumps(to_json(config)))) == config


def test_own_code_is_refused_until_the_user_names_it() -> None:
    stored = {
        "model": {"name": "a.py:net"}, "method": {"name": "b.py:M"}, "scenario": {"kind": "installed-one"},
        "data": {"domains": {"day": {"dataset": "c:build"}, "dusk": {"dataset": "demo"}, "fog": {"dataset": "x.yaml"}}},
    }  # fmt: skip
    config = from_stored(stored)
    assert own_code(config) == {
        ("model", "model"): "a.py:net", ("dataset", "data.domains.day.dataset"): "c:build",
        ("scenario", "scenario.kind"): "installed-one", ("method", "method"): "b.py:M",
    }  # fmt: skip
    with pytest.raises(ConfigError) as caught:
        refuse_own_code(config)
    assert [problem.rpartition(": ")[2] for problem in caught.value.problems] == [
        "model=a.py:net", "data.domains.day.dataset=c:build", "scenario.kind=installed-one",
    ]  # fmt: skip
    said = ["model=a.py:net", "data.domains={day: {dataset: 'c:build'}}"]
    with pytest.raises(ConfigError, match="installed-one"):
        refuse_own_code(config, said)
    refuse_own_code(config, [*said, "scenario.kind=installed-one"])
    refuse_own_code(config, named=["a.py:net", "c:build", "installed-one"])
    refuse_own_code(config, said, kinds=("dataset",))
    assert own_code(RunConfig()) == {}


# ---------------------------------------------------------------- messages


def test_all_problems_are_listed_at_once() -> None:
    found = problems(
        "voc-15-5-mib",
        [
            "train.epocs=3",
            "train.batch=0",
            "method.kd_weigth=1",
            "protocol=disjont",
            "foo",
            "lr=1",
            "seed=-1",
        ],
    )
    assert sorted(found) == [
        "'foo': expected key=value, such as train.epochs=10",
        "lr: unknown key; did you mean 'train.lr'?",
        "method.kd_weigth: unknown key; did you mean 'method.kd_weight'?",
        "scenario.protocol: expected one of 'disjoint', 'overlapped', 'sequential', 'partitioned', got 'disjont'"
        "; did you mean 'disjoint'?",
        "seed: expected int >= 0 and < 2147483648, got -1",
        "train.batch: expected int >= 1, got 0",
        "train.epocs: unknown key; did you mean 'train.epochs'?",
    ]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.epochs=a", "train.epochs: expected int >= 1, got 'a'"),
        ("train.epochs=1.5", "train.epochs: expected int >= 1, got 1.5"),
        ("train.epochs=true", "train.epochs: expected int >= 1, got true"),
        ("train.epochs_next=x", "train.epochs_next: expected int >= 1 or null, got 'x'"),
        ("train.nesterov=yes", "train.nesterov: expected true or false, got 'yes'"),
        ("train.nesterov=1", "train.nesterov: expected true or false, got 1"),
        ("data.scale=[1]", "data.scale: expected list of 2 numbers > 0, got [1]"),
        ("data.scale=[0.5,-1]", "data.scale: expected list of 2 numbers > 0, got [0.5, -1]"),
        ("data.flip=1.1", "data.flip: expected number >= 0 and <= 1, got 1.1"),
        ("train=5", "train: expected keys and values, got 5"),
        ("method.kd_weight=x", "method.kd_weight: expected number >= 0, got 'x'"),
        ("method=mibb", "method.name: unknown name 'mibb'; did you mean 'mib'?"),
        ("data.domains.dusk={dataset: x, datset: x}",
         "data.domains.dusk.datset: unknown key; did you mean 'data.domains.dusk.dataset'?"),
        ("data.domains.dsk.root=DIR", "data.domains.dsk.dataset: missing; expected text"),
        ("data.domains.dusk=5", "data.domains.dusk: expected keys and values, got 5"),
        ("data.domains=[a]", "data.domains: expected keys and values, got ['a']"),
        ("data.domains.dusk={dataset: x, root: [1]}", "data.domains.dusk.root: expected text or null, got [1]"),
        ("data.domains.dusk={dataset: x, options: 4}", "data.domains.dusk.options: expected keys and values, got 4"),
        ("scenario.steps=[{domian: x, domain: x}]",
         "scenario.steps[0].domian: unknown key; did you mean 'scenario.steps[0].domain'?"),
        ("scenario.steps=[{domain: a}, {add: [b]}]", "scenario.steps[1].domain: missing; expected text"),
        ("scenario.steps=[4]", "scenario.steps[0]: expected keys and values, got 4"),
        ("scenario.steps=5", "scenario.steps: expected list of {domain: ..., branch: ..., "),
        ("model.output_stride=12", "model.output_stride: expected one of 8, 16 or null, got 12"),
    ],
)  # fmt: skip
def test_messages_say_where_what_and_what_would_be_right(override: str, message: str) -> None:
    found = problems("voc-15-5-mib", [override])
    assert len(found) == 1
    assert found[0].startswith(message)


def test_problems_of_files_name_file_and_line(tmp_path: Path) -> None:
    path = write(tmp_path, "seed: 1\ntrain:\n  batch: 2\n  epochs: a\n")
    assert problems(path) == [f"train.epochs: expected int >= 1, got 'a' ({path}:4)"]
    assert problems(path, ["train.epochs=b"]) == ["train.epochs: expected int >= 1, got 'b'"]


def test_problems_inside_domains_and_steps_name_their_line(tmp_path: Path) -> None:
    text = """\
        data:
          domains:
            dusk:
              datset: demo
        scenario:
          steps:
            - domain: day
            - domian: dusk
    """
    path = write(tmp_path, text)
    assert problems(path) == [
        f"data.domains.dusk.dataset: missing; expected text ({path}:3)",
        f"data.domains.dusk.datset: unknown key; did you mean 'data.domains.dusk.dataset'? ({path}:4)",
        f"scenario.steps[1].domain: missing; expected text ({path}:8)",
        f"scenario.steps[1].domian: unknown key; did you mean 'scenario.steps[1].domain'? ({path}:8)",
    ]


def test_domains_and_steps_are_given_as_overrides_and_layers(tmp_path: Path) -> None:
    text = """\
        data:
          domains:
            day: {dataset: camvid, options: {sequence: day}}
            7: {dataset: camvid, rename: {car: vehicle}}
        scenario: {kind: domain-incremental, steps: [{domain: day}, {domain: 7, classes: [3, car]}]}
    """
    config = load(
        write(tmp_path, text),
        ["data.domains.day.root=D", "data.domains.dusk={dataset: demo, options: {light: dusk}}"],
    )
    assert list(config.data.domains) == ["day", "7", "dusk"]
    assert config.data.domains["day"].root == "D"
    assert config.data.domains["dusk"].options == {"light": "dusk"}
    steps = config.scenario.steps
    assert [(step.domain, step.classes) for step in steps] == [("day", None), ("7", [3, "car"])]
    (tmp_path / "again.yaml").write_text(dump(config))
    again = load(tmp_path / "again.yaml")
    assert again.data.domains.pop("day").root == str(tmp_path / "D"), "it starts from the folder of the file"
    assert again.data.domains == {name: config.data.domains[name] for name in ("7", "dusk")}
    other = load(
        to_json(config),
        ["data.domains.day.dataset=demo", "data.domains.7.dataset=demo", "scenario.steps=[{domain: 7}]"],
    )
    assert other.data.domains["day"].options == {}  # they were another data set's
    assert other.data.domains["day"].root == "D"
    assert other.data.domains["7"].rename == {}
    assert [step.domain for step in other.scenario.steps] == ["7"]


def test_every_setting_of_every_domain_is_shown_with_help() -> None:
    rows = {
        key: (value, text)
        for key, value, text in fields(load(None, ["data.domains.dusk={dataset: demo, root: D}"]))
    }
    assert rows["data.domains.dusk.root"] == ("D", "Folder of the data set; default `data.root`.")
    assert all(text for key, (_, text) in rows.items() if key.startswith("data.domains."))
    assert "data.domains" not in rows
    assert {key: value for key, value, _ in fields(load(None))}["data.domains"] == {}


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("a: 1\nb: 2\na: 3", 3, "key 'a' is written twice"),
        ("a: {b: 1, b: 2}", 1, "key 'b' is written twice"),
        ("a: &x 1", 1, "anchors and aliases"),
        ("a: 1\nb: *x", 2, "anchors and aliases"),
        ("a: !!python/object/apply:os.system [ls]", 1, "is not allowed"),
        ("a: !!str 1", 1, "is not allowed"),
        ("a:\n\tb: 1", 2, "a tab"),
        ("[" * 20000, 1, "nested deeper than 20"),
        ("a: 1\n---\nb: 2", 2, "a second document"),
        ("a: b: c", 1, "mapping values"),
        ("a: [1, 2", 1, ""),
        ("x: 1\na: \x07", 2, "in YAML"),
        ("true: 1", 1, "key must be"),
        ('a: "\\ud800"', 1, "surrogate"),
    ],
)
def test_yaml_surprises_are_refused_with_their_line(text: str, line: int, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(text, "run.yaml")
    assert str(caught.value).startswith(f"run.yaml:{line}: ")
    assert message in str(caught.value)


def test_billion_laughs_are_refused_before_they_grow() -> None:
    lines = ["a: &a [x, x]"] + [f"b{i}: &b{i} [*a, *a]" for i in range(50)]
    with pytest.raises(ConfigError, match="anchors"):
        parse("\n".join(lines), "bomb.yaml")


def test_files_that_cannot_be_a_configuration(tmp_path: Path) -> None:
    big = tmp_path / "big.yaml"
    big.write_bytes(b"#" * (MAX_BYTES + 1))
    latin = tmp_path / "latin.yaml"
    latin.write_bytes(b"a: 1\nname: caf\xe9\n")
    for path, message in [
        (big, "larger than 1000 kB"),
        (latin, "latin.yaml:2: not UTF-8"),
        (tmp_path / "no.yaml", "no such file"),
        (tmp_path, "not a file"),
        (write(tmp_path, "- 1\n", "list.yaml"), "keys and values"),
    ]:
        assert message in problems(path)[0]


def test_a_byte_order_mark_and_an_empty_file_are_fine(tmp_path: Path) -> None:
    path = tmp_path / "bom.yaml"
    path.write_bytes(b"\xef\xbb\xbfseed: 4\r\n")
    assert load(path).seed == 4
    assert load(write(tmp_path, "# nothing\n", "empty.yaml")) == load()


def test_unknown_names_are_told_apart_from_files() -> None:
    must_say(problems("voc-15-5-mibb")[0], "no preset", "no file 'voc-15-5-mibb'", "'voc-15-5-mib'")
    (said,) = problems("nowhere/x.yaml")
    must_say(said, "nowhere/x.yaml", "no such file", Path.cwd())


def test_unicode_of_arguments_that_is_none_is_refused() -> None:
    must_say(problems(None, ["name=\udcff"]), "name", "Unicode")


# ---------------------------------------------------------------- text and comparison


@pytest.mark.parametrize("name", ["voc-15-1-mib", "ade-50-lwf-mc", "demo-joint", "camvid-6-5-ewc"])
def test_dump_is_read_back_unchanged(tmp_path: Path, name: str) -> None:
    config = load(name, ["name=on", "data.options={a: '1e3', b: [null, 1.5], c: yes}", "out='null'"])
    path = tmp_path / "dump.yaml"
    path.write_text(dump(config), encoding="utf-8")
    assert load(path) == config
    assert load(to_json(config)) == config
    assert json.loads(json.dumps(to_json(config))) == to_json(config)


def test_harmless_keys_do_not_change_the_identity() -> None:
    changed = {
        "name": "x", "out": "y", "tracker": "[]", "data.root": "/r", "data.workers": "7", "data.skip_bad": "4",
        "train.checkpoint_every": "3", "train.log_every": "2", "train.max_time": "9", "train.eval_batch": "2",
        "model.download": "true", "scenario.single_task": "{day: 50.5}",
    }  # fmt: skip
    assert set(changed) <= HARMLESS
    base = load("demo-mib")
    other = load("demo-mib", [f"{key}={value}" for key, value in changed.items()])
    assert other != base
    assert config_hash(other) == config_hash(base)
    assert difference(base, other) == []


def test_the_folder_of_a_domain_is_harmless_everything_else_of_it_is_not() -> None:
    base = load({"data": {"domains": {"day": {"dataset": "camvid"}, "dusk": {"dataset": "camvid"}}}})
    moved = load(to_json(base), ["data.domains.dusk.root=DIR"])
    assert moved != base
    assert config_hash(moved) == config_hash(base)
    for override in (
        "dusk.dataset=demo", "dusk.options={sequence: dusk}", "dusk.rename={car: vehicle}", "night.dataset=camvid"
    ):  # fmt: skip
        assert config_hash(load(to_json(base), [f"data.domains.{override}"])) != config_hash(base)
    turned = load({"data": {"domains": dict(reversed(to_json(base)["data"]["domains"].items()))}})
    assert difference(base, turned) == ['data.domains: ["day", "dusk"] -> ["dusk", "day"]']


def test_every_other_key_changes_the_identity() -> None:
    base = load("demo-mib")
    for override in ("seed=1", "train.lr=0.3", "method.kd_weight=1", "data.crop=72", "data.options.a=1"):
        assert config_hash(load("demo-mib", [override])) != config_hash(base)


def test_the_difference_names_key_and_both_values() -> None:
    found = difference(load("demo-mib"), load("demo-mib", ["train.batch=3", "method=ft"]))
    assert "train.batch: 8 -> 3" in found
    assert 'method.name: "mib" -> "ft"' in found
    assert "method.kd_weight: 10.0 -> (not set)" in found


def test_identity_holds_everything_but_the_harmless_keys() -> None:
    config = load("demo-ft")
    keys = set(identity(config)) | HARMLESS
    assert keys == {key for key, _, _ in fields(config)} | HARMLESS


def test_every_field_and_hyper_parameter_has_help() -> None:
    for method in ("ft", "lwf", "lwf-mc", "ilt", "ewc", "rw", "pi", "mib"):
        missing = [key for key, _, text in fields(load(None, method=method)) if not text]
        assert missing == []


def test_expectations_in_words() -> None:
    assert expectation(int | None) == "int or null"
    assert expectation(list[list[int | str]]) == "list of list of int or text"
    assert shown("x" * 100) == "'" + "x" * 56 + "..."
    assert set(method_options("mib")) >= {"kd_weight", "freeze_encoder"}


# ---------------------------------------------------------------- anything goes in

words = st.sampled_from(
    [
        "train",
        "data",
        "method",
        "name",
        "lr",
        "epochs",
        "task",
        "scenario",
        "options",
        "mib",
        "15-5",
        "preset",
        "base",
    ]
)
leaves = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | words
    | st.binary(max_size=2)
)
trees = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words | st.integers(), inner, max_size=4),
    max_leaves=12,
)


@settings(max_examples=200, deadline=None)
@given(
    st.dictionaries(words, trees, max_size=4),
    st.lists(st.text(max_size=12) | words.map("{}=x".format), max_size=3),
)
def test_any_mapping_loads_or_raises_a_config_error(tree: dict, overrides: list[str]) -> None:
    try:
        config = load(tree, overrides)
    except ConfigError:
        return
    assert isinstance(config, RunConfig)
    assert load(to_json(config)) == config


@settings(max_examples=300, deadline=None)
@given(
    st.text(st.characters(codec="utf-8") | st.sampled_from(list("[]{}:,\n \t-&*!'\"#?|>%@`a1")), max_size=60)
)
def test_any_text_is_read_or_refused(text: str) -> None:
    with contextlib.suppress(ConfigError):
        assert parse(text, "x.yaml") == parse(text + "\n", "x.yaml")


def test_reading_gives_the_place_of_every_value(tmp_path: Path) -> None:
    path = write(tmp_path, "a:\n  - x\n  - {b: 2}\nc: 3\n")
    parsed = read(path)
    assert parsed.value == {"a": ["x", {"b": 2}], "c": 3}
    assert {key: int(o.where.rpartition(":")[2]) for key, o in parsed.origins.items()} == {
        (): 1, ("a",): 1, ("a", 0): 2, ("a", 1): 3, ("a", 1, "b"): 3, ("c",): 4,
    }  # fmt: skip


def test_options_add_to_those_given_before_until_the_name_changes():
    both = load("demo-mib", ["data.options.num_train=40", "data.options.num_val=10"])
    assert both.data.options == {"num_train": 40, "num_val": 10}
    wider = load("camvid-6-5-mib", ["model.options.hidden=32"])
    assert wider.model.options == {**load("camvid-6-5-mib").model.options, "hidden": 32}
    assert load("camvid-6-5-mib", ["model=deeplabv3-resnet18"]).model.options == {}


def test_a_misspelt_domain_is_told_the_one_that_was_meant() -> None:
    found = problems("camvid-day-dusk-mdil", ["data.domains.dsk.root=DIR"])
    assert found == ["data.domains.dsk.dataset: missing; expected text; did you mean 'dusk'?"]
