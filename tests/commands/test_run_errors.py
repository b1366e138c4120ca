"""What `rollout run` refuses before anything is started: one line, a non-zero exit, nothing left."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from rollout.cli import main

CONFIG = '[env]\nargs = { env_id = "FrozenLake-v1" }\n[engine]\nkind = "inline"\n'


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "run.toml"
    path.write_text(CONFIG)
    return path


def refuse(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    """Runs a command line that must fail; returns its exit code and its one line."""
    with pytest.raises(SystemExit) as caught:
        main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    assert captured.out == ""
    assert isinstance(caught.value.code, int)
    shown = ("starting Ray", "episodes ")  # the progress
    [line] = [line for line in captured.err.splitlines() if not line.startswith(shown)]
    return caught.value.code, line


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("search.simulation=3", "unknown key 'search.simulation'; did you mean 'search.simulations'?"),
        ("search.simulations=0", "search.simulations: Input should be greater than or equal to 1 (got 0)"),
        ("search.evaluator=oracle", "unknown evaluator 'oracle'"),
        ("env.entry_point=envs.nowhere:Env", "cannot import 'envs.nowhere'"),
        ("env.entry_point=envs.gym:Nothing", "module 'envs.gym' has no 'Nothing'"),
        ("env.args.knob=1", "knob"),
    ],
)
def test_a_bad_setting_is_named(
    config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], override: str, message: str
) -> None:
    output = tmp_path / "runs"
    code, line = refuse(capsys, "run", config, "--set", f"output={output}", "--set", override)
    assert code == 2
    assert line.startswith("rollout: config error: ")
    assert message in line
    assert not output.exists()


def test_an_output_folder_that_cannot_be_written(config: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, line = refuse(capsys, "run", config, "--set", "output=/proc/runs")
    assert code == 1
    assert line.startswith("rollout: sink error: cannot write to the output folder /proc/runs")


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("process", r"the process engine cannot run here: .*apt-get install bubblewrap"),
        ("microvm", r"the microvm engine cannot run here: .*apt-get install qemu"),
        ("auto", r"no engine with a wall can run here: .*qemu.*bubblewrap.*'inline'"),
    ],
)
def test_an_engine_that_this_machine_lacks(
    config: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, kind: str, message: str
) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    code, line = refuse(capsys, "run", config, "--set", f"engine.kind={kind}", "--set", "output=/dev/null/x")
    assert code == 1
    assert re.match(f"rollout: boot error: {message}", line)


def test_a_config_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    code, line = refuse(capsys, "run", "nowhere.toml")
    assert code == 2
    assert line == "rollout: config error: cannot read the config nowhere.toml: No such file or directory"


def test_debug_shows_the_traceback_wherever_it_stands(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["--debug", "run", "nowhere.toml"], ["run", "nowhere.toml", "--debug"]):
        with pytest.raises(SystemExit) as caught:
            main(arguments)
        assert caught.value.code == 2
        assert "Traceback" in capsys.readouterr().err


def test_an_unknown_command_is_refused_and_help_lists_them_all(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(["frobnicate"])
    assert caught.value.code == 2
    assert "No such command 'frobnicate'" in capsys.readouterr().err
    with pytest.raises(SystemExit) as caught:
        main(["--help"])
    assert caught.value.code == 0
    listed = capsys.readouterr().out
    assert "Play episodes in sandboxes" in listed
    assert "--debug" in listed
