"""Comparison with the outputs of MDIL's own code (golden README, sections 5.2 to 5.4)."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from everseg.interop import mdil
from everseg.models.erfnet import erfnet
from everseg.models.model import SegmentationModel
from everseg.models.pretrained import erfnet_modules, load_encoder_weights

pytestmark = pytest.mark.golden
EXACT = 1e-10
SINGLE = 1e-4  # batch statistics of small maps enlarge the rounding of float32
CLASSES = {1: (5,), 2: (5, 5), 3: (5, 5, 7)}
BRANCHES = ("cs", "bdd", "idd")


@pytest.fixture(scope="module")
def values(golden: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("golden_util", golden / "golden_util.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def arrays(golden: Path) -> Mapping[str, np.ndarray]:
    with np.load(golden / "model_mdil_A.npz") as archive:
        return {name: archive[name] for name in archive.files if not name.startswith("state/")}


@pytest.fixture(scope="module")
def checkpoints(arrays, values) -> dict[int, dict[str, Tensor]]:
    """The original network's weights for 1, 2 and 3 domains, in its own names."""
    seed, gain = int(arrays["det_init_seed"]), float(arrays["det_init_gain"])
    found = {}
    for number in CLASSES:
        shapes = json.loads(str(arrays[f"nb{number}/shapes"]))
        assert list(shapes) == arrays[f"nb{number}/keys"].tolist()
        found[number] = {
            name: torch.from_numpy(np.array(values.det_tensor(name, shape, seed, gain)))
            for name, shape in shapes.items()
        }
    return found


def network(state: Mapping[str, Tensor], dtype: str = "f64") -> SegmentationModel:
    """The model of a checkpoint, without dropout as in the golden runs."""
    model = mdil.load(state, domains=BRANCHES[: len({n for n in state if n.endswith("output_conv.bias")})],
                      dropout=(0, 0))  # fmt: skip
    return model.double() if dtype == "f64" else model


def renamed(tensors: Mapping[str, Any], branches: tuple[str, ...]) -> dict[str, Any]:
    """Key tensors of ours by the original names."""
    back = {ours: theirs for theirs, ours in mdil.names(branches).items()}
    found = {}
    for name, value in tensors.items():
        module, _, leaf = name.rpartition(".")
        found[f"{back[module]}.{leaf}"] = value
    return found


def difference(ours: Tensor, theirs: np.ndarray) -> float:
    """Largest absolute difference over the largest absolute value of theirs."""
    assert tuple(ours.shape) == theirs.shape
    return float(np.abs(ours.detach().double().numpy() - theirs).max() / np.abs(theirs).max())


def stride_to(ours: Tensor, theirs: np.ndarray) -> Tensor:
    """Every n-th row and column, as some outputs are stored."""
    step = ours.shape[-1] // theirs.shape[-1]
    return ours[..., ::step, ::step]


@pytest.mark.parametrize("number", CLASSES)
def test_every_tensor_has_its_place(arrays, checkpoints, number):
    model = network(checkpoints[number])
    assert [head.num_classes for head in model.heads.values()] == list(CLASSES[number])
    expected = {1: 2_369_073, 2: 2_869_894, 3: 3_370_845}[number]
    assert model.parameter_count == expected == int(arrays[f"nb{number}/n_params"])
    own = renamed(model.state_dict(), model.branches)
    assert set(own) == set(arrays[f"nb{number}/keys"].tolist())
    sums = np.array([
        [float(v.double().sum()), float(v.double().square().sum()), v.numel()]
        for v in (own[name] for name in arrays[f"nb{number}/keys"])
    ])  # fmt: skip
    np.testing.assert_allclose(sums, arrays[f"nb{number}/sum_sqsum_numel"], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("dtype", ["f32", "f64"])
@pytest.mark.parametrize("number", CLASSES)
def test_evaluation_of_every_path(arrays, checkpoints, number, dtype):
    model = network(checkpoints[number], dtype).eval()
    image = torch.from_numpy(arrays["input/x"]).to(next(model.parameters()).dtype)
    with torch.no_grad():
        outputs = model(image)  # all paths in one forward
    limit = SINGLE if dtype == "f32" else EXACT
    for task, branch in enumerate(model.branches):
        logits = arrays[f"nb{number}/{dtype}/task{task}/logits_eval"]
        assert difference(stride_to(outputs[branch].logits, logits), logits) < limit
        if dtype == "f32":
            encoded = arrays[f"nb{number}/f32/task{task}/encoder_eval_s"]
            ours = outputs[branch].features["encoder"]
            assert ours.shape == (1, 128, 8, 16)
            assert difference(ours[:, :: ours.shape[1] // encoded.shape[1]], encoded) < limit


@pytest.mark.parametrize("dtype", ["f32", "f64"])
@pytest.mark.parametrize("number", CLASSES)
def test_training_moves_the_statistics_of_the_path_alone(arrays, checkpoints, number, dtype):
    for task in range(number):
        model = network(checkpoints[number], dtype).train()
        branch = model.branches[task]
        image = torch.from_numpy(arrays["input/x2"]).to(next(model.parameters()).dtype)
        key = f"nb{number}/{dtype}/task{task}"
        logits = arrays[f"{key}/logits_train_nodrop"]
        ours = model(image, (branch,))[branch].logits
        assert difference(stride_to(ours, logits), logits) < (SINGLE if dtype == "f32" else EXACT)
        state = renamed(model.state_dict(), model.branches)
        stored = {
            n.split("/after_train_fwd/")[1]: v for n, v in arrays.items() if n.startswith(f"{key}/after")
        }
        assert len(stored) == (6 if (number, dtype) == (3, "f64") else 0)
        for name, value in stored.items():
            assert difference(state[name], value) < EXACT, name


@pytest.mark.parametrize("task", range(3))
def test_logits_and_gradients_on_a_wide_image(arrays, values, checkpoints, task):
    """The image of golden `wide/`, large enough for dilation 16 to see more than padding."""
    seed, *shape = arrays["wide/input_seed_shape"].tolist()
    image = torch.from_numpy(values.det_image(shape, seed)).double()
    assert float(image.sum()) == float(arrays["wide/input_sum"])
    model = network(checkpoints[3])
    branch, key = BRANCHES[task], f"wide/task{task}"
    with torch.no_grad():
        logits = model.eval()(image, (branch,))[branch].logits
    assert difference(logits[..., ::4, ::4], arrays[f"{key}/logits_eval_s4"]) < EXACT
    logits = model.train()(image, (branch,))[branch].logits
    assert difference(logits[..., ::4, ::4], arrays[f"{key}/logits_train_nodrop_s4"]) < EXACT
    cotangent = values.det_image(tuple(logits.shape), int(arrays["det_init_seed"]) + 9) / 1024
    logits.backward(torch.from_numpy(cotangent).double())
    own = renamed(dict(model.named_parameters()), BRANCHES)
    for name, norm in zip(arrays[f"{key}/grad_names"].tolist(), arrays[f"{key}/grad_norm"], strict=True):
        grad = own[name].grad
        assert (-1.0 if grad is None else float(grad.norm())) == pytest.approx(norm, rel=1e-8, abs=1e-9), name
    taps = own["encoder.layers.10.conv3x1_2.weight"].grad.norm(dim=(0, 1))
    assert difference(taps, arrays[f"{key}/dil16_tapnorm"]) < EXACT


def test_a_new_domain_starts_from_the_previous_one(golden, checkpoints):
    transfer = json.loads((golden / "mdil_transfer.json").read_text())
    model = network(checkpoints[1], "f32")
    for step, branch in ((2, "bdd"), (3, "idd")):
        before = {n: v.clone() for n, v in renamed(model.state_dict(), model.branches).items()}
        model.grow({branch: CLASSES[3][step - 1]}, init_from=model.branches[-1])
        after = renamed(model.state_dict(), model.branches)
        expected = transfer[f"step{step}"]["source_of_key"]
        assert len(after) == transfer[f"step{step}"]["n_keys"]
        assert {f"module.{name}" for name in after} == set(expected)
        for name, value in after.items():
            source = expected[f"module.{name}"].removeprefix("module.")
            if source != "<init>":
                assert torch.equal(value, before[source]), name
            elif name.endswith(("running_mean", "num_batches_tracked")):
                assert not value.any(), name
            elif name.endswith("running_var"):
                assert torch.equal(value, torch.ones_like(value)), name
            else:
                assert "output_conv" in name
        # moved, so that the next copy can tell one domain from the other
        with torch.no_grad():
            for tensor in model.state_dict().values():
                tensor.add_(1)


def test_parameter_groups(golden, checkpoints):
    groups = json.loads((golden / "mdil_param_groups.json").read_text())
    for step in (1, 2, 3):
        model = network(checkpoints[step], "f32")
        back = {id(p): n for n, p in renamed(dict(model.named_parameters()), model.branches).items()}
        new = model.branches[-1]
        shared = {f"module.{back[id(p)]}" for p in model.shared_parameters()}
        own = {f"module.{back[id(p)]}" for p in model.branch_parameters(new)}
        expected = [set(group) for group in groups[f"step{step}"]["groups"]]
        assert (len(shared), len(own)) == (110, 168)
        assert ([shared, own] if step > 1 else [shared | own]) == expected
        model.freeze(branches=model.branches[:-1])
        trained = {f"module.{back[id(p)]}" for p in model.parameters() if p.requires_grad}
        assert trained == set(groups[f"step{step}"]["trainable"])
        assert {f"module.{n}" for n in back.values()} - trained == set(groups[f"step{step}"]["frozen"])


@pytest.fixture
def imagenet(golden, tmp_path) -> tuple[dict[str, Tensor], Path]:
    """A file with the names of the ImageNet-pretrained ERFNet: those the original code matched and those it did not."""
    known = json.loads((golden / "mdil_transfer.json").read_text())["step1_imagenet_encoder"]
    shapes = {n: v.shape for n, v in erfnet(per_branch="decoder").encoder.state_dict().items()}
    table, generator = erfnet_modules((5, 8)), torch.Generator().manual_seed(5)
    state = {}
    for name in [*known["matched"], *known["unexpected"]]:
        module, _, leaf = name.removeprefix("module.encoder.").rpartition(".")
        shape = shapes[f"{table[module]}.{leaf}"]
        state[f"{module}.{leaf}"] = torch.rand(shape, generator=generator) if shape else torch.tensor(7)
    path = tmp_path / "erfnet_encoder_pretrained.pth.tar"
    stored = {f"module.features.encoder.{name}": value for name, value in state.items()}
    stored["module.classifier.linear.weight"] = torch.zeros(1000, 128)
    torch.save({"epoch": 3, "best_acc": np.float64(60.1), "state_dict": stored}, path)
    return state, path


def test_the_imagenet_encoder_gives_the_shared_convolutions(golden, imagenet):
    state, path = imagenet
    matched = json.loads((golden / "mdil_transfer.json").read_text())["step1_imagenet_encoder"]["matched"]
    model = erfnet()
    assert "110 tensors" in load_encoder_weights(model, str(path))
    model.grow({"cs": 5})
    after = renamed(model.state_dict(), ("cs",))
    fresh = {name.replace("module.", "", 1) for name in matched}
    for name, value in after.items():
        if name in fresh:
            assert torch.equal(value, state[name.removeprefix("encoder.")]), name
        elif "bn" in name and name.startswith("encoder"):
            assert torch.equal(value, torch.full_like(value, float(name.endswith(("weight", "running_var")))))
    assert len(fresh) == 110


@pytest.mark.parametrize("per_branch", ["head", "decoder", "norm"])
def test_the_imagenet_encoders_norms_load_where_nothing_comes_before_them(imagenet, per_branch):
    state, path = imagenet
    model = erfnet(per_branch=per_branch)
    assert "255 tensors" in load_encoder_weights(model, str(path))
    model.grow({"cs": 5, "bdd": 5})
    model.grow({"idd": 7})
    owner = {"norm": ["cs.", "bdd."]}.get(per_branch, [""])
    own = model.encoder.state_dict()
    for module, ours in erfnet_modules((5, 8)).items():
        for name in (n for n in state if n.rpartition(".")[0] == module):
            leaf = name.rpartition(".")[2]
            for branch in owner if "norm" in ours else [""]:
                assert torch.equal(own[f"{ours}.{branch}{leaf}"], state[name]), name
    if per_branch == "norm":  # a branch met later starts afresh, or from another branch
        assert not own["down1.norm.idd.running_mean"].any()
