"""No number has changed: the weights and the confusion counts of short runs are those stored in unchanged.json.

Each run is cut to a few iterations on one thread. Of every step the SHA-256 of the final weights (name, type, shape
and bytes of each tensor) and of the confusion counts are compared. They repeat exactly on one kind of machine only:
another processor or another PyTorch rounds differently. The file therefore says on which kind it was written, and
the tests skip elsewhere. CamVid's runs also skip where its images are not at hand.

A refactoring must not touch unchanged.json. Where numbers change on purpose, or where the kind of machine has
changed, this writes the file anew (each run is trained twice and must repeat itself):

    python tests/test_unchanged.py --write [--camvid DIR]

On a new kind of machine write it with the code of the last commit that is known to be good, so that the comparison
goes on: `git worktree add ../before COMMIT`, then the same command with `PYTHONPATH=../before/src`. Only the public
face is used here (`everseg.run`, the command line and the files of a run), so that older code can be run too.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import everseg
from command_line import everseg_command, everseg_ranks
from forklifts import write_forklifts

STORED = Path(__file__).with_name("unchanged.json")
Hashes = dict[str, dict[str, str]]
Job = Callable[[Path], list[Path]]
"""Does what a case says in an empty folder; gives the folders, of runs or bundles, whose numbers are compared."""

# ---------------------------------------------------------------- what is run

CUT = ["tracker=[]", "report=false", "train.batch=4", "train.max_iterations=8", "train.threads=1"]
SCENES = {"num_train": 16, "num_val": 4, "size": [32, 48]}
SCHEDULE = {"epochs": 6, "epochs_next": 4, "lr": 0.05, "lr_next": 0.05}
"""The stored hashes are of this one, whatever the presets of the demo take."""
CLASSES = [
    *CUT,
    *(f"train.{key}={value}" for key, value in SCHEDULE.items()),
    "data.crop=32",
    *(f"data.options.{key}={value}" for key, value in SCENES.items()),
]
DOMAINS = [
    *CUT,
    "data.size=[32,48]",
    *(f"data.domains.{name}.options.{key}={value}" for name in ("day", "dusk") for key, value in SCENES.items()),
]  # fmt: skip
NARROW = "{stem: 8, widths: [8, 8, 8, 8], blocks: [1, 1, 1, 1], hidden: 8, out_channels: 8, pool_size: null}"
SWITCHES = {
    "pi": ["demo-4-1-pi", "method.weight=500"],
    "rw": ["demo-4-1-rw", "method.weight=100", "method.period=3"],  # its own is longer than these steps
    "mib-bce-frozen": ["demo-mib", "method.bce=true", "method.freeze_encoder=true", "method.freeze_norm=true"],
    "mib-adam-sliding": [
        "demo-mib", "train.optimizer=adam", "train.lr=0.001", "train.lr_next=0.001", "scenario.protocol=disjoint",
        "scenario.validation=cross", "data.evaluation=sliding", "train.schedule=step",
    ],
    "mib-resnet": [
        "demo-4-1-mib", "model.name=deeplabv3-resnet101", f"model.options={NARROW}", "model.norm=iabn",
        "model.output_stride=16", "data.evaluation=crop", "scenario.policy=mib-voc",
    ],
}  # fmt: skip
"""Name -> preset and settings: three steps, and what the presets leave at its default."""


def run_preset(preset: str, *overrides: str) -> Job:
    def job(folder: Path) -> list[Path]:
        return [everseg.run(preset, overrides=[*overrides, f"out={folder}"], quiet=True).path]

    return job


def run_ranks(folder: Path) -> list[Path]:
    """EWC sums gradients and importances over two processes."""
    everseg_ranks(2, "run", "demo-ewc", *CLASSES, "method.weight=500", "out=runs", "--quiet", cwd=folder)
    return [folder / "runs" / "demo-ewc"]


def run_extension(folder: Path) -> list[Path]:
    """A bundle is made and learns a class of a folder of the user's own."""
    write_forklifts(folder / "site")
    (run,) = run_preset("demo-mib", *CLASSES)(folder / "runs")
    everseg_command("export", run, "-o", "bundle", "--no-onnx", cwd=folder)
    few = ["data.workers=0", "train.max_iterations=8", "train.threads=1", "train.batch=4", "report=false"]
    new = ["--data", "site/data.yaml", "--add", "forklift", "--no-onnx", "--quiet"]
    everseg_command("extend", "bundle", *new, "-o", "grown", *few, cwd=folder)
    return [folder / "bundle", folder / "grown", folder / "runs" / "grown"]


def run_camvid(source: Path, preset: str, *overrides: str) -> Job:
    """A preset on a copy of CamVid with twelve training and four test images, half of them taken at dusk."""

    def job(folder: Path) -> list[Path]:
        data = folder / "camvid"
        for split, each in (("train", 6), ("test", 2)):
            stems = sorted(path.stem for path in (source / split).iterdir())
            dusk = [stem for stem in stems if stem.startswith("0001TP")]
            day = [stem for stem in stems if not stem.startswith("0001TP")]
            for kind in (split, f"{split}annot"):
                (data / kind).mkdir(parents=True)
                for stem in (*day[:: len(day) // each][:each], *dusk[:: len(dusk) // each][:each]):
                    (picture,) = (source / kind).glob(f"{stem}.*")
                    shutil.copy(picture, data / kind)
        return run_preset(preset, *CUT, f"data.root={data}", *overrides)(folder)

    return job


JOBS: dict[str, Job] = {
    **{
        name: run_preset(name, *CLASSES, *(["method.weight=500"] if method == "ewc" else []))
        for method in ("ft", "lwf", "lwf-mc", "ilt", "ewc", "mib", "joint")
        for name in (f"demo-{method}",)
    },
    **{name: run_preset(preset, *CLASSES, *more) for name, (preset, *more) in SWITCHES.items()},
    **{
        name: run_preset(name, *DOMAINS)
        for method in ("mdil", "mdil-authors", "ft", "fe", "single", "multi", "ewc", "ilt")
        for name in (f"demo-day-dusk-{method}",)
    },
    **{f"demo-mixed-{method}": run_preset(f"demo-mixed-{method}", *DOMAINS) for method in ("mdil+mib", "mib")},
    "ranks": run_ranks,
    "extension": run_extension,
}  # fmt: skip
SLOW = dict.fromkeys(("ranks", "extension"), pytest.mark.slow)
CAMVID = {
    "camvid-6-5-mib": ["data.crop=96"],
    "camvid-day-dusk-mdil": ["data.size=[72,96]"],
    "camvid-mixed-mdil+mib": ["data.size=[72,96]"],
}

# ---------------------------------------------------------------- what is compared


def hash_arrays(arrays: dict[str, np.ndarray]) -> str:
    """SHA-256 over name, type, shape and bytes of each array, in the order of the names."""
    digest = hashlib.sha256()
    for name, value in sorted(arrays.items()):
        digest.update(f"{name} {value.dtype} {value.shape}\n".encode())
        digest.update(np.ascontiguousarray(value).tobytes())
    return digest.hexdigest()


def hash_weights(path: Path) -> str:
    return hash_arrays({name: value.numpy() for name, value in load_file(path).items()})


def hash_counts(path: Path) -> str:
    with np.load(path, allow_pickle=False) as archive:
        return hash_arrays({name: archive[name] for name in archive.files})


def hash_results(folders: list[Path]) -> Hashes:
    """Hashes of a bundle's weights, or of the weights and counts of each step of a run, by name of folder and step."""
    found: Hashes = {}
    for folder in folders:
        if (folder / "model.safetensors").is_file():
            found[folder.name] = {"weights": hash_weights(folder / "model.safetensors")}
        for step in sorted((folder / "steps").glob("[0-9]*")):
            found[f"{folder.name}/{step.name}"] = {
                "weights": hash_weights(step / "final" / "model.safetensors")
            }
            if (step / "confusion.npz").is_file():  # the start of an extension is not tested
                found[f"{folder.name}/{step.name}"]["counts"] = hash_counts(step / "confusion.npz")
    assert found, f"neither a bundle nor a finished step in {folders}"
    return found


def machine_kind() -> dict[str, str]:
    """Everything that decides how floating-point sums are rounded here, as far as it can be asked for."""
    processor = platform.processor()
    if Path("/proc/cpuinfo").is_file():
        lines = (line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines())
        fields = {key.strip(): value.strip() for key, _, value in lines}
        wanted = ("vendor_id", "cpu family", "model", "CPU implementer", "CPU part")
        processor = " ".join(fields[key] for key in wanted if key in fields)
    return {
        "torch": torch.__version__,
        "architecture": platform.machine(),
        "processor": processor,
        "capability": torch.backends.cpu.get_cpu_capability(),
        "mkl": str(torch.backends.mkl.is_available()),
        "mkldnn": str(torch.backends.mkldnn.is_available()),
        "device": "cuda" if torch.cuda.is_available() else "cpu",
    }


def other_kind(stored: dict[str, str]) -> str:
    """Why the stored hashes cannot be compared here, or an empty string."""
    here = machine_kind()
    if here == stored:
        return ""
    one, other = (", ".join(f"{key} {value}" for key, value in kind.items()) for kind in (stored, here))
    return f"the stored hashes are of another kind of machine: they are of ({one}), this is ({other})"


def versions() -> dict[str, str]:
    """Packages that make the images; not part of the kind, but the first to suspect if a hash differs."""
    return {name: version(name) for name in ("numpy", "pillow", "accelerate", "safetensors")}


def differences(name: str, found: Hashes, stored: dict[str, Any]) -> str:
    """Which steps differ in what, and which packages are others than when the file was written."""
    wanted = stored["runs"][name]
    lines = [f"steps: stored {list(wanted)}, found {list(found)}"] if wanted.keys() != found.keys() else []
    lines += [
        f"{name}, {step}: other {what}"
        for step in sorted(wanted.keys() & found.keys())
        for what in ("weights", "counts")
        if found[step].get(what) != wanted[step].get(what)
    ]
    here = versions()
    lines += [
        f"({key} is {here[key]}; the file was written with {value})"
        for key, value in stored["versions"].items()
        if lines and here[key] != value
    ]
    return "\n".join(lines)


@pytest.fixture(scope="module")
def stored() -> dict[str, Any]:
    document = json.loads(STORED.read_text())
    reason = other_kind(document["machine"])
    if reason:
        pytest.skip(reason)
    return document


@pytest.mark.parametrize("name", [pytest.param(name, marks=SLOW.get(name, ())) for name in JOBS])
def test_weights_and_counts_are_those_stored(tmp_path: Path, stored: dict[str, Any], name: str) -> None:
    assert differences(name, hash_results(JOBS[name](tmp_path)), stored) == ""


@pytest.mark.slow
@pytest.mark.parametrize("name", CAMVID)
def test_weights_and_counts_on_camvid_are_those_stored(
    tmp_path: Path, camvid: Path, stored: dict[str, Any], name: str
) -> None:
    found = hash_results(run_camvid(camvid, name, *CAMVID[name])(tmp_path))
    assert differences(name, found, stored) == ""


def test_another_seed_is_noticed_in_every_step(tmp_path: Path, stored: dict[str, Any]) -> None:
    found = hash_results(run_preset("demo-mib", *CLASSES, "seed=1")(tmp_path))
    said = differences("demo-mib", found, stored)
    assert "demo-mib/00: other weights" in said
    assert "demo-mib/01: other weights" in said


def test_the_smallest_change_of_a_weight_a_count_a_name_or_a_shape_is_noticed() -> None:
    arrays = {"a": np.ones((2, 3), np.float32), "b": np.zeros(2, np.int64)}
    changed = [
        {**arrays, "a": np.nextafter(arrays["a"], np.float32(2))},
        {**arrays, "b": np.array([0, 1])},
        {"c": arrays["a"], "b": arrays["b"]},
        {**arrays, "a": arrays["a"].reshape(3, 2)},
        {**arrays, "b": arrays["b"].view(np.float64)},
        {"a": arrays["a"]},
    ]
    assert len({hash_arrays(one) for one in (arrays, *changed)}) == 1 + len(changed)
    assert hash_arrays(dict(reversed(arrays.items()))) == hash_arrays(arrays)


def test_the_file_holds_every_run_and_its_kind_of_machine_is_told_from_others() -> None:
    document = json.loads(STORED.read_text())
    assert list(document["runs"]) == [*JOBS, *CAMVID]
    assert other_kind(machine_kind()) == ""
    reason = other_kind({**machine_kind(), "torch": "0.1"})
    assert "torch 0.1" in reason
    assert f"torch {torch.__version__}" in reason


# ---------------------------------------------------------------- writing the file


def write(camvid: Path) -> None:
    if not camvid.is_dir():
        sys.exit(f"{camvid} is not there: give the folder of CamVid with --camvid DIR")
    jobs = {**JOBS, **{name: run_camvid(camvid, name, *more) for name, more in CAMVID.items()}}
    runs: dict[str, Hashes] = {}
    for name, job in jobs.items():
        print(name, flush=True)
        with tempfile.TemporaryDirectory() as one, tempfile.TemporaryDirectory() as two:
            runs[name] = hash_results(job(Path(one)))
            if hash_results(job(Path(two))) != runs[name]:
                sys.exit(f"{name} does not repeat itself; nothing was written")
    document = {"machine": machine_kind(), "versions": versions(), "runs": runs}
    STORED.write_text(json.dumps(document, indent=1) + "\n")
    print(f"{STORED}: {len(runs)} runs")


def main() -> None:
    parser = argparse.ArgumentParser(description="Writes unchanged.json anew; see the top of this file.")
    parser.add_argument("--write", action="store_true", required=True)
    shared = Path(__file__).resolve().parents[2] / "shared"
    parser.add_argument("--camvid", type=Path, default=shared / "data" / "camvid", help="folder of CamVid")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as cache:
        os.environ["EVERSEG_CACHE"] = cache
        write(arguments.camvid)


if __name__ == "__main__":
    main()
