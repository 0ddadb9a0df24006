"""Descriptions of models that lie: no more memory than the weights hold, no network, no weights that are no numbers."""

from __future__ import annotations

import resource
import socket
import time
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from everseg.deploy.bundle import Contents, write_bundle
from everseg.errors import CheckpointError
from everseg.labels import LabelSpace
from everseg.models.adapters.elsewhere import from_elsewhere
from everseg.models.build import deeplabv3_tiny, erfnet, from_description
from everseg.models.stored import NetworkRefusedError, Sizes, TooLargeError, no_network, within
from everseg.runs.model_edits import own_norms
from everseg.runs.model_folder import load_model

TINY = {"widths": [8, 8, 8, 8], "hidden": 8, "norm": "bn"}
SMALL = Sizes(200, 60_000)
HUGE: dict[str, dict[str, Any]] = {
    "widths": {"widths": [8, 8, 8, 10**6]},
    "one width": {"widths": [8, 8, 10**12, 8]},
    "widths that multiply": {"widths": [20_000] * 4},
    "blocks": {"blocks": [10**9, 1, 1, 1]},
    "hidden": {"hidden": 10**9},
    "outputs of the head": {"out_channels": 10**8},
    "stem": {"stem": 10**10},
    "rates": {"rates": list(range(1, 20_000))},
    "channels": {"in_channels": 4096, "widths": [4096] * 4},
    "a list of huge numbers": {"rates": [6, 12, 10**7]},
    "per branch": {"widths": [512] * 4, "per_branch": "adapter"},
}


def described(**changes: Any) -> dict[str, Any]:
    return {"name": "deeplabv3-tiny", "options": {**TINY, **changes}, "growth": [{"default": 2}]}


@pytest.mark.parametrize("case", HUGE)
def test_a_network_larger_than_its_weights_is_refused_before_it_takes_memory(case: str) -> None:
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises(CheckpointError):
        from_description(described(**HUGE[case]), sizes=SMALL)
    assert own_norms(described(**{**HUGE[case], "per_branch": "head"}), SMALL) is None
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    assert grown < 200, f"{grown:.0f} MB"
    assert time.process_time() - start < 5


@pytest.mark.parametrize(
    "growth", [[{"default": 10**12}], [{"default": 1}] * 5000, [{f"b{i}": 1} for i in range(5000)]]
)
def test_so_is_a_growth(growth: list[dict[str, int]]) -> None:
    with pytest.raises(CheckpointError):
        from_description({**described(), "growth": growth}, sizes=SMALL)


@pytest.mark.parametrize("make", [lambda: deeplabv3_tiny(**TINY), erfnet])
def test_an_honest_network_is_built_to_the_same_weights(make: Callable[[], Any]) -> None:
    model = make()
    model.grow({"default": 3})
    sizes, description = Sizes.of(model.state_dict()), model.describe()
    torch.manual_seed(3)
    free = from_description(description).state_dict()
    torch.manual_seed(3)
    bound = from_description(description, sizes=sizes).state_dict()
    assert free.keys() == bound.keys()
    assert all(torch.equal(free[name], bound[name]) for name in free)


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Linear(10**6, 10**6),
        lambda: torch.zeros(10**9),
        lambda: torch.rand(10**5, 10**5),
        lambda: torch.arange(10**5)[:, None] + torch.arange(10**5)[None],
        lambda: torch.stack(torch.meshgrid(torch.arange(10**5), torch.arange(10**5), indexing="ij")),
        lambda: torch.linspace(0, 1, 10**10),
        lambda: [nn.Linear(1, 1) for _ in range(10**7)],
    ],
)
def test_every_way_to_ask_for_memory_is_seen(make: Callable[[], object]) -> None:
    with pytest.raises(TooLargeError), within(Sizes(10, 1000)):
        make()
    nn.Linear(2, 2)  # and nothing is watched afterwards


@pytest.fixture
def bundle(tmp_path: Path) -> Callable[[Callable[[Mapping[str, torch.Tensor]], object]], Path]:
    def make(change: Callable[[Mapping[str, torch.Tensor]], object]) -> Path:
        model = deeplabv3_tiny(**TINY)
        model.grow({"default": 2})
        change(model.state_dict())
        space = LabelSpace(((0, 1),), ("background", "road"))
        return write_bundle(tmp_path / "bundle", Contents(model.eval(), {"default": space}), onnx=False).path

    return make


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_no_numbers_are_refused(bundle: Callable[..., Path], number: float) -> None:
    def spoil(state: Mapping[str, torch.Tensor]) -> None:
        next(iter(state.values())).view(-1)[0] = number

    with pytest.raises(CheckpointError, match="not finite"):
        load_model(bundle(spoil))


# ---------------------------------------------------------------- the network of computers


@pytest.mark.parametrize(
    "reach",
    [
        lambda: socket.create_connection(("127.0.0.1", 9)),
        lambda: socket.getaddrinfo("huggingface.co", 443),
        lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b"x", ("127.0.0.1", 9)),
        lambda: urllib.request.urlopen("http://127.0.0.1:9/"),
    ],
)
def test_nothing_reaches_another_machine_while_a_stored_model_is_built(reach: Callable[[], object]) -> None:
    with pytest.raises(NetworkRefusedError), no_network(), no_network():
        reach()
    with socket.create_server(("127.0.0.1", 0)) as server:
        socket.create_connection(server.getsockname()).close()  # and afterwards everything is as before


def test_a_builder_that_reaches_for_the_network_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def curious(**_: Any) -> Any:
        socket.create_connection(("127.0.0.1", 9))

    monkeypatch.setitem(from_description.__globals__["ARCHITECTURES"], "curious", curious)
    with pytest.raises(CheckpointError, match="may fetch nothing"):
        from_description({"name": "curious", "options": {}, "growth": []})


@pytest.mark.parametrize(
    "config",
    [
        {"backbone": "org/repo"},
        {"a": {"b": [{"backbone": "org/repo"}]}},
        {"use_pretrained_backbone": True},
        {"auto_map": {"AutoModel": "org/repo--x.Y"}},
        {"_attn_implementation": "org/kernels"},
        {"backbone_config": {"attn_implementation": "org/kernels"}},
    ],
)
def test_entries_that_fetch_something_are_found_at_any_depth(config: dict[str, Any]) -> None:
    assert from_elsewhere(config)
    assert not from_elsewhere({"backbone": None, "hidden_sizes": [1, 2], "attn_implementation": "sdpa"})


SEGFORMER = {
    "model_type": "segformer", "hidden_sizes": [8] * 4, "depths": [1] * 4, "num_attention_heads": [1] * 4,
    "decoder_hidden_size": 8,
}  # fmt: skip
NETWORK = {"classifier": "decode_head.classifier", "channels": 8}


@pytest.mark.parametrize(
    "entry",
    [
        {"backbone": "org/repo"},
        {
            "backbone_config": {
                "model_type": "timm_backbone",
                "backbone": "resnet18",
                "use_pretrained_backbone": True,
            }
        },
        {"auto_map": {"AutoConfig": "org/repo--a.B"}},
    ],
)
def test_a_configuration_of_transformers_names_no_repository(entry: dict[str, Any]) -> None:
    pytest.importorskip("transformers")
    options = {"config": {**SEGFORMER, **entry}, **NETWORK}
    with pytest.raises(CheckpointError, match="elsewhere"):
        from_description({"name": "transformers", "options": options, "growth": []})


def test_a_configuration_of_transformers_keeps_the_entries_of_its_type_alone() -> None:
    pytest.importorskip("transformers")
    options = {"config": {**SEGFORMER, "_commit_hash": "x", "unheard_of": "org/repo"}, **NETWORK}
    network = from_description({"name": "transformers", "options": options, "growth": []})
    assert not hasattr(network.encoder.network.config, "unheard_of")
    huge = {"config": {**SEGFORMER, "hidden_sizes": [10**6] * 4}, **NETWORK}
    with pytest.raises(CheckpointError):
        from_description({"name": "transformers", "options": huge, "growth": []}, sizes=SMALL)
    deep = {"config": {**SEGFORMER, "depths": [10**7, 1, 1, 1]}, **NETWORK}
    with pytest.raises(CheckpointError):
        from_description({"name": "transformers", "options": deep, "growth": []}, sizes=SMALL)
