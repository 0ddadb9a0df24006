from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from everseg.errors import ConfigError
from everseg.models.blocks import BranchDict
from everseg.models.branch_choice import branch_distances, infer_branch
from everseg.models.erfnet import erfnet
from everseg.models.model import SegmentationModel


def small(per_branch: str) -> SegmentationModel:
    torch.manual_seed(0)
    model = erfnet(per_branch=per_branch, widths=(6, 8, 12), blocks=(1, 1), dropout=(0, 0))
    for branch in ("day", "dusk", "night"):
        model.grow({branch: 2}, init_from=model.branches[-1] if model.branches else None)
    return model


def images(branch: str, count: int, seed: int) -> torch.Tensor:
    """Images of a domain: its own brightness and contrast."""
    generator = torch.Generator().manual_seed(seed)
    mean, spread = {"day": (0.7, 0.2), "dusk": (0.4, 0.1), "night": (0.1, 0.05)}[branch]
    return mean + spread * torch.randn(count, 3, 32, 48, generator=generator)


def fed(model: SegmentationModel) -> SegmentationModel:
    model.train()
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            norm.momentum = None  # plain averages, whatever they started from
    for branch in model.branches:
        for seed in range(3):
            model(images(branch, 4, seed), (branch,))
    return model


@pytest.mark.parametrize("per_branch", ["norm", "adapter"])
def test_every_image_finds_the_path_fed_with_its_domain(per_branch):
    model = fed(small(per_branch))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    mixed = ["night", "day", "dusk", "day", "night"]
    image = torch.cat([images(branch, 1, 1000 + i) for i, branch in enumerate(mixed)])
    assert infer_branch(model, image) == mixed
    distances = branch_distances(model, image)
    assert distances.shape == (5, 3)
    assert distances.min() >= 0
    assert not distances.requires_grad
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(m._forward_pre_hooks for m in model.modules())


def test_only_the_named_branches_are_candidates_in_their_order():
    model = fed(small("norm")).eval()
    image = images("day", 2, 7)
    assert infer_branch(model, image, ("night", "dusk")) == ["dusk", "dusk"]
    every = branch_distances(model, image)
    assert torch.equal(branch_distances(model, image, ("night", "day")), every[:, [2, 0]])
    assert not model.training
    with pytest.raises(ConfigError, match="no branch 'noon'"):
        infer_branch(model, image, ("noon",))


def test_an_images_distance_does_not_depend_on_its_batch():
    model = fed(small("adapter")).double()
    image = torch.cat([images("day", 1, 3), images("night", 1, 4)]).double()
    alone = torch.cat([branch_distances(model, part) for part in image.split(1)])
    torch.testing.assert_close(branch_distances(model, image), alone)


class _Encoder(nn.Module):
    by_branch = True

    def __init__(self) -> None:
        super().__init__()
        self.norms = BranchDict(lambda: nn.BatchNorm2d(3, eps=0.5))

    def forward(self, image, branches):
        return {branch: {"only": self.norms[branch](image)} for branch in branches}


def test_the_distance_is_the_divergence_of_two_gaussians():
    decoder = nn.Identity()
    decoder.out_channels = 3
    model = SegmentationModel(_Encoder(), decoder)
    model.grow({"a": 1, "b": 1})
    model.encoder.norms["b"].running_mean.copy_(torch.tensor([0.0, 3.0, 0.0]))
    model.encoder.norms["b"].running_var.fill_(3.5)
    image = torch.tensor([1.0, -1.0]).expand(1, 3, 4, 2)  # mean 0, variance 1
    found = branch_distances(model, image)[0].tolist()
    # variances with eps: image 1.5, branch a 1.5, branch b 4; the second channel of b lies 3 away
    gauss = [(math.log(4 / 1.5) + (1.5 + gap) / 4 - 1) / 2 for gap in (0, 9, 0)]
    assert found == pytest.approx([0, sum(gauss) / 3], abs=1e-6)


@pytest.mark.parametrize("per_branch", ["head", "decoder"])
def test_a_model_without_norms_per_branch_in_the_encoder_is_refused(per_branch):
    with pytest.raises(ConfigError, match="no batch norms"):
        infer_branch(small(per_branch), torch.rand(1, 3, 32, 32))
