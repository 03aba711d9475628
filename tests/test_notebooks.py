"""That the check of the notebooks' stored outputs checks something."""

import json
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import nbformat
import pytest
import torch
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_notebook

CELLS = (
    "import pandas as pd\nfrom spikesink.apps.notebook import say, tidy",
    'say("The ratio is {ratio:.4f}.", ratio=1 / 1200)',
    'tidy(pd.DataFrame({"ratio": [1 / 1200]}, index=["a write"]))',
    'say("The ratio is {ratio:.1f}.", ratio=1 / 2)',
)


@pytest.mark.slow
def test_a_changed_number_in_a_stored_output_is_noticed(tmp_path):
    notebook = new_notebook(cells=[new_code_cell(source) for source in CELLS])
    NotebookClient(notebook).execute()
    stored = json.dumps(notebook)
    assert stored.count("0.0008") == 2
    folder = tmp_path / "notebooks"
    folder.mkdir()
    nbformat.write(nbformat.reads(stored.replace("0.0008", "0.0009"), as_version=4), folder / "made.ipynb")
    command = [sys.executable, "-m", "pytest", "--nbval", "--nbval-current-env", "-q", "-p", "no:cacheprovider", "."]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 1
    assert "2 failed, 2 passed" in ran.stdout
    assert "Cell 1" in ran.stdout
    assert "Cell 2" in ran.stdout


@pytest.mark.parametrize("instructions", ["the same", "others"])
def test_what_is_rounded_is_compared_only_where_the_instructions_are_the_same(monkeypatch, instructions):
    whole = runpy.run_path(str(Path(__file__).parent.parent / "conftest.py"))
    here = whole["STORED_WITH"] if instructions == "the same" else "AVX512"
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: here)
    names = (whole["ROUNDS"], "08_ablation.ipynb")
    items = [SimpleNamespace(path=Path(n), options={"check": True}, add_marker=lambda mark: None) for n in names]
    whole["pytest_collection_modifyitems"](items)
    assert [item.options["check"] for item in items] == [instructions == "the same", True]
