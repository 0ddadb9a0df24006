"""What every encoder of another library must do, from training to the extended bundle.

`PYTHONPATH=src:tests:tests/models python tests/engine/encoder_contract.py [ENCODER...]` tries all encoders of CASES and
prints the table of docs/models.md: minutes, most of them in PyTorch's exporter.
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
from everseg.data.batches.transforms import normalise
from everseg.deploy.bundle import Bundle, write_bundle
from everseg.deploy.export import of_run
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
        """A bundle whose ONNX file gives the model's results at many sizes, on noise."""
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
        """Weights of timm's names under our head become a bundle with the same logits."""
        if not self.encoder.startswith("timm:") or CASES[self.encoder]:
            return "-"
        model: SegmentationModel = RunFolder(self.place / "whole" / "toy").load_final(0)[0]
        save_file(
            {key: value.contiguous() for key, value in model.state_dict().items()},
            self.place / "w.safetensors",
        )
        everseg.adopt(
            self.place / "w.safetensors", arch=self.encoder, classes="background,red,green", out=self.place / "adopted",
            norm="bn", normalisation="imagenet", onnx=False,
        )  # fmt: skip
        return "yes"

    def parts(self) -> dict[str, Callable[[], str]]:
        return {name: getattr(self, name) for name in ("trains", "resumes", "exports", "extends", "adopts")}


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


def main(asked: list[str]) -> int:
    failed = 0
    print("| encoder | trains | resumes | ONNX | extends | adopts |\n|---|---|---|---|---|---|", flush=True)
    for encoder in asked or list(CASES):
        with tempfile.TemporaryDirectory() as folder:
            contract = Contract(encoder, Path(folder))
            cells = []
            for name, part in contract.parts().items():
                try:
                    cells.append(part())
                except Exception as error:
                    failed += 1
                    traceback.print_exc(limit=-2)
                    cells.append(f"NO: {name}: {type(error).__name__}: {' '.join(str(error).split())[:200]}")
            print(f"| `{encoder}` | {' | '.join(cells)} |", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
