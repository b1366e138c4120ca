from __future__ import annotations

import re
from pathlib import Path

import pytest

from rollout.config import RunConfig, load_config
from rollout.errors import ConfigError
from rollout.policy.evaluators import make_evaluator

CONFIGS = sorted((Path(__file__).parent.parent / "configs").glob("*.toml"))


def test_there_are_configs() -> None:
    assert any(path.name == "frozenlake.toml" for path in CONFIGS)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_config_is_valid(path: Path) -> None:
    config = load_config(path)
    assert make_evaluator(config.search).name == config.search.evaluator
    assert path.read_text().startswith("#"), "a config says what it is for"


def test_defaults_are_a_valid_config(tmp_path: Path) -> None:
    path = tmp_path / "empty.toml"
    path.write_text("")
    assert load_config(path) == RunConfig()


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        (
            "[search]\nsimulation = 3",
            [],
            "unknown key 'search.simulation'; did you mean 'search.simulations'?",
        ),
        (
            "",
            ["search.simulatoins=3"],
            "unknown key 'search.simulatoins'; did you mean 'search.simulations'?",
        ),
        ("[serach]\nwave = 1", [], "unknown key 'serach'; did you mean 'search'?"),
        ("[search]\nsimulations = 0", [], "search.simulations: .*greater than or equal to 1 .got 0."),
        ("[search]\nsimulations = 'many'", [], "search.simulations: .*valid integer"),
        (
            "",
            ["engine.kind=docker"],
            "engine.kind: .*'auto', 'inline', 'process' or 'microvm' .got 'docker'.",
        ),
        ("", ["search.discount=1.5"], "search.discount: .*less than or equal to 1"),
        ("", ["engine.checkpoint_budget_bytes=0"], "checkpoint_budget_bytes: .*greater than or equal to"),
        ("", ["search.evaluator_wait_s=-1"], "search.evaluator_wait_s: .*greater than or equal to 0"),
        ("", ["search.n_step=-1"], "search.n_step: .*greater than or equal to 0"),
        ("", ["env.entry_point=gym"], "env.entry_point: .*match"),
        ("", ["seed=-1"], "seed: .*greater than or equal to 0"),
        ("", ["search.simulations"], "--set wants section.key=value, got 'search.simulations'"),
        ("", ["search..wave=1"], "--set wants section.key=value"),
        ("seed = 1", ["seed.x=1"], "'seed' is a value, not a section"),
        ("seed = ", [], "is not valid TOML"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, text: str, overrides: list[str], message: str) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message) as caught:
        load_config(path, overrides)
    assert "\n" not in caught.value.message


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"cannot read the config {tmp_path}")):
        load_config(tmp_path)
    with pytest.raises(ConfigError, match=r"nowhere\.toml: No such file"):
        load_config(tmp_path / "nowhere.toml")


def test_overrides_win_and_keep_their_types(tmp_path: Path) -> None:
    path = tmp_path / "run.toml"
    path.write_text("seed = 1\n[search]\nsimulations = 8\n")
    overrides = [
        "search.simulations=64",
        "engine.kind=inline",
        "search.deterministic=false",
        "output=some/where",
    ]
    config = load_config(path, overrides)
    assert config.search.simulations == 64
    assert config.engine.kind == "inline"
    assert config.search.deterministic is False
    assert config.output == "some/where"
    assert config.seed == 1
