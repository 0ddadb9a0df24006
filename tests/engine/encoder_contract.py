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

from encoders import TYPES
from processes import complete, killed, results
from safetensors.torch import save_file
from toy import settings

import everseg
from everseg.deploy.bundle import Bundle
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
        """A bundle whose ONNX file gives the model's results."""
        self.bundle = everseg.export(self.place / "whole" / "toy", self.place / "bundle", onnx=onnx)
        return size_of_graph(self.bundle) if onnx else "yes"

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


def size_of_graph(bundle: Bundle) -> str:
    """Which sizes its ONNX file takes."""
    how = json.loads((bundle.path / "preprocessing.json").read_text())
    return f"{how['size'][0]} x {how['size'][1]} only" if how.get("one_size") else "any size"


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
