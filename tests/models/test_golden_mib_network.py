"""Comparison with the outputs of MiB's own code (golden README, section 2)."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from everseg.errors import ConfigError
from everseg.interop import mib
from everseg.models.build import deeplabv3
from everseg.models.model import SegmentationModel, init_from_background

pytestmark = pytest.mark.golden
EXACT = 1e-11
"""Largest difference in float64, relative to the largest value: above summation noise, far below 1e-8."""
SINGLE = 2e-5
"""The same in float32."""


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
    with np.load(golden / "model_mib_A.npz") as archive:
        return dict(archive)


@pytest.fixture(scope="module")
def state(arrays, values) -> dict[str, Tensor]:
    stored = {n.removeprefix("state/"): v for n, v in arrays.items() if n.startswith("state/")}
    seed = int(arrays["det_init_seed"])
    assert all(np.array_equal(values.det_tensor(n, v.shape, seed), v) for n, v in stored.items())
    return {n: torch.from_numpy(v) for n, v in stored.items()}


def difference(ours: Tensor, theirs: np.ndarray) -> float:
    """Largest absolute difference over the largest absolute value of theirs."""
    assert tuple(ours.shape) == theirs.shape
    return float(np.abs(ours.detach().double().numpy() - theirs).max() / np.abs(theirs).max())


def upsampled(model: SegmentationModel, image: Tensor) -> Tensor:
    return F.interpolate(
        model(image)["default"].logits, image.shape[2:], mode="bilinear", align_corners=False
    )


def by_their_name(tensors: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Key our tensors by the original names, through the importer's own table."""
    marks = mib.load({n: torch.full(v.shape, float(i)) for i, (n, v) in enumerate(state.items())})
    names = list(state)
    return {
        names[int(v.flatten()[0])]: tensors[n]
        for n, v in marks.state_dict().items()
        if n in tensors and v.dim()
    }


def test_dimensions_follow_from_the_shapes(arrays, state):
    options = mib.load(state).describe()["options"]
    base, stem, hidden, out = arrays["base_stem_hidden_out"].tolist()
    assert options["blocks"] == arrays["structure"].tolist()
    assert options["bottleneck"] == bool(arrays["bottleneck"])
    assert (options["stem"], options["hidden"], options["out_channels"]) == (stem, hidden, out)
    assert options["widths"] == [base * 2**k for k in range(4)]
    assert options["outputs"] == [4 * base * 2**k for k in range(4)]
    model = deeplabv3(
        blocks=options["blocks"], stem=stem, widths=options["widths"], hidden=hidden, out_channels=out, norm="iabn"
    )  # fmt: skip
    for size in (4, 2):
        model.grow({"default": size})
    assert model.parameter_count == int(arrays["n_params"])


def network(state: Mapping[str, Tensor], norm: str, stride: int, pool: int, dtype: str) -> SegmentationModel:
    model = mib.load(state, norm=norm, output_stride=stride, pool_size=pool)
    return model.double() if dtype == "f64" else model


@pytest.mark.parametrize("stride", [8, 16])
@pytest.mark.parametrize("norm", ["abn", "iabn"])
@pytest.mark.parametrize("dtype", ["f32", "f64"])
def test_logits(arrays, state, stride, norm, dtype):
    key = f"os{stride}/{norm}/{dtype}"
    stored = [name for name in arrays if name.startswith(key) and "/logits_" in name]
    assert len(stored) >= (3 if dtype == "f32" else 10)
    for name in stored:
        *_, pool, image_name, what = name.split("/")
        _, mode, *every = what.split("_")
        step = 4 if every else 1
        model = network(state, norm, stride, int(pool.removeprefix("pool")), dtype).train(mode == "train")
        image = torch.from_numpy(arrays[f"input/{image_name}"]).to(model.encoder.conv1.weight.dtype)
        with torch.no_grad():
            ours = upsampled(model, image)[..., ::step, ::step]
        assert difference(ours, arrays[name]) < (SINGLE if dtype == "f32" else EXACT), name


@pytest.mark.parametrize("stride", [8, 16])
@pytest.mark.parametrize("norm", ["abn", "iabn"])
def test_feature_taps(arrays, state, stride, norm):
    key = f"os{stride}/{norm}/f64/pool32/batch64"
    model = network(state, norm, stride, 32, "f64").eval()
    features = model(torch.from_numpy(arrays["input/batch64"]).double())["default"].features
    assert difference(features["encoder"], arrays[f"{key}/body_eval_f32"]) < 1e-6  # stored in float32
    assert difference(features["decoder"], arrays[f"{key}/pre_logits_eval_f32"]) < 1e-6


@pytest.mark.parametrize("stride", [8, 16])
@pytest.mark.parametrize("norm", ["abn", "iabn"])
def test_gradients_and_running_statistics(arrays, values, state, stride, norm):
    key = f"os{stride}/{norm}/f64/pool32/batch64"
    model = mib.load(state, norm=norm, output_stride=stride).double().train()
    logits = upsampled(model, torch.from_numpy(arrays["input/batch64"]).double())
    seed = 10 * int(arrays["det_init_seed"]) + 7
    logits.backward(torch.from_numpy(values.det_image(tuple(logits.shape), seed) / 64).double())
    gradients = by_their_name({n: p.grad for n, p in model.named_parameters()}, state)
    names = arrays[f"{key}/grad_names"].tolist()
    assert set(names) == set(gradients)
    norms = torch.stack([gradients[n].norm() for n in names])
    assert np.abs(norms.numpy() / arrays[f"{key}/grad_norm"] - 1).max() < EXACT
    sums, scale = torch.stack([gradients[n].sum() for n in names]).numpy(), arrays[f"{key}/grad_norm"]
    assert (np.abs(sums - arrays[f"{key}/grad_sum"]) / scale).max() < 1e-10
    buffers = by_their_name(model.state_dict(), state)
    whole = {n.removeprefix(f"{key}/"): v for n, v in arrays.items() if n.startswith(key)}
    for name, theirs in whole.items():
        if name.startswith("grad/"):
            assert difference(gradients[name[5:]], theirs) < EXACT, name
        if name.startswith("after_train_fwd/"):
            assert difference(buffers[name[16:]], theirs) < EXACT, name


@pytest.mark.parametrize("stride", [8, 16])
@pytest.mark.parametrize("norm", ["abn", "iabn"])
def test_wide_maps_show_every_dilation(arrays, values, state, stride, norm):
    key = f"wide/os{stride}/{norm}"
    seed, *shape = arrays["wide/input_seed_shape"].tolist()
    image = torch.from_numpy(values.det_image(tuple(shape), seed)).double()
    assert float(image.sum()) == float(arrays["wide/input_sum"])
    model = mib.load(state, norm=norm, output_stride=stride).double().eval()
    with torch.no_grad():
        assert tuple(model(image)["default"].logits.shape[2:]) == tuple(arrays[f"{key}/map_hw"])
        assert difference(upsampled(model, image)[..., ::8, ::8], arrays[f"{key}/logits_eval_s8"]) < EXACT
    logits = upsampled(model.train(), image)
    assert difference(logits[..., ::8, ::8], arrays[f"{key}/logits_train_s8"]) < EXACT
    seed = 10 * int(arrays["det_init_seed"]) + 8
    logits.backward(torch.from_numpy(values.det_image(tuple(logits.shape), seed) / 1024).double())
    gradients = by_their_name({n: p.grad for n, p in model.named_parameters()}, state)
    norms = np.array([float(gradients[n].norm()) for n in arrays[f"{key}/grad_names"].tolist()])
    assert np.abs(norms / arrays[f"{key}/grad_norm"] - 1).max() < EXACT
    for i in (1, 2, 3):
        taps = gradients[f"head.map_convs.{i}.weight"].square().sum((0, 1)).sqrt()
        assert difference(taps, arrays[f"{key}/grad/head.map_convs.{i}.weight_tapnorm"]) < EXACT


@pytest.mark.parametrize("stride", [8, 16])
def test_one_image_per_process_is_an_error_here_as_there(arrays, state, stride):
    assert str(arrays[f"os{stride}/train_batch1"]).startswith("ValueError")
    for norm in ("abn", "iabn"):
        with pytest.raises(ConfigError, match="two images"):
            mib.load(state, norm=norm, output_stride=stride).train()(torch.zeros(1, 3, 64, 64))


@pytest.mark.parametrize("dtype", ["f32", "f64"])
def test_background_initialisation_twice(arrays, state, dtype):
    head = {n: v for n, v in state.items() if n.startswith("cls.")}
    model = mib.load(state)
    model = model.double() if dtype == "f64" else model
    init_from_background(model, "default")
    after = mib.dump(model, "")
    for name, value in head.items():
        assert np.array_equal(arrays[f"init_new/{dtype}/before/{name}"], value.numpy())
        assert np.array_equal(arrays[f"init_new/{dtype}/after/{name}"], after[name].numpy()), name
    third = mib.load(
        {
            **state,
            "cls.2.weight": torch.zeros(3, 8, 1, 1),
            "cls.2.bias": torch.from_numpy(arrays[f"init_new3/{dtype}/before/cls.2.bias"]),
        }
    )
    third = third.double() if dtype == "f64" else third
    init_from_background(third, "default")
    after = mib.dump(third, "")
    for i in (0, 1, 2):
        for leaf in ("weight", "bias"):
            theirs = arrays[f"init_new3/{dtype}/after/cls.{i}.{leaf}"]
            assert np.array_equal(theirs, after[f"cls.{i}.{leaf}"].numpy()), (i, leaf)


def test_background_initialisation_at_the_start_of_a_real_step(golden):
    """Biases are no longer short fractions there, so the order of rounding shows."""
    with np.load(golden / "train_mib_MiB.npz") as archive:
        final = {n[12:]: archive[n] for n in archive.files if n.startswith("step0/final/")}
        start = {n[11:]: archive[n] for n in archive.files if n.startswith("step1/init/")}
    weights = {n: torch.from_numpy(v) for n, v in final.items()}
    model = mib.load(weights, norm="abn")
    model.grow({"default": 2})
    init_from_background(model, "default")
    ours = mib.dump(model)
    assert set(start) == {f"module.cls.{i}.{leaf}" for i in (0, 1) for leaf in ("weight", "bias")}
    for name, theirs in start.items():
        assert np.array_equal(ours[name].numpy(), theirs), name


@pytest.mark.parametrize("dtype", ["f32", "f64"])
def test_official_widths(golden, values, dtype):
    with np.load(golden / "model_mib_official_width.npz") as archive:
        arrays = dict(archive)
    seed, names = int(arrays["det_init_seed"]), arrays["keys"].tolist()
    with torch.device("meta"):
        model = deeplabv3(blocks=(1, 1, 1, 1), norm="abn")
        for size in (4, 2):
            model.grow({"default": size})
    shapes = {n: tuple(v.shape) for n, v in mib.dump(model, "").items()}
    assert set(shapes) == set(names)
    state = {n: torch.from_numpy(values.det_tensor(n, shapes[n], seed)) for n in names}
    assert [v.numel() for v in state.values()] == arrays["sum_sqsum_numel"][:, 2].tolist()
    np.testing.assert_allclose(
        [float(v.double().sum()) for v in state.values()], arrays["sum_sqsum_numel"][:, 0], atol=1e-6
    )
    image = torch.from_numpy(arrays["input"])
    model = mib.load(state, norm="abn")
    if dtype == "f64":
        model, image = model.double(), image.double()
    limit = SINGLE if dtype == "f32" else 1e-6  # the f64 results are stored in float32
    with torch.no_grad():
        for mode in ("eval", "train"):
            ours = upsampled(model.train(mode == "train"), image)[..., ::4, ::4]
            theirs = arrays[f"{dtype}/logits_{mode}"]
            assert difference(ours, theirs) < (EXACT if theirs.dtype == np.float64 else limit)
