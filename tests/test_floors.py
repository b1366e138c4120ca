"""Imports go downward only, and nothing heavy is imported before it is needed."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def test_the_floors_hold() -> None:
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 0 broken" in done.stdout


def test_a_broken_floor_is_found(tmp_path: Path) -> None:
    """The same contracts, over a copy in which a module of the ground floor imports the fleet."""
    for name in ("rollout", "envs"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    with (tmp_path / "rollout" / "types.py").open("a") as file:
        file.write("\nimport rollout.fleet.fleet\n")
    command = [str(Path(sys.executable).with_name("lint-imports")), "--no-cache"]
    environment = {"PYTHONPATH": str(tmp_path), "PATH": ""}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert "rollout.types -> rollout.fleet.fleet" in done.stdout


@pytest.mark.parametrize(
    ("what", "unwanted"),
    [
        ("import rollout, rollout.types, rollout.errors", ["numpy", "pydantic", "ray", "gymnasium"]),
        (
            "import rollout.cli; rollout.cli.build_app(None)",
            ["numpy", "pydantic", "ray", "pyarrow", "plotly"],
        ),
        ("import rollout.runner", ["ray"]),
    ],
)
def test_importing_is_cheap(what: str, unwanted: list[str]) -> None:
    check = f"import sys; {what}; print([name for name in {unwanted!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", check], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
