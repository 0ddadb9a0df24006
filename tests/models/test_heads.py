"""Heads of all kinds: what they compute, their parts, replay, freezing, and models that read them back."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from everseg.errors import CheckpointError, ConfigError
from everseg.methods.base import groups_of
from everseg.models.build import deeplabv3_tiny, from_description
from everseg.models.folding import folded_copy
from everseg.models.heads import (
    EXPAND,
    GrowingHead,
    Growth,
    Head,
    background_layer,
    copy_trunk,
    last_layer,
    sizes_of,
    start_from,
)
from everseg.models.model import SegmentationModel, init_from_background
from everseg.types import SegOutput
from saying import must_say

SSUL = Head(hidden=5, background="own", auxiliary={"unknown": 2})
DKD = Head(background="constant", auxiliary={"auxiliary": 1}, detached=("auxiliary",))
BARM = Head(hidden=5, beside={"residual": 1})
KINDS = {
    "plain": [Head(), Head()],
    "ssul": [SSUL, Head(hidden=5)],
    "dkd": [DKD, Head()],
    "star": [Head(background="constant"), Head()],
    "barm": [Head(hidden=5), BARM, BARM],
    "dft": [Head(reserve=(2, 1)), Head(), Head()],
    "acil": [Head(expansion=7), Head()],
}
CLASSES = (3, 2, 1)


def network(heads: list[Head], **options: object) -> SegmentationModel:
    torch.manual_seed(4)
    small = {"stem": 4, "widths": (4, 4, 6, 8), "hidden": 4, "out_channels": 6}
    model = deeplabv3_tiny(norm="bn", **{**small, **options})
    for number, head in zip(CLASSES, heads, strict=False):
        model.grow({"a": number}, heads={"a": head})
    return model


def run(model: SegmentationModel) -> SegOutput:
    torch.manual_seed(5)
    return model(torch.randn(2, 3, 32, 40))["a"]


def bare(*heads: Head) -> GrowingHead:
    torch.manual_seed(4)
    head = GrowingHead(3)
    for number, one in zip(CLASSES, heads, strict=False):
        head.grow(number, one)
    return head.double().eval()


def test_a_head_concatenates_its_classifiers_in_the_order_of_growth():
    head = GrowingHead(2)
    head.grow(2)
    head.grow(1)
    with torch.no_grad():
        head.classifiers[0].weight.copy_(torch.tensor([[1.0, 0], [0, 1]]).view(2, 2, 1, 1))
        head.classifiers[0].bias.copy_(torch.tensor([0.5, 0]))
        head.classifiers[1].weight.copy_(torch.tensor([[2.0, -1]]).view(1, 2, 1, 1))
        head.classifiers[1].bias.fill_(1)
    found = head(torch.tensor([3.0, 4]).view(1, 2, 1, 1))
    assert found.logits.flatten().tolist() == [3.5, 4, 3]
    assert found.auxiliary == found.features == {}
    assert head.sizes == (2, 1)
    assert head.num_classes == 3
    assert set(head.state_dict()) == {
        f"classifiers.{i}.{leaf}" for i in (0, 1) for leaf in ("weight", "bias")
    }


def test_a_head_keeps_old_logits_bit_equal_and_its_dtype():
    head = GrowingHead(5).double()
    head.grow(3)
    head.double()
    x = torch.randn(2, 5, 4, 4, dtype=torch.float64)
    before = head(x).logits
    head.grow(4)
    assert head(x).logits.dtype == torch.float64
    assert torch.equal(head(x).logits[:, :3], before)
    with pytest.raises(ConfigError, match="not by 0"):
        head.grow(0)


def test_trunks_own_background_and_auxiliary_outputs_compute_what_they_say():
    head = bare(SSUL, Head(hidden=5))
    x = torch.randn(2, 3, 6, 7, dtype=torch.float64)
    found = head(x)

    def by_hand(part: nn.Module) -> torch.Tensor:
        inner = F.conv2d(x, part.conv.weight, padding=1)
        inner = torch.relu(F.batch_norm(inner, part.norm.running_mean, part.norm.running_var, part.norm.weight,
                                        part.norm.bias))  # fmt: skip
        return F.conv2d(inner, part.classifier.weight, part.classifier.bias)

    parts = head.parts
    assert list(parts) == ["0", "1", "unknown", "background"]
    assert [last_layer(part).out_channels for part in parts.values()] == [2, 2, 2, 1]
    wanted = torch.cat([by_hand(parts["background"]), by_hand(parts["0"]), by_hand(parts["1"])], dim=1)
    torch.testing.assert_close(found.logits, wanted)
    torch.testing.assert_close(found.auxiliary["unknown"], by_hand(parts["unknown"]))
    assert list(found.features) == ["head0", "head1"]
    torch.testing.assert_close(parts["1"].classifier(found.features["head1"]), found.logits[:, 3:])
    assert background_layer(head) is parts["background"].classifier


def test_a_constant_background_has_logit_0_and_detached_outputs_send_no_gradient():
    head = bare(DKD)
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    found = head(x)
    assert found.logits.shape[1] == head.num_classes == 3
    assert not found.logits[:, 0].any()
    assert head.classifiers[0].out_channels == 2
    (grad,) = torch.autograd.grad(found.auxiliary["auxiliary"].sum(), x, allow_unused=True)
    assert grad is None
    assert torch.autograd.grad(found.logits.sum(), x)[0].any()
    with pytest.raises(ConfigError, match="constant"):
        background_layer(head)


def test_outputs_beside_the_classes_stand_side_by_side():
    head = bare(*KINDS["barm"])
    x = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    found = head(x)
    assert found.logits.shape[1] == 6
    raw = [part(x) for part in head.classifiers]
    assert [maps.shape[1] for maps in raw] == [3, 3, 2]
    assert torch.equal(found.auxiliary["residual"], torch.cat([raw[1][:, :1], raw[2][:, :1]], dim=1))
    assert torch.equal(found.logits, torch.cat([raw[0], raw[1][:, 1:], raw[2][:, 1:]], dim=1))


def test_growths_take_over_reserved_classifiers():
    head = bare(Head(reserve=(2, 1)))
    x = torch.randn(1, 3, 2, 2, dtype=torch.float64)
    first = head(x)
    assert first.auxiliary["future"].shape[1] == 3
    with pytest.raises(ConfigError) as error:
        head.grow(1)
    must_say(error.value, "2 classes", "1")
    head.grow(2)
    second = head(x)
    assert torch.equal(second.logits[:, 3:], first.auxiliary["future"][:, :2])
    assert torch.equal(second.auxiliary["future"], first.auxiliary["future"][:, 2:])
    head.grow(1)
    assert head(x).auxiliary == {}


def test_an_expansion_takes_the_place_of_the_classifiers():
    model = network([Head(expansion=7)])
    assert run(model).logits.any()
    model.restructure(EXPAND)
    model.grow({"a": 2})
    head = model.head("a")
    output = run(model)
    assert not output.logits.any()
    with torch.no_grad():
        for layer in head.classifiers:
            layer.weight.normal_()
    seen = torch.relu(F.conv2d(output.features["decoder"], head.expansion.weight))
    wanted = torch.cat([F.conv2d(seen, layer.weight) for layer in head.classifiers], dim=1)
    assert torch.equal(head(output.features["decoder"]).logits, wanted)
    model.freeze()  # trains everything else
    assert not any(weight.requires_grad for weight in head.parameters())
    assert next(model.encoder.parameters()).requires_grad


@pytest.mark.parametrize("kind", KINDS)
def test_a_description_rebuilds_the_model_strictly(kind):
    model = network(KINDS[kind], last_conv=kind == "dkd").eval()
    if kind == "acil":
        model.restructure(EXPAND)
    described = json.loads(json.dumps(model.describe()))
    again = from_description(described)
    again.load_state_dict(model.state_dict(), strict=True)
    assert again.describe() == described
    sizes = [3, 2, 1][: len(KINDS[kind])]
    assert sizes_of(described["growth"]) == [{"a": size} for size in sizes]
    assert model.head("a").sizes == tuple(sizes)
    ours, theirs = run(model), run(again.eval())
    assert torch.equal(ours.logits, theirs.logits)
    assert ours.auxiliary.keys() == theirs.auxiliary.keys()
    assert all(torch.equal(ours.auxiliary[name], theirs.auxiliary[name]) for name in ours.auxiliary)


def test_plain_growth_is_described_as_before():
    assert network(KINDS["plain"]).describe()["growth"] == [{"a": 3}, {"a": 2}]
    assert not {"dropout", "last_conv", "encoder_momentum"} & network([Head()]).describe()["options"].keys()


@pytest.mark.parametrize(
    "entry",
    [
        "three",
        2.0,
        {"classes": 2},
        {"classes": "2", "head": {}},
        {"classes": 2, "head": {"width": 3}},
        {"classes": 2, "head": {"hidden": 0}},
        {"classes": 2, "head": {"auxiliary": {"unknown": -1}}},
        {"classes": 2, "head": {"background": "none"}},
        {"classes": 2, "head": {"kind": "nobody knows"}},
        {"classes": 2, "head": {"detached": ["unknown"]}},
        {"classes": 2, "head": {"auxiliary": {"keys": 1}}},
        {"classes": 1, "head": {"background": "own"}},
    ],
)
def test_a_description_with_another_head_is_refused(entry):
    described = {**network([]).describe(), "growth": [{"a": entry}]}
    with pytest.raises(CheckpointError):
        from_description(described)


def test_a_head_reads_back_what_it_wrote():
    every = Head(
        kind="x", hidden=3, background="own", auxiliary={"u": 2}, beside={"r": 1}, detached=("u",), reserve=(2,),
        expansion=4,
    )  # fmt: skip
    for head in (every, Head(), SSUL, DKD):
        assert Head.of_json(json.loads(json.dumps(head.to_json()))) == head
    assert Growth(3).to_json() == 3
    assert Growth.of_json(json.loads(json.dumps(Growth(3, SSUL).to_json()))) == Growth(3, SSUL)


def test_what_belongs_to_the_first_growth_is_refused_later_and_changes_nothing():
    model = network([SSUL])
    for head in (SSUL, Head(reserve=(1,)), Head(auxiliary={"unknown": 1}), Head(auxiliary={"background": 1})):
        with pytest.raises(ConfigError, match="branch 'a'"):
            model.grow({"b": 2, "a": 1}, heads={"a": head})
    assert model.branches == ("a",)
    assert len(model.growth) == 1


def test_the_newest_classifier_starts_from_another_part():
    head = network(KINDS["ssul"]).head("a")
    parts = head.parts
    with torch.no_grad():
        parts["unknown"].norm.running_mean.fill_(3)
        parts["unknown"].norm.weight.fill_(2)
    start_from(head, "unknown")
    x = torch.randn(2, 6, 4, 4)
    found = head.eval()(x)
    assert torch.equal(found.logits[:, 3:], found.auxiliary["unknown"][:, :1].expand(-1, 2, -1, -1))
    start_from(head, "0", statistics=False)
    assert parts["1"].norm.running_mean.eq(3).all()  # as it was
    assert torch.equal(parts["1"].conv.weight, parts["0"].conv.weight)
    with pytest.raises(ConfigError, match="'3'"):
        start_from(head, "3")


def test_a_copied_trunk_leaves_the_classifier_and_fresh_statistics():
    head = network(KINDS["barm"][:2]).head("a")
    parts = head.parts
    with torch.no_grad():
        parts["0"].norm.running_var.fill_(9)
        parts["0"].norm.bias.fill_(2)
    kept = parts["1"].classifier.weight.clone()
    copy_trunk(head, "0", statistics=False)
    assert parts["1"].norm.running_var.eq(1).all()
    assert parts["1"].norm.bias.eq(2).all()
    assert torch.equal(parts["1"].conv.weight, parts["0"].conv.weight)
    assert torch.equal(parts["1"].classifier.weight, kept)
    plain = bare(SSUL, Head())
    with pytest.raises(ConfigError, match="trunks"):
        copy_trunk(plain, "unknown")
    copy_trunk(bare(Head(), Head()), "0")  # nothing to copy


def test_rows_ahead_of_the_classes_keep_their_fresh_weights():
    head = bare(Head(hidden=5), BARM)
    kept = head.classifiers[1].classifier.weight[:1].clone()
    start_from(head, "0")
    assert torch.equal(head.classifiers[1].classifier.weight[:1], kept)
    assert torch.equal(
        head.classifiers[1].classifier.weight[1:],
        head.classifiers[0].classifier.weight[:1].expand(2, -1, -1, -1),
    )


def trainable(model: SegmentationModel) -> set[str]:
    return {name for name, part in model.head("a").parts.items() if last_layer(part).weight.requires_grad}


def test_parts_freeze_by_number_or_by_name():
    model = network(KINDS["ssul"])
    model.freeze(heads={"a": 1})
    assert trainable(model) == {"1", "unknown"}  # an own background belongs to the first classifier
    model.freeze(heads={"a": ("0", "unknown")})
    assert trainable(model) == {"1", "background"}
    model.train()
    norms = {name: part.norm.training for name, part in model.head("a").parts.items()}
    assert norms == {"0": False, "1": True, "unknown": False, "background": True}
    model.freeze(heads={"a": 0})
    assert trainable(model) == {"0", "1", "unknown", "background"}
    for wrong in (3, -1, ("nobody",)):
        with pytest.raises(ConfigError, match="branch 'a'"):
            model.freeze(heads={"a": wrong})


def test_frozen_norms_include_those_of_heads_and_dropout_is_frozen_apart():
    model = network(KINDS["ssul"], dropout=0.3)
    model.freeze(encoder=True, decoder=True, norm=True)
    model.train()
    norm = model.head("a").parts["1"].norm
    assert not norm.training
    assert not norm.weight.requires_grad
    assert model.decoder.dropout.training
    model.freeze(dropout=True)
    model.train()
    assert not model.decoder.dropout.training
    assert model.head("a").parts["1"].norm.training


def test_groups_take_each_weight_once():
    model = network(KINDS["ssul"])
    model.freeze(encoder=True)
    head = model.head("a")
    newest, unknown = head.parts[head.newest], head.parts["unknown"]
    groups = groups_of(model, (newest, 1.0), ([unknown, newest], 0.5, 0.0), (model.encoder, 0.1))
    assert [(group["lr_scale"], group.get("weight_decay")) for group in groups] == [
        (1.0, None), (0.5, 0.0), (1.0, None)
    ]  # fmt: skip
    assert {id(p) for p in groups[1]["params"]} == {id(p) for p in unknown.parameters()}
    given = [id(p) for group in groups for p in group["params"]]
    assert sorted(given) == sorted(id(p) for p in model.parameters() if p.requires_grad)


def test_a_folded_copy_folds_trunks_and_the_last_convolution():
    model = network(KINDS["ssul"], last_conv=True)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
    folded = folded_copy(model)
    assert isinstance(folded.head("a").parts["1"].norm, nn.Identity)
    assert isinstance(folded.decoder.last_norm, nn.Identity)
    torch.testing.assert_close(run(folded).logits, run(model.eval()).logits, rtol=1e-4, atol=1e-4)


def test_mibs_initialisation_is_refused_where_heads_are_of_another_kind():
    for kind in ("ssul", "dkd", "star", "barm"):
        with pytest.raises(ConfigError):
            init_from_background(network(KINDS[kind]), "a")
    plain = network(KINDS["plain"])
    init_from_background(plain, "a")
    first, second = plain.head("a").classifiers
    assert torch.equal(second.weight[0], first.weight[0])


def test_the_decoders_last_convolution_is_behind_its_dropout():
    model = network([Head()], last_conv=True, dropout=0.5)
    decoder = model.decoder.train()
    maps = {"encoder": torch.randn(2, 8, 8, 8)}
    torch.manual_seed(1)
    found = decoder(maps)
    decoder.last_conv, kept = None, (decoder.last_conv, decoder.last_norm)
    torch.manual_seed(1)
    inner = decoder(maps)
    assert (inner == 0).float().mean() > 0.4
    torch.testing.assert_close(found, torch.relu(kept[1](kept[0](inner))))
    with pytest.raises(ConfigError, match="dropout"):
        network([Head()], dropout=1.0)


def test_the_encoders_norms_have_their_own_momentum():
    model = network(KINDS["ssul"], encoder_momentum=0.01)
    momenta = {
        part: {m.momentum for m in module.modules() if isinstance(m, nn.BatchNorm2d)}
        for part, module in model.named_children()
    }
    assert momenta == {"encoder": {0.01}, "decoder": {0.1}, "heads": {0.1}}
    assert from_description(model.describe()).encoder.bn1.momentum == 0.01
    for wrong in ({"encoder_momentum": 0.0}, {"encoder_momentum": 0.01, "per_branch": "norm"}):
        with pytest.raises(ConfigError, match="encoder_momentum"):
            network([Head()], **wrong)
