"""Weights of library encoders: folders as `save_pretrained` writes them, the hub's cache, the inputs they want."""

from __future__ import annotations

import json
import re
import shutil
import time

import pytest
import torch
from encoders import TYPES, need_transformers
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from everseg.config.fields import ModelConfig
from everseg.errors import CheckpointError, ConfigError
from everseg.models.adapters.transformers import describe
from everseg.models.build import build_model, from_description
from everseg.types import IMAGENET_MEAN, IMAGENET_STD
from saying import must_say

need_transformers()
import transformers  # noqa: E402

HEADS = {
    "segformer": ("SegformerForSemanticSegmentation", "SegformerForImageClassification"),
    "resnet": ("ResNetForImageClassification",),
    "convnext": ("ConvNextForImageClassification", "ConvNextModel"),
    "dinov2": ("Dinov2Model", "Dinov2ForImageClassification"),
}


def saved(folder, kind: str, head: str | None = None):
    """A model of transformers with random weights, written by its own code."""
    torch.manual_seed(11)
    config = transformers.AutoConfig.for_model(kind, **TYPES[kind])
    model = getattr(transformers, head or (HEADS.get(kind) or ["SwinForImageClassification"])[0])(config)
    for name, value in model.named_buffers():
        if name.endswith("running_mean"):
            torch.nn.init.normal_(value)
    model.save_pretrained(folder)
    return model.eval()


def loaded(folder, **changes):
    model = build_model(ModelConfig(name="mlp", encoder=f"hf:{folder}", options={"hidden": 8}, **changes))
    return model.eval()


@pytest.mark.parametrize(("kind", "head"), [(kind, head) for kind, heads in HEADS.items() for head in heads])
def test_every_head_they_were_trained_with_gives_the_encoders_maps(kind, head, tmp_path, caplog):
    theirs = saved(tmp_path, kind, head)
    with caplog.at_level("INFO", "everseg"):
        encoder = loaded(tmp_path).encoder
    assert re.search("encoder: [0-9]+ tensors from", caplog.text)
    image = torch.randn(2, 3, 56, 56) if kind == "dinov2" else torch.randn(2, 3, 64, 64)
    hidden = theirs(image, output_hidden_states=True).hidden_states
    expected = list(hidden[-4:])
    if kind == "dinov2":
        norm = getattr(theirs, "dinov2", theirs).layernorm
        expected = [norm(hidden[k])[:, 1:].transpose(1, 2).unflatten(2, (4, 4)) for k in (2, 4, 6, 8)]
    if kind == "convnext":  # the backbone's fresh norms over the channels
        must_say(caplog.text, "8 of them", "fresh norms")
        moved = [(h.movedim(1, 3), h.shape[1:2]) for h in expected]
        expected = [torch.nn.functional.layer_norm(h, c, eps=1e-6).movedim(3, 1) for h, c in moved]
    for tap, value in zip(encoder(image).values(), expected, strict=True):
        assert_close(tap, value, atol=1e-5, rtol=1e-4)


def test_swin_weights_arrive_and_its_maps_get_fresh_norms(tmp_path, caplog):
    theirs = saved(tmp_path, "swin").state_dict()
    with caplog.at_level("INFO", "everseg"):
        own = loaded(tmp_path).encoder.body.state_dict()
    shared = own.keys() & theirs.keys()
    left = {"swin.layernorm.weight", "swin.layernorm.bias", "classifier.weight", "classifier.bias"}
    assert theirs.keys() - shared <= left
    assert all(torch.equal(own[name], theirs[name]) for name in shared)
    assert {name.split(".")[0] for name in own.keys() - shared} == {"hidden_states_norms"}
    must_say(caplog.text, "8 of them", "fresh norms")


def test_a_finished_model_needs_the_folder_no_longer(tmp_path):
    saved(tmp_path / "x", "segformer")
    model = loaded(tmp_path / "x")
    model.grow({"default": 2})
    shutil.rmtree(tmp_path / "x")
    again = from_description(model.describe())
    again.load_state_dict(model.state_dict())
    image = torch.randn(1, 3, 64, 64)
    assert torch.equal(again.eval()(image)["default"].logits, model(image)["default"].logits)
    assert str(tmp_path) not in json.dumps(model.describe())


@pytest.mark.parametrize("kind", ["segformer", "resnet"])
@pytest.mark.parametrize("count", [1, 5])
def test_weights_for_rgb_serve_other_channels_by_the_stated_rule(kind, count, tmp_path):
    saved(tmp_path, kind)
    rgb = loaded(tmp_path).encoder.body.state_dict()
    config = ModelConfig(name="mlp", encoder=f"hf:{tmp_path}", options={"hidden": 8})
    found = build_model(config, in_channels=count).encoder.body.state_dict()
    (other,) = [name for name in rgb if rgb[name].shape != found[name].shape]
    assert all(torch.equal(found[name], rgb[name]) for name in rgb if name != other)
    for channel in range(count):
        expected = rgb[other].sum(1) if count == 1 else rgb[other][:, channel % 3] * 3 / count
        assert_close(found[other][:, channel], expected)


def test_weights_for_other_channels_serve_their_own_alone(tmp_path):
    config = transformers.AutoConfig.for_model("segformer", **TYPES["segformer"], num_channels=4)
    transformers.AutoModel.from_config(config).save_pretrained(tmp_path)
    model = ModelConfig(name="mlp", encoder=f"hf:{tmp_path}", options={"hidden": 8})
    assert build_model(model, in_channels=4).encoder.in_channels == 4
    with pytest.raises(CheckpointError, match=r"of 4 channels, not 5"):
        build_model(model, in_channels=5)


def test_pickled_weights_are_read_without_running_code(tmp_path):
    saved(tmp_path, "segformer")
    state = load_file(tmp_path / "model.safetensors")
    expected = loaded(tmp_path).state_dict()
    (tmp_path / "model.safetensors").unlink()
    torch.save(state, tmp_path / "pytorch_model.bin")
    for name, value in loaded(tmp_path).state_dict().items():
        if name.startswith("encoder."):
            assert torch.equal(value, expected[name])

    class Evil:
        def __reduce__(self):
            return (tmp_path.joinpath("ran").mkdir, ())

    torch.save({**state, "x": Evil()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin.*could run code"):
        loaded(tmp_path)
    assert not (tmp_path / "ran").exists()


def test_the_network_in_the_file_may_be_changed_only_where_its_weights_allow(tmp_path):
    saved(tmp_path, "segformer")
    model = build_model(
        ModelConfig(
            name="mlp", encoder=f"hf:{tmp_path}", options={"hidden": 8, "config": {"drop_path_rate": 0.4}}
        )
    )
    described = model.describe()["options"]["encoder"]["config"]
    assert described["drop_path_rate"] == 0.4
    assert described["depths"] == [1, 1, 1, 1]
    for config in ({"depths": [2, 1, 1, 1]}, {"hidden_sizes": [8, 8, 12, 20]}):
        with pytest.raises(CheckpointError, match=r"do not fit|cannot be loaded"):
            build_model(ModelConfig(name="mlp", encoder=f"hf:{tmp_path}", options={"config": config}))


def damaged(folder, what: str) -> None:
    state = load_file(folder / "model.safetensors")
    if what == "truncated":
        path = folder / "model.safetensors"
        path.write_bytes(path.read_bytes()[:-500])
    elif what == "missing":
        del state[next(n for n in state if n.startswith("segformer."))]
        save_file(state, folder / "model.safetensors", {"format": "pt"})
    elif what == "infinite":
        state[next(n for n in state if n.startswith("segformer."))][:] = float("inf")
        save_file(state, folder / "model.safetensors", {"format": "pt"})
    elif what == "config":
        (folder / "config.json").write_text("{")
    else:
        config = json.loads((folder / "config.json").read_text())
        config |= {"model_type": "bert"} if what == "type" else {"auto_map": {"AutoModel": "modeling.Model"}}
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "modeling.py").write_text("raise SystemExit('ran')")


@pytest.mark.parametrize(
    ("what", "error", "words"),
    [
        ("truncated", CheckpointError, "is damaged"),
        ("missing", CheckpointError, "do not fit"),
        ("infinite", CheckpointError, "not finite"),
        ("config", CheckpointError, "config.json cannot be read"),
        ("type", ConfigError, "'bert'.* type of encoder"),
        ("code", ConfigError, r"code .*\(auto_map\).* never runs"),
    ],
)
def test_a_damaged_or_hostile_folder_is_told(what, error, words, tmp_path):
    saved(tmp_path, "segformer")
    damaged(tmp_path, what)
    with pytest.raises(error, match=words):
        loaded(tmp_path)


@pytest.mark.parametrize("key", ["depths", "hidden_sizes"])
def test_a_folder_whose_configuration_is_larger_than_its_weights_is_told_before_it_is_built(key, tmp_path):
    saved(tmp_path, "segformer")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, key: [60_000] * 4}))
    begun, before = time.process_time(), torch.get_rng_state()
    with pytest.raises(CheckpointError, match="weights hold"):
        describe(str(tmp_path), {}, None, download=False)
    assert time.process_time() - begun < 10
    (tmp_path / "config.json").write_text(json.dumps(config))
    describe(str(tmp_path), {}, None, download=False)
    assert torch.equal(torch.get_rng_state(), before), "to look draws nothing"


def test_an_empty_folder_is_told(tmp_path):
    with pytest.raises(ConfigError, match=r"needs config.json and one of model.safetensors"):
        loaded(tmp_path)


def test_a_name_is_looked_up_in_the_cache_and_downloaded_only_where_allowed(tmp_path, monkeypatch):
    saved(tmp_path, "segformer")
    asked = []

    def fake(repo, filename, *, revision, local_files_only):
        from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

        asked.append((repo, filename, revision, local_files_only))
        path = tmp_path / filename
        if not path.is_file():
            raise LocalEntryNotFoundError("no") if local_files_only else EntryNotFoundError("no")
        return str(path)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", fake)
    for download in (False, True):
        asked.clear()
        model = build_model(
            ModelConfig(name="mlp", encoder="hf:nvidia/mit-b0@v2", options={"hidden": 8}, download=download)
        )
        names = ["config.json", "model.safetensors", "preprocessor_config.json"]
        assert asked == [("nvidia/mit-b0", name, "v2", not download) for name in names]
    assert model.describe()["options"]["encoder"]["type"] == "segformer"


@pytest.mark.parametrize("normalisation", ["imagenet", "unit"])
@pytest.mark.parametrize(
    ("said", "mean", "std"),
    [
        ({"image_mean": [0.5, 0.4, 0.3], "image_std": [0.5, 0.6, 0.7]}, (0.5, 0.4, 0.3), (0.5, 0.6, 0.7)),
        ({"do_normalize": False, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}, (0, 0, 0), (1, 1, 1)),
        ({"image_mean": [127.5] * 3, "image_std": [127.5] * 3, "do_rescale": False}, (0.5,) * 3, (0.5,) * 3),
    ],
)
def test_a_pretrained_encoder_sees_the_inputs_it_was_trained_on(said, mean, std, normalisation, tmp_path):
    theirs = saved(tmp_path, "segformer").segformer
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(said))
    config = ModelConfig(name="mlp", encoder=f"hf:{tmp_path}", options={"hidden": 8})
    encoder = build_model(config, normalisation).encoder.eval()
    pixels = torch.rand(1, 3, 64, 64)

    def channels(values):
        return torch.tensor(values).view(1, 3, 1, 1)

    ours = pixels
    if normalisation == "imagenet":
        ours = (pixels - channels(IMAGENET_MEAN)) / channels(IMAGENET_STD)
    wanted = theirs((pixels - channels(mean)) / channels(std)).last_hidden_state
    assert_close(encoder(ours)["layer4"], wanted, atol=1e-4, rtol=1e-3)


def test_equal_inputs_are_left_alone_and_random_weights_get_ours(tmp_path):
    saved(tmp_path, "segformer")
    said = {"image_mean": list(IMAGENET_MEAN), "image_std": list(IMAGENET_STD)}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(said))
    assert loaded(tmp_path).describe()["options"]["encoder"]["inputs"] is None
    config = ModelConfig(
        name="mlp", encoder="hf:segformer", options={"config": TYPES["segformer"], "hidden": 8}
    )
    assert build_model(config, "unit").describe()["options"]["encoder"]["inputs"] is None
