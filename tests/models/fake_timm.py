"""A stand-in with timm's feature interface, which needs no torchvision."""

from __future__ import annotations

import itertools
import types

from torch import nn


class Net(nn.Module):
    """Five stages of stride 2, as timm's `features_only` networks: a list of maps, `feature_info`, `output_fmt`."""

    def __init__(
        self, out_indices=(0, 1, 2, 3, 4), width: int = 4, channels_last: bool = False, in_chans=3
    ) -> None:
        super().__init__()
        self.out_indices = out_indices
        self.output_fmt = types.SimpleNamespace(value="NHWC" if channels_last else "NCHW")
        widths = [in_chans, *(width * (k + 1) for k in range(5))]
        self.stages = nn.ModuleList(nn.Conv2d(a, b, 3, 2, 1) for a, b in itertools.pairwise(widths))
        self.feature_info = types.SimpleNamespace(reduction=lambda: [2 << i for i in out_indices])

    def forward(self, x):
        maps = []
        for stage in self.stages:
            x = stage(x).relu()
            maps.append(x.permute(0, 2, 3, 1) if self.output_fmt.value == "NHWC" else x)
        return [maps[i] for i in self.out_indices]


class Timm(types.ModuleType):
    """What the adapter uses of timm."""

    def __init__(self) -> None:
        super().__init__("timm")
        self.calls: list[dict] = []

    @staticmethod
    def is_model(name: str) -> bool:
        return name in ("toynet", "swinny")

    @staticmethod
    def get_pretrained_cfg(name: str):
        known = {"toynet.in1k": "timm/", "toynet": None, "toynet.mine": None}
        return types.SimpleNamespace(
            hf_hub_id=known.get(name), classifier="fc", mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25)
        )

    @staticmethod
    def model_entrypoint(name: str):
        return Net  # only its module is looked at

    def create_model(
        self, name, pretrained=False, features_only=False, pretrained_cfg_overlay=None, **kwargs
    ):
        self.calls.append({"name": name, "pretrained": pretrained, **kwargs})
        assert features_only
        net = Net(**kwargs, channels_last=name == "swinny")
        if pretrained:  # strict, because num_classes agrees: as timm's load_pretrained
            assert pretrained_cfg_overlay["num_classes"] == 0
            net.load_state_dict(pretrained_cfg_overlay["state_dict"], strict=True)
        return net
