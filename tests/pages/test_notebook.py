"""The notebook of the first hour is well-formed, holds no outputs, and does what it says from first to last."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from reader import as_typed
from reading import ROOT

NOTEBOOK = ROOT / "docs" / "notebooks" / "first-hour.ipynb"
SMALL = """
import gc
from everseg.config import presets
from small import loading
presets.load_preset = loading(presets.load_preset)
gc.collect = lambda *_: 0
"""
"""What the tests do before the first cell: presets as small as for the pages."""


def cells(kind: str) -> list[dict[str, Any]]:
    found = json.loads(NOTEBOOK.read_text(encoding="utf-8"))["cells"]
    return [cell for cell in found if cell["cell_type"] == kind]


def test_the_notebook_holds_no_outputs_and_its_cells_are_python() -> None:
    assert cells("code")
    for cell in cells("code"):
        assert (cell["outputs"], cell["execution_count"]) == ([], None), cell["id"]
        lines = (line.replace("%pip", "pass  #") for line in cell["source"])
        compile("".join(lines), cell["id"], "exec")


def test_the_first_cell_installs_only_where_everseg_is_missing() -> None:
    first = "".join(cells("code")[0]["source"])
    assert first.index("find_spec") < first.index("%pip install")


@pytest.mark.slow
def test_the_notebook_does_what_it_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbclient = pytest.importorskip("nbclient", reason="the extra dev has it")
    nbformat = pytest.importorskip("nbformat", reason="the extra dev has it")
    pytest.importorskip("ipykernel", reason="the extra dev has it")
    path = [str(ROOT / "src"), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, path)))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.source = as_typed(cell.source).replace("num_train=train", "num_train=train // 10")
    notebook.cells.insert(0, nbformat.v4.new_code_cell(SMALL))
    client = nbclient.NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(tmp_path)}})
    client.execute()
    for made in ("runs/demo-mib/report.html", "bundle-v2/MODEL_CARD.md", "diff/diff.png"):
        assert (tmp_path / made).exists(), made
    shown = [cell for cell in notebook.cells if cell.cell_type == "code" and cell.outputs]
    assert len(shown) >= 6, "results that a reader sees below their cells"
