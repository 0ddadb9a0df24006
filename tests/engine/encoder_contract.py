"""What every encoder of another library must do, from training to the extended bundle.

`PYTHONPATH=src:tests:tests/models python tests/engine/encoder_contract.py [--parts=trains,...] [ENCODER...]` tries all
encoders of CASES and prints the table of docs/models.md: half an hour, most of it in PyTorch's exporter.
"""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from encoders import TYPES
from processes import complete, killed, results
from safetensors.torch import save_file
from torch.nn import BatchNorm2d
from toy import settings

import everseg
from everseg.config.fields import ModelConfig
from everseg.data.batches.transforms import normalise
from everseg.deploy.bundle import Bundle, write_bundle
from everseg.deploy.export import of_run
from everseg.errors import ConfigError
from everseg.models.build import build_model
from everseg.models.model import SegmentationModel
from everseg.runs.run_folder import RunFolder
from forklifts import write_forklifts

CASES: dict[str, dict] = {
    **{f"hf:{kind}": config for kind, config in TYPES.items()},
    "timm:resnet18": {},
    "timm:convnext_atto": {},
    "timm:vit_tiny_patch16_224": {"dynamic_img_size": True, "depth": 4},
    "timm:vit_small_patch14_dinov2": {"dynamic_img_size": True, "depth": 4},
    "timm:vit_small_patch16_dinov3": {"dynamic_img_size": True, "depth": 4},
    "timm:swin_tiny_patch4_window7_224": {"strict_img_size": False},
    "timm:mobilenetv3_small_050": {},
    "timm:efficientnet_lite0": {},
    "timm:regnety_002": {},
}
"""Encoder -> its configuration, small."""
PARTS = ("trains", "resumes", "exports", "extends", "adopts", "domains")
WHOLE = {"segformer": "SegFormer", "beit": "BEiT", "mobilenet_v2": "DeepLabV3+", "mobilevit": "DeepLabV3"}
"""Type -> what transformers calls its segmentation network with this encoder; UPerNet for those that are backbones."""
NAMES = ["background", "red", "green", "blue"]
SIZES = ((96, 128), (75, 53), (33, 200), (240, 320))
"""Of the images on which a graph is compared; each also smaller."""


class Contract:
    """An encoder under the all-MLP decoder, through a run of two steps with a teacher.

    Args:
        encoder: a key of CASES.
        place: an empty folder.
    """

    def __init__(self, encoder: str, place: Path) -> None:
        self.encoder, self.place = encoder, place
        write_forklifts(place / "site")
        self.data = place / "site" / "data.yaml"

    def config(self, out: str) -> dict:
        model = {
            "name": "mlp",
            "encoder": self.encoder,
            "options": {"config": CASES[self.encoder], "hidden": 8},
        }
        train = {"max_iterations": 2, "batch": 2, "log_every": 1, "checkpoint_every": 1}
        few = {"options": {"train": 8, "val": 2}, "crop": 64}
        return settings(self.place / out, model=model, train=train, data=few)

    def trains(self) -> str:
        """Two iterations of each step."""
        assert complete(self.config("whole")) == 0
        return "yes"

    def resumes(self) -> str:
        """Killed before its third iteration, the run continues to the same bytes."""
        killed(self.config("killed"), "iteration", 3)
        assert complete(self.config("killed")) == 0
        assert results(self.place / "killed" / "toy") == results(self.place / "whole" / "toy")
        return "yes"

    def exports(self, onnx: bool = True) -> str:
        """Make a bundle whose ONNX file gives the model's results at many sizes, on noise."""
        folder = RunFolder(self.place / "whole" / "toy")
        contents = of_run(folder, folder.chosen_step(None))
        enliven(contents.model)
        self.bundle = write_bundle(self.place / "bundle", contents, images=noise(), source="noise", onnx=onnx)
        return graph_in_words(self.bundle) if onnx else "yes"

    def extends(self) -> str:
        """The bundle learns a further class."""
        with contextlib.chdir(self.place):  # its run lies in runs/
            done = everseg.extend(
                self.bundle.path, data=self.data, add=["forklift"], out="extended", onnx=False, quiet=True,
                overrides=["data.workers=0", "train.max_iterations=2", "data.crop=64", "train.batch=2"],
            )  # fmt: skip
        assert "forklift" in [entry.name for entry in done.bundle.registry.classes]
        return "yes"

    def adopts(self) -> str:
        """A whole network with this encoder becomes a bundle, and `adopt` finds the same logits, or refuses it."""
        library, _, kind = self.encoder.partition(":")
        if library == "hf":
            return self._adopts_network(kind)
        if CASES[self.encoder]:
            return "-"  # adopt builds an architecture of timm with its own numbers
        model: SegmentationModel = RunFolder(self.place / "whole" / "toy").load_final(0)[0]
        state = {key: value.contiguous() for key, value in model.state_dict().items()}
        image = noise()[0]
        given = normalise(torch.from_numpy(image.copy()).permute(2, 0, 1)[None])
        with torch.no_grad():
            logits = model.eval()(given)["default"].logits[0]
        save_file(state, self.place / "w.safetensors")
        save_file(
            {"image": torch.from_numpy(image), "logits": logits.contiguous()}, self.place / "r.safetensors"
        )
        everseg.adopt(
            self.place / "w.safetensors", arch=self.encoder, classes=NAMES[: len(logits)],
            out=self.place / "adopted", reference=self.place / "r.safetensors", onnx=False,
        )  # fmt: skip
        return "under everseg's head"

    def _adopts_network(self, kind: str) -> str:
        import transformers

        # Of a FocalNet the library takes these for the channels of its maps; nothing else reads them.
        own = {"hidden_sizes": [16, 32, 64, 64]} if kind == "focalnet" else {}
        config = transformers.AutoConfig.for_model(kind, **TYPES[kind] | own)
        if kind in WHOLE:
            name = WHOLE[kind]
            for key, value in {"out_indices": [2, 4, 6, 8], "pool_scales": [1, 2]}.items():
                if kind == "beit":
                    setattr(config, key, value)
        elif kind in transformers.models.auto.modeling_auto.MODEL_FOR_BACKBONE_MAPPING_NAMES:
            name, stages = "UPerNet", [stage for stage in config.stage_names if stage != "stem"]
            config.out_features = [stages[len(stages) * (k + 1) // 4 - 1] for k in range(4)]
            channels = transformers.AutoBackbone.from_config(config).channels
            config = transformers.UperNetConfig(
                backbone_config=config, hidden_size=8, auxiliary_channels=4, auxiliary_in_channels=channels[2],
                pool_scales=[1, 2],
            )  # fmt: skip
        else:
            return "-"  # transformers has no network for segmentation with it
        config.num_labels, config.id2label = 3, {0: "background", 1: "road", 2: "car"}
        network = transformers.AutoModelForSemanticSegmentation.from_config(config).eval()
        network.save_pretrained(self.place / "network")
        everseg.adopt(
            self.place / "network" / "model.safetensors", arch=f"transformers:{self.place / 'network'}",
            out=self.place / "adopted", onnx=False,
        )  # fmt: skip
        return name

    def domains(self) -> str:
        """Which parts of the encoder a branch can have of its own."""
        found = []
        for choice in ("norm", "adapter"):
            options = {"config": CASES[self.encoder], "hidden": 8, "per_branch": choice}
            with contextlib.suppress(ConfigError):
                model = build_model(ModelConfig(name="mlp", encoder=self.encoder, options=options))
                model.grow({"day": 2})
                model.grow({"dusk": 2}, init_from="day")
                image = torch.randn(2, 3, 64, 96)
                assert set(model(image)) == {"day", "dusk"}
                found.append(choice)
        return ", ".join(found) or "no"

    def parts(self) -> dict[str, Callable[[], str]]:
        return {name: getattr(self, name) for name in PARTS}


def noise() -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (*size, 3), np.uint8) for size in SIZES]


@torch.no_grad()
def enliven(model: SegmentationModel) -> None:
    """Give every batch norm the statistics of noise.

    After two iterations those of a fresh network are hardly its own yet, and its logits nearly the same everywhere:
    they would agree with anything.
    """
    for module in model.modules():
        if isinstance(module, BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None  # the mean over all that it sees
    model.train()
    image = torch.from_numpy(noise()[0].copy()).permute(2, 0, 1)[None]
    model(normalise(torch.cat([image, image.flip(3)])))
    model.eval()
    logits = model(normalise(image))["default"].logits
    assert float(logits.std((2, 3)).mean()) > 0.01, "the logits are nearly the same everywhere"


def graph_in_words(bundle: Bundle) -> str:
    """Which sizes its ONNX file takes, and how far it is from the model."""
    how = json.loads((bundle.path / "preprocessing.json").read_text())
    size = f"{how['size'][0]} x {how['size'][1]} only" if how.get("one_size") else "any size"
    return f"{size}, {bundle.parity['default']['logit_difference']:.1e}"


def main(given: list[str]) -> int:
    chosen = [one.removeprefix("--parts=").split(",") for one in given if one.startswith("--parts=")]
    parts = chosen[0] if chosen else list(PARTS)
    asked = [one for one in given if not one.startswith("--")]
    failed = 0
    print(f"| encoder | {' | '.join(parts)} |\n|---{'|---' * len(parts)}|", flush=True)
    for encoder in asked or list(CASES):
        with tempfile.TemporaryDirectory() as folder:
            contract = Contract(encoder, Path(folder))
            cells = []
            for name in parts:
                try:
                    cells.append(contract.parts()[name]())
                except Exception as error:
                    failed += 1
                    traceback.print_exc(limit=-2)
                    cells.append(f"NO: {name}: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
            print(f"| `{encoder}` | {' | '.join(cells)} |", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
