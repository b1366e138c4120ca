"""The script that alternates search and training: what it reads, what it learns, what it leaves."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from gymnasium.spaces import Discrete

from rollout.runner import play_locally
from rollout.trajectory import scan
from rollout.trajectory.sink import TrajectorySink
from rollout.types import Step

SCRIPTS = Path(__file__).parent.parent / "scripts"


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(SCRIPTS))


def test_a_network_learns_what_it_is_shown() -> None:
    import expert_iteration as script

    rng = np.random.default_rng(0)
    network = script.Network.random(16, 32, rng)
    states = np.arange(16)
    _, policy, value = network.forward(states)
    assert policy == pytest.approx(np.full((16, 4), 0.25))
    assert value == pytest.approx(np.full(16, 0.5))
    wanted, worth = np.eye(4)[states % 4], states / 15
    for _ in range(400):
        network.update(states, wanted, worth, learning_rate=1e-2)
    _, policy, value = network.forward(states)
    assert (policy.argmax(axis=1) == states % 4).all()
    assert value == pytest.approx(worth, abs=0.1)


def test_a_step_of_training_follows_the_gradient() -> None:
    """Adam's first step has the sign of the gradient, which finite differences know too."""
    import expert_iteration as script

    rng = np.random.default_rng(1)
    states, policies, values = np.array([0, 3, 3]), rng.dirichlet([1] * 4, 3), rng.random(3)
    network = script.Network(
        {n: rng.normal(size=w.shape) for n, w in script.Network.random(5, 6, rng).weights.items()}
    )

    def loss() -> float:
        _, p, v = network.forward(states)
        return float(
            -(policies * np.log(p)).sum(axis=1).mean()
            - (values * np.log(v) + (1 - values) * np.log(1 - v)).mean()
        )

    expected = {}
    for name, weight in network.weights.items():
        slopes = np.zeros_like(weight)
        for index in np.ndindex(weight.shape):
            weight[index] += 1e-5
            up = loss()
            weight[index] -= 2e-5
            slopes[index] = (up - loss()) / 2e-5
            weight[index] += 1e-5
        expected[name] = slopes
    before = {name: weight.copy() for name, weight in network.weights.items()}
    network.update(states, policies, values, learning_rate=1e-3)
    for name, slopes in expected.items():
        is_sloped = abs(slopes) > 1e-6
        assert is_sloped.any()
        assert (np.sign(before[name] - network.weights[name])[is_sloped] == np.sign(slopes[is_sloped])).all()


def test_a_network_is_the_same_after_a_file(tmp_path: Path) -> None:
    import expert_iteration as script

    from rollout.policy.leaves import Leaf

    network = script.Network.random(16, 8, np.random.default_rng(2))
    network.weights["policy"] += 1.0 * np.arange(4)
    network.save(tmp_path / "network.npz")
    leaves = [Leaf(Step(3), (0, 1, 2, 3)), Leaf(Step(9), (0, 1, 2, 3))]
    answers = script.evaluate(leaves, str(tmp_path / "network.npz"))
    _, policy, value = network.forward(np.array([3, 9]))
    assert [answer[0] for answer in answers] == value.tolist()
    assert [answer[1] for answer in answers] == policy.tolist()


async def test_two_rounds_learn_the_dry_lake_from_parquet(tmp_path: Path) -> None:
    """As the script does it, but for Ray: the same runs, rows, files and training."""
    import expert_iteration as script

    options = script.Options(slippery=False, episodes=12, simulations=32, updates=200)
    optimum, random_play, greedy = script.exact_returns(options)
    assert (optimum, round(random_play, 4)) == (1.0, 0.0139)
    rng = np.random.default_rng(0)
    network = script.Network.random(16, options.hidden, rng)
    assert greedy(network) == 0.0
    runs = []
    for iteration in (1, 2):
        weights = tmp_path / f"network-{iteration}.npz"
        network.save(weights)
        config = script.run_config(options, iteration, weights)
        trajectories = await play_locally(config, tmp_path)
        assert {trajectory.episode.failure for trajectory in trajectories} == {None}
        folder = tmp_path / f"run-{iteration}"
        sink = TrajectorySink(
            folder, run_id=folder.name, observation_space=Discrete(16), action_space=Discrete(4)
        )
        await asyncio.to_thread(sink.write_many, trajectories)
        await asyncio.to_thread(sink.close)
        examples = script.read_examples(folder)
        assert len(examples.states) == sum(trajectory.episode.length for trajectory in trajectories)
        assert examples.policies.sum(axis=1) == pytest.approx(1.0)
        assert np.isfinite(examples.values).all()
        runs.append(examples)
        script.train(network, runs, options, rng)
    assert greedy(network) == optimum


@pytest.mark.ray
@pytest.mark.slow
def test_the_script_runs_on_ray_and_writes_its_curve(tmp_path: Path) -> None:
    arguments = ["--iterations", "1", "--episodes", "2", "--simulations", "8", "--no-slippery"]
    command = [sys.executable, str(SCRIPTS / "expert_iteration.py"), *arguments, "--output", str(tmp_path)]
    subprocess.run(command, check=True, timeout=300, stdout=subprocess.DEVNULL)
    curve = json.loads((tmp_path / "curve-4x4.json").read_text())
    assert curve["optimum"] == 1.0
    assert [point["iteration"] for point in curve["points"]] == [0, 1]
    [run] = [path.parent for path in tmp_path.glob("*/run.json")]
    returns = scan(run, "episodes", ["return"]).to_table()["return"].to_pylist()
    assert curve["points"][1]["searched"] == sum(returns) / 2


@pytest.mark.parametrize("arguments", [["--map", "5x5"], ["--episodes", "0"], ["--episodes", "x"]])
def test_a_mistake_on_the_command_line_is_refused(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    import expert_iteration as script

    with pytest.raises(SystemExit):
        script.parse(arguments)
    assert arguments[0] in capsys.readouterr().err


def test_the_curve_is_drawn(tmp_path: Path) -> None:
    """In a process of its own: matplotlib keeps the files of its fonts open."""
    code = """if True:
        import sys
        import expert_iteration as script

        points = [script.Point(0, 0.0, 0.0, None), script.Point(1, 60.0, 0.5, 0.25)]
        for path in sys.argv[1:]:
            script.draw(points, 0.744, 0.014, script.Options(plot=path))
    """
    paths = [str(tmp_path / "curve.svg"), str(tmp_path / "curve.png")]
    subprocess.run([sys.executable, "-c", code, *paths], cwd=SCRIPTS, check=True, timeout=120)
    assert ElementTree.parse(paths[0]).getroot().tag.endswith("svg")
    assert Path(paths[1]).read_bytes().startswith(b"\x89PNG")
