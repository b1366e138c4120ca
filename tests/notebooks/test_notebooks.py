"""The notebooks run from top to bottom, and what is committed of them is what they say.

After a change of one: `jupyter execute --inplace notebooks/NAME.ipynb`, then `ruff format notebooks`.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

NOTEBOOKS = sorted((Path(__file__).parents[2] / "notebooks").glob("*.ipynb"))

EXECUTE = """
import json, sys
import nbformat
from nbclient import NotebookClient
notebook = nbformat.read(sys.argv[1], 4)
NotebookClient(notebook, timeout=120, kernel_name="python3", coalesce_streams=True).execute()
print(json.dumps(notebook.cells))
"""


def code_cells(cells: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [cell for cell in cells if cell["cell_type"] == "code"]


def kinds(cell: dict[str, Any]) -> list[str]:
    """What a cell has put out: the names of streams, and the richest form of each display."""
    found: list[str] = []
    for output in cell["outputs"]:
        if output["output_type"] == "stream":
            found.append(output["name"])
        elif output["output_type"] == "error":
            found.append("error")
        else:
            found.append(max(output["data"], key=["text/plain", "text/html", "image/png"].index))
    return found


def test_there_are_three() -> None:
    assert [path.stem for path in NOTEBOOKS] == ["1-first-search", "2-dataset-and-tree", "3-preferences"]


@pytest.mark.ray  # the third one plays a run
@pytest.mark.xdist_group("ray")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_from_top_to_bottom(path: Path, tmp_path: Path) -> None:
    own = ("JUPYTER_RUNTIME_DIR", "IPYTHONDIR", "MPLCONFIGDIR", "JUPYTER_CONFIG_DIR", "HF_HOME")
    environment = os.environ | {name: str(tmp_path / name.lower()) for name in own}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", EXECUTE, str(path)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    executed = code_cells(json.loads(done.stdout.splitlines()[-1]))
    committed = code_cells(json.loads(path.read_text())["cells"])
    assert [kinds(cell) for cell in executed] == [kinds(cell) for cell in committed]
    assert any("image/png" in kinds(cell) for cell in executed)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_what_is_committed_was_executed_in_order_and_names_no_machine(path: Path) -> None:
    text = path.read_text()
    cells = code_cells(json.loads(text)["cells"])
    assert [cell["execution_count"] for cell in cells] == list(range(1, len(cells) + 1))
    assert not {"stderr", "error"} & {kind for cell in cells for kind in kinds(cell)}
    for folder in ("/root", "/home", "/tmp", str(Path.home()), str(NOTEBOOKS[0].parents[1])):
        assert f"{folder}/" not in text
