"""New convolutions beside old ones: how they are built, combined, merged, folded, stored and read."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.testing import assert_close

from everseg.errors import CheckpointError, ConfigError
from everseg.interop import mib
from everseg.models.blocks import synchronise_norms
from everseg.models.build import deeplabv3, from_description
from everseg.models.compensation import (
    MERGE,
    MERGE_EXACTLY,
    combine,
    compensated,
    forget_eps,
    recall_eps,
)
from everseg.models.folding import folded_copy
from everseg.models.model import SegmentationModel, frozen_copy
from everseg.models.pretrained import load_encoder_weights

SMALL = {"stem": 4, "widths": (4, 4, 6, 8), "hidden": 4, "out_channels": 6}
KINDS = {"bottleneck": (1, 2, 1, 1), "basic": (1, 1, 2, 1)}


def build(kind: str = "bottleneck", norm: str = "iabn", **options) -> SegmentationModel:
    torch.manual_seed(0)
    model = deeplabv3(
        blocks=KINDS[kind], bottleneck=kind == "bottleneck", norm=norm, compensation=True, **SMALL, **options
    )
    model.grow({"a": 3})
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                module.weight.normal_()
                module.bias.normal_()
                module.running_mean.normal_()
                module.running_var.uniform_(0.5, 2)
    return model.double()


def image() -> torch.Tensor:
    return torch.randn(2, 3, 64, 48, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


def logits(model: SegmentationModel) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(image())["a"].logits


def only_old(model: SegmentationModel) -> SegmentationModel:
    for module in compensated(model):
        module.combined = lambda old, new: old
    return model


def test_a_third_of_the_draws_each_takes_old_new_or_the_mean():
    old, new = torch.zeros(2, 7, 1, 1), torch.ones(2, 7, 1, 1)
    draws = torch.tensor([0.0, 0.3299, 0.3301, 0.6599, 0.6601, 0.999, 0.5])
    for output in combine(old, new, draws):
        assert output.flatten().tolist() == [0, 0, 1, 1, 0.5, 0.5, 1]
    assert (combine(old, new) == 0.5).all()
    model = build().train()
    unit = compensated(model)[0]
    taken = torch.stack([unit.combined(torch.zeros(1, 4, 2, 2), torch.ones(1, 4, 2, 2)) for _ in range(3000)])
    assert (taken[..., :1, :1] == taken).all(), "one draw per channel, for all cells"
    shares = [(taken[..., 0, 0] == value).double().mean().item() for value in (0, 1, 0.5)]
    assert shares == pytest.approx([0.33, 0.33, 0.34], abs=0.02)


def test_draws_follow_the_global_generator_and_eval_mode_draws_none():
    model = build().train()
    outputs = []
    for _ in range(2):
        torch.manual_seed(3)
        outputs.append(model(image())["a"].logits)
    assert torch.equal(*outputs)
    state = torch.get_rng_state()
    logits(model)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(("kind", "units"), [("bottleneck", 5), ("basic", 10)])
def test_new_convolutions_stand_beside_every_3x3_one_and_those_of_the_head(kind, units):
    model = build(kind)
    assert sum(len(module.units) for module in compensated(model)) == units + 1
    spatial = [
        n for n, m in model.encoder.named_modules() if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)
    ]
    assert {n for n in spatial if not n.endswith("_new")} == {
        n.removesuffix("_new") for n in spatial if "_new" in n
    }
    assert isinstance(model.encoder.act, nn.Identity), "the authors' stem has no activation"
    assert len(model.decoder.aspp_new) == 4


def test_other_networks_have_no_such_parts_and_the_description_they_had():
    model = deeplabv3(**SMALL)
    assert "compensation" not in model.description["options"]
    assert compensated(model) == []
    with pytest.raises(ConfigError, match=MERGE):
        model.restructure(MERGE)


@pytest.mark.parametrize("per_branch", ["decoder", "norm", "adapter"])
def test_convolutions_that_a_branch_owns_cannot_be_merged(per_branch):
    with pytest.raises(ConfigError, match="per_branch 'head' only"):
        deeplabv3(compensation=True, per_branch=per_branch, **SMALL)


@pytest.mark.parametrize("change", [MERGE, MERGE_EXACTLY])
@pytest.mark.parametrize("norm", ["iabn", "abn", "bn"])
@pytest.mark.parametrize("kind", KINDS)
def test_after_a_merge_the_old_convolutions_alone_are_the_function_of_before(kind, norm, change):
    model = build(kind, norm)
    for _ in range(3):
        before = logits(frozen_copy(model))
        model.restructure(change)
        if change == MERGE:
            forget_eps(model)
        alone = logits(only_old(frozen_copy(model)))
        assert_close(alone, before, rtol=1e-11, atol=1e-11)
        assert not torch.allclose(logits(frozen_copy(model)), before, rtol=1e-3)
        with torch.no_grad():  # as if a step had trained the new ones
            for module in compensated(model):
                for weight in module.parameters():
                    weight.add_(0.1 * torch.randn_like(weight)) if weight.requires_grad else None
        if change == MERGE:
            recall_eps(model)


def test_eps_of_an_official_merge_comes_back_with_the_file():
    model = build()
    model.restructure(MERGE)
    forget_eps(model)
    at_once = logits(only_old(frozen_copy(model)))
    read = from_description(model.describe()).double()
    read.load_state_dict(model.state_dict(), strict=True)
    read = logits(only_old(read))
    gap = ((read - at_once).norm() / at_once.norm()).item()
    assert 1e-7 < gap < 1e-3
    recall_eps(model)
    assert torch.equal(logits(only_old(frozen_copy(model))), read)


@pytest.mark.parametrize("change", [MERGE, MERGE_EXACTLY])
def test_a_described_model_is_rebuilt_with_its_merges_and_loads_strictly(change):
    model = build()
    for classes in (2, 1):
        model.grow({"a": classes})
        model.restructure(change)
    model.double()
    again = from_description(model.describe()).double()
    again.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(logits(again), logits(model))
    assert again.describe() == model.describe()
    again.train()
    assert not any(part.training for module in compensated(again) for part in module.constant)


@pytest.mark.parametrize("merges", [(), (MERGE,), (MERGE, MERGE), (MERGE_EXACTLY, MERGE_EXACTLY)])
@pytest.mark.parametrize("norm", ["iabn", "bn"])
def test_a_folded_copy_has_one_convolution_for_both_and_is_the_same_function(norm, merges):
    model = build(norm=norm)
    for change in merges:
        model.restructure(change)
    folded = folded_copy(model)
    assert compensated(folded) == []
    assert not any("_new" in name for name in folded.state_dict())
    assert_close(logits(folded), logits(model), rtol=1e-10, atol=1e-10)
    assert compensated(model), "the model itself is left alone"


def test_synchronised_norms_stay_constant_once_merged():
    model = build()
    model.restructure(MERGE)
    forget_eps(model)
    expected = logits(model)
    model = synchronise_norms(model)
    assert torch.equal(logits(model), expected)
    model.train()
    norms = [
        part for module in compensated(model) for part in module.constant if isinstance(part, _BatchNorm)
    ]
    assert norms
    assert all(isinstance(part, nn.SyncBatchNorm) and not part.training for part in norms)


def test_pretrained_weights_fill_both_convolutions(tmp_path):
    plain = deeplabv3(blocks=KINDS["bottleneck"], **SMALL)
    file = tmp_path / "weights.pth"
    torch.save(plain.encoder.state_dict(), file)
    torch.manual_seed(9)
    model = deeplabv3(blocks=KINDS["bottleneck"], compensation=True, **SMALL)
    load_encoder_weights(model, str(file))
    state = model.encoder.state_dict()
    for name, value in plain.encoder.state_dict().items():
        assert torch.equal(state[name], value), name
    new = [name for name in state if "_new" in name]
    assert new
    assert all(torch.equal(state[name], state[name.replace("_new", "")]) for name in new)


@pytest.mark.parametrize("merges", [0, 2])
def test_checkpoints_in_the_authors_names_are_written_and_read(merges):
    model = build(pool_size=32)
    for _ in range(merges):
        model.restructure(MERGE)
    state = mib.dump(model.double())
    assert ("module.body.mod2.block1.convs.conv2.bias" in state) is bool(merges)
    assert {"module.body.mod2.block1.convs.bn2_new.running_var", "module.head.map_convs_new.3.weight"} <= set(
        state
    )
    again = mib.load(state, branch="a")
    assert_close(logits(again), logits(model), rtol=1e-12, atol=1e-12)
    del state["module.head.map_bn_new.bias"]
    with pytest.raises(CheckpointError, match="map_bn_new"):
        mib.load(state)
