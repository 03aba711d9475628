"""That the check of the notebooks' stored outputs checks something."""

import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_a_changed_number_in_a_stored_output_is_noticed(tmp_path):
    notebook = json.loads((ROOT / "notebooks" / "02_plateau.ipynb").read_text())
    changed = []
    for number, cell in enumerate(cell for cell in notebook["cells"] if cell["cell_type"] == "code"):
        for output in cell["outputs"]:
            lines = output.get("data", {}).get("text/markdown", [])
            for i, line in enumerate(lines):
                lines[i] = re.sub(r"plateau_write_ratio: 0\.000\d", "plateau_write_ratio: 0.0009", line)
                if lines[i] != line:
                    changed.append(number)
    assert len(changed) == 1
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "notebooks" / "02_plateau.ipynb").write_text(json.dumps(notebook))
    command = [sys.executable, "-m", "pytest", "--nbval", "--nbval-current-env", "-q", "-p", "no:cacheprovider", "."]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 1
    assert f"1 failed, {sum(c['cell_type'] == 'code' for c in notebook['cells']) - 1} passed" in ran.stdout
    assert f"Cell {changed[0]}" in ran.stdout
