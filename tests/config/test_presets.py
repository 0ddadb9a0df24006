"""Presets: every name loads, and says what was published."""

from __future__ import annotations

import dataclasses
import json
import re
from pathlib import Path

import pytest

from everseg import registry
from everseg.config import presets
from everseg.config.fields import RunConfig
from everseg.config.loading import difference, load
from everseg.errors import ConfigError
from saying import must_say


def test_every_preset_loads_and_its_method_has_every_hyper_parameter() -> None:
    names = presets.names(every=True)
    assert len(names) > 1000
    for name in names:
        raw = presets.load_preset(name)
        config = load(name)
        assert isinstance(config, RunConfig)
        assert config.name == name.replace("*", "-star")
        method = registry.resolve("method", config.method.name)
        known = {field.name for field in dataclasses.fields(method)}
        assert set(raw["method"]) - {"name"} <= known, name


def test_the_network_of_every_preset_is_one_that_its_method_works_with() -> None:
    for name in presets.names(every=True):
        config = load(name)
        model, options = config.model, config.model.options
        expected = {
            "mbs": model.name == "segmenter",
            "sats": model.name == "mlp" and (model.encoder or "").startswith("hf:"),
            "rcil": options.get("compensation") is True,
            "dkd": options.get("last_conv") is True,
            "star": options.get("last_conv") is True,
        }
        assert expected.get(config.method.name, True), f"{name}: {model}"


def test_listed_names_are_a_part_of_all_and_unique() -> None:
    listed, every = presets.names(), presets.names(every=True)
    assert set(listed) < set(every)
    assert len(set(every)) == len(every)
    assert {"voc-15-5-mib", "voc-15-1-overlapped-mib", "ade-100-50b-lwf", "camvid-6-5-mib", "demo-ft",
            "demo-mib", "demo-joint", "voc-offline-ft", "voc-15-5-joint"} <= set(listed)  # fmt: skip
    assert "voc-15-5-disjoint-mib" not in listed


@pytest.mark.parametrize(
    ("name", "weight"),
    [("15-1", 100), ("15-5s", 100), ("19-1", 100), ("19-1b", 100), ("10-1", 100),
     ("15-5", 10), ("10-5-5", 10), ("5-3", 10)],
)  # fmt: skip
def test_the_distillation_weight_of_mib_is_100_where_a_step_adds_one_voc_class(
    name: str, weight: float
) -> None:
    for protocol in ("", "-overlapped", "-disjoint"):
        assert load(f"voc-{name}{protocol}-mib").method.options["kd_weight"] == weight


def test_other_data_sets_keep_the_weight_of_the_paper() -> None:
    for name in ("ade-100-50-mib", "ade-100-10b-mib", "camvid-6-1-mib", "demo-4-1-mib"):
        assert load(name).method.options["kd_weight"] == 10


@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("lwf", {"kd_weight": 100}),
        ("lwf-mc", {"importance": 10, "form": "combined"}),
        ("ilt", {"kd_weight": 100, "feature_weight": 100}),
        ("ewc", {"weight": 500, "alpha": 0.9}),
        ("rw", {"weight": 100, "alpha": 0.9, "period": 10}),
        ("pi", {"weight": 500}),
    ],
)
def test_hyper_parameters_are_the_published_ones(method: str, expected: dict) -> None:
    for name in (f"voc-15-5-{method}", f"ade-50-{method}", f"voc-15-1-overlapped-{method}"):
        assert load(name).method.options.items() >= expected.items()


@pytest.mark.parametrize(
    ("data", "epochs", "policy"), [("voc-15-5", 30, "mib-voc"), ("ade-100-10", 60, "mib-ade")]
)
def test_training_is_as_published(data: str, epochs: int, policy: str) -> None:
    config = load(f"{data}-mib")
    train = config.train
    assert (train.epochs, train.epochs_next, train.batch) == (epochs, None, 24)
    assert (train.lr, train.lr_next, train.schedule, train.power) == (0.01, 0.001, "poly", 0.9)
    assert (train.momentum, train.nesterov, train.weight_decay) == (0.9, True, 1e-4)
    assert (config.data.crop, config.data.scale, config.data.evaluation) == (512, (0.5, 2.0), "crop")
    assert (config.model.name, config.model.output_stride, config.model.norm) == (
        "deeplabv3-resnet101",
        16,
        "abn",
    )
    assert (config.scenario.policy, config.scenario.protocol) == (policy, "disjoint")


def test_published_lists_are_used_where_the_authors_released_them() -> None:
    for task in ("100-50", "100-50b", "100-10", "100-10b", "50", "50b", "50-50"):
        assert load(f"ade-{task}-mib").scenario.lists == "published"
    assert load("ade-100-50c-mib").scenario.lists is None
    assert load("ade-100-50-overlapped-mib").scenario.lists is None
    assert load("ade-100-50-joint").scenario.lists is None
    assert load("voc-15-5-mib").scenario.lists is None


@pytest.mark.golden
def test_lists_of_the_presets_are_those_of_the_golden_scenarios(golden: Path) -> None:
    released = json.loads((golden / "scenario.json").read_text())["released_index_files"]
    tasks = {name.split("/")[1] for name in released if name.startswith("ade/")}
    listed = {
        load(name).scenario.task
        for name in presets.names(every=True)
        if name.startswith("ade-") and load(name).scenario.lists == "published"
    }
    assert listed == tasks


@pytest.mark.golden
def test_every_task_of_the_original_code_has_presets(golden: Path) -> None:
    tasks = json.loads((golden / "scenario.json").read_text())["tasks"]
    names = presets.names(every=True)
    for data, of_data in tasks.items():
        for task in of_data:
            assert f"{data}-{task}-ft" in names


def test_joint_training_is_a_scenario() -> None:
    config = load("voc-15-5-joint")
    assert config.scenario.joint
    assert config.scenario.task == "15-5"
    assert config.method.name == "ft"
    assert not load("voc-15-5-ft").scenario.joint


def test_aliases_and_short_names_mean_the_same() -> None:
    for a, b in [
        ("voc-15-5s-mib", "voc-15-1-mib"),
        ("voc-15-5-disjoint-mib", "voc-15-5-mib"),
        ("demo-mib", "demo-4-2-mib"),
        ("ade-50-50b-lwf", "ade-50b-lwf"),
    ]:
        assert presets.load_preset(a) | {"name": ""} == presets.load_preset(b) | {"name": ""}


def test_protocols_are_part_of_the_name() -> None:
    for protocol in presets.PROTOCOLS:
        assert load(f"voc-15-5-{protocol}-lwf").scenario.protocol == protocol


def test_camvid_trains_with_void_ignored_and_is_scored_on_its_test_split() -> None:
    scenario = load("camvid-6-5-mib").scenario
    assert (scenario.policy, scenario.protocol, scenario.test_split) == ("ignore-void", "overlapped", "test")


PAPER = ("cs-bdd", "cs-idd", "cs-bdd-idd", "cs-idd-bdd")


@pytest.mark.parametrize("sequence", PAPER)
def test_mdil_trains_as_published(sequence: str) -> None:
    """Garg et al., WACV 2022, section 4, and the authors' scripts."""
    config = load(f"{sequence}-mdil")
    data, train = config.data, config.train
    assert list(data.domains) == sequence.split("-")
    names = {"cs": "cityscapes", "bdd": "bdd100k", "idd": "idd"}
    assert all(domain.dataset == names[key] for key, domain in data.domains.items())
    assert (data.transform, data.size, data.shift, data.shift_fill, data.flip) == (
        "resize",
        (512, 1024),
        2,
        "void",
        0.5,
    )
    assert (data.normalisation, data.evaluation) == ("unit", "resize")
    assert (config.scenario.kind, config.scenario.steps) == ("domain-incremental", None)
    assert (config.scenario.class_weights, config.scenario.void_channel) == ("published", True)
    assert config.scenario.test_split == "val"
    assert (train.optimizer, train.lr, train.lr_next, train.betas) == ("adam", 5e-4, None, (0.9, 0.999))
    assert (train.weight_decay, train.epochs, train.epochs_next, train.batch) == (1e-4, 150, None, 6)
    assert (train.schedule, train.schedule_by, train.power) == ("poly", "epoch", 0.9)
    assert (config.model.name, config.model.options) == ("erfnet", {"per_branch": "adapter"})
    options = config.method.options
    assert (config.method.name, options["kd_weight"], options["shared_lr_scale"]) == ("mdil", 0.1, 0.01)
    assert options["frozen_statistics"] is True
    assert (options["kl"], options["updates"], options["teacher_statistics"]) == ("log", "one", "running")


def test_the_authors_form_of_mdil_is_a_preset_that_differs_in_its_quirks_only() -> None:
    ours, theirs = load("cs-bdd-idd-mdil"), load("cs-bdd-idd-mdil-authors")
    changed = {row.split(":")[0]: row for row in difference(ours, theirs)}
    assert {key: row.split("-> ")[1] for key, row in changed.items()} == {
        "data.shift_fill": '"authors"',
        "method.kl": '"probabilities"',
        "method.updates": '"two-legacy"',
        "method.teacher_statistics": '"authors"',
        "method.frozen_statistics": "false",
    }


@pytest.mark.parametrize("sequence", [*PAPER, "camvid-day-dusk", "demo-day-dusk"])
def test_the_baselines_share_one_encoder_and_differ_in_one_thing_each(sequence: str) -> None:
    ft = load(f"{sequence}-ft")
    assert ft.model.options["per_branch"] == "decoder"
    assert ft.method.name == "ft"
    for name, key in (
        ("fe", "method.freeze_encoder"),
        ("multi", "scenario.joint"),
        ("single", "scenario.single"),
    ):
        assert difference(ft, load(f"{sequence}-{name}")) == [f"{key}: false -> true"]
    rows = difference(ft, load(f"{sequence}-mdil"))
    assert {row.split(":")[0].split(".")[0] for row in rows} == {"model", "method"}


def test_class_incremental_methods_run_on_domains_with_their_published_numbers() -> None:
    listed = presets.names()
    for method in ("lwf", "lwf-mc", "ilt", "ewc", "rw", "pi"):
        assert f"camvid-day-dusk-{method}" in listed
        published = load(f"voc-15-5-{method}").method
        assert load(f"camvid-day-dusk-{method}").method == published
        assert f"cs-bdd-{method}" in presets.names(every=True)


def test_the_domains_of_camvid_are_its_sequences_under_one_root() -> None:
    config = load("camvid-day-dusk-mdil", ["data.root=DIR"])
    assert {name: (d.dataset, d.root, d.options) for name, d in config.data.domains.items()} == {
        "day": ("camvid", None, {"sequence": "day"}),
        "dusk": ("camvid", None, {"sequence": "dusk"}),
    }
    assert config.scenario.test_split == "test"  # the only other split that shows both


@pytest.mark.parametrize(("name", "base", "added"), [("camvid-mixed", 8, 3), ("demo-mixed", 4, 2)])
def test_mixed_presets_add_classes_to_one_domain_and_then_another_domain(
    name: str, base: int, added: int
) -> None:
    assert {f"{name}-{method}" for method in ("mdil+mib", "ft")} <= set(presets.names())
    config = load(f"{name}-mdil+mib")
    first, second, third = config.scenario.steps or ()
    assert (first.domain, len(first.classes or ()), first.add) == ("day", base, None)
    assert (second.domain, second.classes, len(second.add or ())) == ("day", None, added)
    assert (third.domain, third.classes, third.add) == ("dusk", None, None)
    assert config.method.name == "mdil+mib"
    assert f"{name}-single" not in presets.names(every=True)


def test_unknown_names_get_the_nearest_one_and_a_way_out() -> None:
    with pytest.raises(ConfigError, match=r"did you mean 'cs-bdd-idd-mdil'\?"):
        presets.load_preset("cs-bdd-idd-mdill")
    with pytest.raises(ConfigError, match=r"did you mean 'voc-15-5-mib'\?.*scenario\.task=") as caught:
        presets.load_preset("voc-15-5-mibb")
    assert "voc-15-5-mib scenario.task" in str(caught.value)


def test_what_a_preset_gives_is_a_copy() -> None:
    presets.load_preset("voc-15-5-mib")["train"]["lr"] = 7
    assert presets.load_preset("voc-15-5-mib")["train"]["lr"] == 0.01


def test_rcil_has_its_network_rates_and_factors() -> None:
    for name, lr, epochs, factor in (
        ("voc-15-1-overlapped-rcil", 0.02, 30, 0.01),
        ("voc-10-1-disjoint-rcil", 0.02, 30, 0.01),
        ("ade-100-50-rcil", 0.01, 60, 5e-6),
        ("ade-100-5-rcil", 0.01, 60, 5e-6),
    ):
        config = load(name)
        assert (config.model.norm, config.model.options) == ("iabn", {"compensation": True})
        assert (config.train.lr, config.train.lr_next, config.train.batch) == (lr, 0.001, 24)
        assert (config.train.epochs, config.train.epochs_next or config.train.epochs) == (epochs, epochs)
        assert config.method.options["spatial_weight"] == factor
        assert config.scenario.policy == f"plop-{name[:3]}"
    assert load("camvid-6-5-rcil").model.options["compensation"] is True


@pytest.mark.parametrize(("method", "largest"), [("ewc", 1), ("pi", 1), ("rw", 2)])
@pytest.mark.parametrize("task", ["", "4-1-"])
def test_the_penalties_of_the_demo_do_not_overshoot(method: str, largest: int, task: str) -> None:
    """Gradient descent with Nesterov momentum m is stable on a parabola while lr * curvature < (2 + 2m) / (1 + 2m)."""
    config = load(f"demo-{task}{method}")
    m = config.train.momentum
    curvature = 2 * config.method.options["weight"] * largest
    assert config.train.lr_next * curvature < (2 + 2 * m) / (1 + 2 * m)
    assert load(f"voc-15-5-{method}").method.options["weight"] == (100 if method == "rw" else 500)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("voc-15-1-ewf", ("overlapped", "plop-voc", 24, 30, None, 10.0)),
        ("voc-10-1-ewf", ("overlapped", "plop-voc", 24, 30, None, 10.0)),
        ("ade-100-50-ewf", ("overlapped", "plop-ade", 48, 60, None, 10.0)),
        ("ade-100-10-ewf", ("overlapped", "plop-ade", 24, 60, None, 100.0)),
        ("ade-100-5-ewf", ("overlapped", "plop-ade", 24, 60, None, 100.0)),
    ],
)
def test_fusion_is_trained_as_its_scripts_say(name: str, expected: tuple) -> None:
    config = load(name)
    method = config.method.options
    found = (
        config.scenario.protocol, config.scenario.policy, config.train.batch, config.train.epochs,
        config.train.epochs_next, method["kd_weight"],
    )  # fmt: skip
    assert found == expected
    assert (method["fuse"], method["freeze_heads"]) == ("all", "old")
    assert (config.train.lr, config.train.lr_next) == (0.01, 0.001)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("voc-15-1-nest", ("plop-voc", 30, None, 5, 1.0)),
        ("voc-10-1-nest", ("plop-voc", 30, 10, 5, 1.0)),
        ("ade-100-5-nest", ("plop-ade", 60, None, 15, 500.0)),
    ],
)
def test_pretuning_is_as_its_scripts_say(name: str, expected: tuple) -> None:
    config = load(name)
    train, method = config.train, config.method.options
    found = (
        config.scenario.policy,
        train.epochs,
        train.epochs_next,
        method["pretune"],
        method["pretune_lr_scale"],
    )
    assert found == expected
    assert (config.scenario.protocol, train.batch, train.lr, train.lr_next) == ("overlapped", 24, 0.02, 0.001)
    assert (method["kd_weight"], method["fuse"], method["freeze_heads"]) == (10.0, "none", "none")


def test_a_name_without_protocol_means_that_of_the_authors_as_the_page_says() -> None:
    overlapped = [
        name
        for name in presets._part("methods")
        if presets._family(name, "voc").get("default") == "overlapped"
    ]
    for name in presets._part("methods"):
        for task in ("voc-15-5", "ade-100-50"):
            alone = {("mib-augm", "voc-15-5"): "partitioned"}  # its authors report VOC alone
            expected = alone.get((name, task), "overlapped" if name in overlapped else "disjoint")
            assert load(f"{task}-{name}").scenario.protocol == expected
    page = (Path(__file__).parents[2] / "docs" / "how-to.md").read_text(encoding="utf-8")
    told = page.split("overlapped for ")[1].split("disjoint for the others")[0]
    assert re.findall("`(.+?)`", told) == overlapped


def test_sats_has_a_network_with_attention_and_nothing_of_another() -> None:
    for name in ("voc-15-1-sats", "ade-100-50-sats", "camvid-6-5-sats", "demo-sats"):
        model = load(name).model
        assert (model.name, model.output_stride, model.norm) == ("mlp", None, "bn")
        assert str(model.encoder).startswith("hf:")
        assert set(model.options) <= {"hidden"}


@pytest.mark.parametrize(
    ("data", "ewc", "rw"), [("camvid-6-5", 25.0, 5.0), ("camvid-6-1", 25.0, 5.0), ("demo-4-2", 2.0, 1.0)]
)
def test_penalties_stay_below_the_bound_of_the_learning_rate(data: str, ewc: float, rw: float) -> None:
    for method, weight in (("ewc", ewc), ("pi", ewc), ("rw", rw)):
        config = load(f"{data}-{method}")
        assert config.method.options["weight"] == weight
        # Nesterov's momentum m is stable up to a curvature of 2 (1 + m) / (1 + 2 m) over the rate; rw has two parts.
        curvature = 2 * weight * (2 if method == "rw" else 1)
        momentum = config.train.momentum
        assert (config.train.lr_next or 0) * curvature < 2 * (1 + momentum) / (1 + 2 * momentum)


def test_a_variant_has_all_of_its_method_and_its_own_on_top() -> None:
    plain, memory = load("voc-15-1-ssul"), load("voc-15-1-ssul-m")
    assert memory.method == plain.method
    assert memory.method.name == "ssul"
    assert (plain.scenario.memory.size, memory.scenario.memory.size) == (0, 100)
    assert load("ade-100-50-ssul-m").scenario.memory.size == 300
    one, other = plain.model_dump(), memory.model_dump()
    for dumped in (one, other):
        del dumped["name"], dumped["scenario"]["memory"]
    assert one == other


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("voc-15-1-ssul", (50, 32, 0.01, 0.01, 1e-6, 0.0, "salient")),
        ("voc-19-1-ssul-m", (50, 32, 0.01, 0.01, 1e-6, 0.0, "salient")),
        ("ade-100-10-ssul", (100, 24, 0.01, 0.05, 0.0, 0.1, "all")),
    ],
)
def test_ssul_trains_as_its_commands_say(name: str, expected: tuple) -> None:
    config = load(name)
    train, options = config.train, config.model.options
    assert (
        train.epochs, train.batch, train.lr, train.lr_next, train.min_lr, train.warmup_share,
        config.method.options["unknown"],
    ) == expected  # fmt: skip
    assert (config.data.crop, config.scenario.policy, config.scenario.protocol, config.model.norm) == (
        513, "ignore-void", "overlapped", "bn",
    )  # fmt: skip
    assert (options["pool_size"], options["dropout"], options["encoder_momentum"]) == (None, 0.1, 0.01)
    assert config.method.options["threshold"] == 0.7


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("voc-15-1-barm", (50, 20, 16, 0.01, 0.001, 0.001, 0.0001)),
        ("ade-100-10-barm", (60, 100, 8, 0.01, 0.01, 0.001, 0.0001)),
    ],
)
def test_barm_trains_as_its_commands_say(name: str, expected: tuple) -> None:
    """Epochs, batch, and the rates: first step, new head, decoder, older parts."""
    config = load(name)
    method, train = registry.resolve("method", "barm")(**config.method.options), config.train
    found = (
        train.epochs, train.epochs_next, train.batch, train.lr, train.lr_next,
        train.lr_next * method.decoder_rate, train.lr_next * method.old_rate,
    )  # fmt: skip
    assert found == pytest.approx(expected)
    assert (train.min_lr, method.encoder_rate, method.threshold) == (1e-6, 0.1, 0.7)
    assert method.ear_statistics == "fresh"
    assert (config.data.crop, config.scenario.policy, config.scenario.protocol, config.model.norm) == (
        513, "ignore-void", "overlapped", "bn",
    )  # fmt: skip


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("voc-15-1-dkd", (60, 32, 0.001, 0.0001, 2.0, 1.0, 0.0)),
        ("voc-19-1-dkd-m", (60, 32, 0.001, 0.0001, 2.0, 1.0, 0.0)),
        ("ade-100-10-dkd", (100, 24, 0.0025, 0.00025, 35.0, None, 0.2)),
        ("voc-15-1-star", (60, 24, 0.001, 0.0001, 4.0, None, 0.0)),
        ("voc-15-1-disjoint-star", (60, 24, 0.001, 0.0001, 4.0, None, 0.0)),
        ("ade-100-50-star", (100, 24, 0.0025, 0.00025, 30.0, None, 0.0)),
    ],
)
def test_dkd_and_star_train_as_their_commands_say(name: str, expected: tuple) -> None:
    config = load(name)
    method, train = config.method.options, config.train
    found = (
        train.epochs, train.batch, train.lr, train.lr_next, method["pos_weight"], method.get("pos_weight_next"),
        train.warmup_share,
    )  # fmt: skip
    assert found == expected
    assert (train.lr_factors.encoder, train.lr_factors.decoder, train.lr_factors.heads) == (1, 10, 10)
    assert (config.model.norm, config.model.options["last_conv"]) == ("bn", True)
    assert method["unlabelled"] == "negative"
    assert config.scenario.policy == f"plop-{name[:3]}"
    assert config.scenario.protocol == ("disjoint" if "disjoint" in name else "overlapped")


@pytest.mark.parametrize(
    ("name", "size"),
    [("voc-15-1-dkd", 100), ("ade-100-50-dkd", 300), ("voc-15-5-star", 50), ("demo-star", 8)],
)
def test_the_memories_of_dkd_and_star_are_among_the_steps_own_images(name: str, size: int) -> None:
    plain, memory = load(name), load(f"{name}-m")
    kept = memory.scenario.memory
    assert plain.scenario.memory.size == 0
    assert (kept.size, kept.mix, kept.labels, kept.pseudo) == (size, "append", "current", 0.9)
    assert memory.method == plain.method


def test_what_has_no_command_is_not_listed() -> None:
    listed = presets.names()
    assert {"voc-15-1-dkd-m", "voc-15-1-star-m", "ade-100-50-dkd-m", "ade-100-50-star"} <= {*listed}
    assert "ade-100-50-star-m" not in listed


# What the encoders' authors state for ADE20K: learning rate, weight decay, decay by layer, factor of the head, frozen.
# ConvNeXt's decay of 0.9 is by stage, and everseg's by block.
AUTHORS = {
    "swin-b": (6e-5, 0.01, None, 1.0, False),
    "mit-b2": (6e-5, 0.01, None, 10.0, False),
    "vit-b": (1e-4, 0.05, 0.65, 1.0, False),
    "convnext-t": (1e-4, 0.05, 0.95, 1.0, False),
    **{f"dinov2-{size}": (1e-3, 1e-4, None, 1.0, True) for size in "sb"},
    **{f"dinov3-{size}": (1e-3, 1e-3, None, 1.0, True) for size in "sb"},
}


@pytest.mark.parametrize("network", presets.networks())
def test_networks_of_later_papers_train_as_their_authors_say(network: str) -> None:
    plain, config = load("voc-15-1-plop"), load(f"voc-15-1-plop@{network}")
    train, frozen = config.train, config.method.options.get("freeze_encoder", False)
    found = (train.lr, train.weight_decay, train.layer_decay, train.lr_factors.heads, frozen)
    assert found == AUTHORS[network]
    assert (train.optimizer, train.batch, train.power) == ("adamw", 16, 1.0)
    assert train.lr_next == pytest.approx(train.lr / 10)
    assert train.warmup_share == (1500 / 40000 if frozen else pytest.approx(1500 / 160000, rel=0.1))
    assert (config.scenario, config.data) == (plain.scenario, plain.data)
    assert plain.method.options | config.method.options == config.method.options
    assert (config.model.encoder or "").partition(":")[0] in ("hf", "timm")
    assert config.model.output_stride is None  # nothing of the preset's own network is left
    assert config.name == f"voc-15-1-plop@{network}"
    assert presets.is_preset(config.name)


def test_networks_stand_behind_presets_of_new_classes_only() -> None:
    with pytest.raises(ConfigError) as error:
        load("voc-15-1-plop@swinb")
    must_say(error.value, "swinb", "swin-b", "convnext-t")
    for name in ("voc-15-1-rcil@swin-b", "voc-15-1-mbs@swin-b", "cs-bdd-mdil@swin-b"):
        with pytest.raises(ConfigError) as error:
            load(name)
        must_say(error.value, name, "model.encoder")
    with pytest.raises(ConfigError, match="voc-15-1-mib"):
        load("voc-15-1-mibb@swin-b")
    assert not presets.is_preset("voc-15-1-mib@other")
    assert presets.split("a@b-mib") == ("a@b-mib", "")
