"""Choosing a branch by the statistics of pooled features, where branches have no batch norms of their own."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from everseg.errors import CheckpointError, ConfigError
from everseg.models.branch_choice import branch_distances, features_of, infer_branch, needs_statistics
from everseg.models.domain_statistics import (
    MOST_FEATURES,
    SHRINKAGE,
    DomainStatistics,
    mahalanobis,
    of_tensors,
    pool,
    to_tensors,
)
from everseg.models.erfnet import erfnet
from everseg.models.model import SegmentationModel
from saying import must_say


def statistics(features: torch.Tensor) -> DomainStatistics:
    return DomainStatistics(
        len(features),
        features.mean(0),
        torch.from_numpy(np.cov(features.numpy().T, bias=True)).view(features.shape[1], -1),
    )


def drawn(count: int, width: int, seed: int, shift: float = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    return torch.randn(count, width, dtype=torch.float64, generator=generator) @ mixing + shift


def test_the_distance_is_mahalanobis_s_by_the_mean_covariance():
    """Recalculated by numpy's inverse."""
    domains = {"day": statistics(drawn(30, 4, 0)), "dusk": statistics(drawn(10, 4, 1, 2.0))}
    features = drawn(5, 4, 2)
    within = (30 * domains["day"].covariance + 10 * domains["dusk"].covariance).numpy() / 40
    within = (1 - SHRINKAGE) * within + SHRINKAGE * np.diag(within.diagonal())
    inverse = np.linalg.inv(within)
    wanted = [
        [float(gap @ inverse @ gap) / 4 for one in domains.values() for gap in [(x - one.mean).numpy()]]
        for x in features
    ]
    assert mahalanobis(features, domains).tolist() == [pytest.approx(row, rel=1e-4) for row in wanted]


def test_a_feature_that_never_changes_decides_nothing_and_few_images_do_no_harm():
    day, dusk = drawn(40, 6, 0), drawn(3, 6, 1, 3.0)
    day[:, 2] = dusk[:, 2] = 1.0
    domains = {"day": statistics(day), "dusk": statistics(dusk)}
    found = mahalanobis(torch.cat([day, dusk]), domains)
    assert found.isfinite().all()
    assert found.argmin(1).tolist() == [0] * 40 + [1] * 3
    alone = mahalanobis(day, {"day": statistics(torch.ones(1, 6, dtype=torch.float64))})
    assert alone.isfinite().all()


def test_joined_they_are_those_of_all_images():
    one, other = drawn(7, 3, 0), drawn(12, 3, 1, 1.5)
    found, wanted = statistics(one).joined(statistics(other)), statistics(torch.cat([one, other]))
    assert found.count == 19
    torch.testing.assert_close(found.mean, wanted.mean)
    torch.testing.assert_close(found.covariance, wanted.covariance)


def test_features_are_means_and_deviations_and_not_too_many():
    map = torch.rand(2, 3, 4, 5)
    wanted = np.concatenate([map.numpy().mean((2, 3)), map.numpy().std((2, 3))], 1)
    np.testing.assert_allclose(pool(map).numpy(), wanted, rtol=1e-5)
    assert pool(torch.rand(2, MOST_FEATURES, 1, 2)).shape == (2, MOST_FEATURES)


# ---------------------------------------------------------------- models


def images(branch: str, count: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mean, spread = {"day": (0.7, 0.2), "dusk": (0.4, 0.1), "night": (0.1, 0.05)}[branch]
    return mean + spread * torch.randn(count, 3, 32, 48, generator=generator)


def measured(per_branch: str) -> SegmentationModel:
    torch.manual_seed(0)
    model = erfnet(per_branch=per_branch, widths=(6, 8, 12), blocks=(1, 1), dropout=(0, 0))
    for branch in ("day", "dusk", "night"):
        model.grow({branch: 2}, init_from=model.branches[-1] if model.branches else None)
    for branch in model.branches:
        model.domain_statistics[branch] = statistics(features_of(model, images(branch, 20, 1)))
    return model


@pytest.mark.parametrize("per_branch", ["head", "decoder"])
def test_every_image_finds_the_branch_of_its_domain(per_branch):
    model = measured(per_branch).train()
    assert needs_statistics(model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    mixed = ["night", "day", "dusk", "day", "night"]
    image = torch.cat([images(branch, 1, 1000 + i) for i, branch in enumerate(mixed)])
    assert infer_branch(model, image) == mixed
    assert branch_distances(model, image).shape == (5, 3)
    assert infer_branch(model, image, ("dusk", "night")) == ["night", "dusk", "dusk", "dusk", "night"]
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_batch_norms_of_a_branch_s_own_need_none():
    assert not needs_statistics(measured("norm"))


def test_without_statistics_of_a_branch_there_is_no_choice():
    model = measured("head")
    del model.domain_statistics["dusk"]
    with pytest.raises(ConfigError) as caught:
        infer_branch(model, images("day", 1, 0))
    must_say(caught.value, "dusk", "batch norms")
    assert infer_branch(model, images("day", 1, 0), ("day", "night")) == ["day"]
    model.domain_statistics = {name: statistics(drawn(9, 5, 0)) for name in model.branches}
    with pytest.raises(ConfigError) as caught:
        infer_branch(model, images("day", 1, 0))
    must_say(caught.value, 5, 12)


# ---------------------------------------------------------------- stored

GOOD = {"day": statistics(drawn(30, 4, 0)), "dusk/2": statistics(drawn(10, 4, 1))}


def test_they_are_read_as_they_were_written():
    found = of_tensors(to_tensors(GOOD), ("dusk/2", "day", "fog"), "file")
    assert found.keys() == GOOD.keys()
    for branch, one in found.items():
        assert one.count == GOOD[branch].count
        assert torch.equal(one.mean, GOOD[branch].mean)
        assert torch.equal(one.covariance, GOOD[branch].covariance)


def test_statistics_of_a_constant_are_a_covariance_too():
    same = statistics(torch.full((4, 3), 1e6, dtype=torch.float64))
    assert of_tensors(to_tensors({"day": same}), ("day",), "file")


@pytest.mark.parametrize(
    ("name", "value", "fact"),
    [
        ("day.count", torch.tensor(0), "count"),
        ("day.count", torch.tensor([3]), "count"),
        ("day.count", torch.tensor(3.0), "count"),
        ("day.mean", torch.zeros(4), "mean"),
        ("day.mean", torch.zeros(MOST_FEATURES + 1, dtype=torch.float64), "mean"),
        ("day.mean", torch.full((4,), torch.nan, dtype=torch.float64), "finite"),
        ("day.covariance", torch.zeros(4, 5, dtype=torch.float64), "covariance"),
        ("day.covariance", -torch.eye(4, dtype=torch.float64), "covariance"),
        ("day.covariance", torch.triu(torch.ones(4, 4, dtype=torch.float64)), "symmetric"),
        ("day.further", torch.zeros(1), "count"),
        ("fog.mean", torch.zeros(4), "'fog'"),
        ("mean", torch.zeros(4), "''"),
    ],
)
def test_a_file_of_anything_else_is_damaged(name, value, fact):
    with pytest.raises(CheckpointError) as caught:
        of_tensors({**to_tensors(GOOD), name: value}, ("day", "dusk/2"), "the file")
    must_say(caught.value, "damaged", fact)


def test_all_faults_are_told_and_branches_need_the_same_features():
    other = to_tensors({"day": GOOD["day"], "dusk/2": statistics(drawn(10, 3, 1))})
    with pytest.raises(CheckpointError) as caught:
        of_tensors(other, ("day", "dusk/2"), "the file")
    must_say(caught.value, "unequal")
    with pytest.raises(CheckpointError) as caught:
        of_tensors({"fog.x": torch.zeros(1), "day.mean": torch.zeros(2)}, ("day",), "the file")
    must_say(caught.value, "'fog'", "'day'")
