#!/usr/bin/env python
"""Expert iteration: search with a network, train it on the Parquet that the search wrote, and again.

    python scripts/expert_iteration.py --map 4x4
    ray job submit --address http://127.0.0.1:8265 --working-dir . -- python scripts/expert_iteration.py

Each iteration is a run as any other, on Ray, with its own folder: a Gumbel search over clones of slippery
FrozenLake, whose leaves this module's `evaluate` values (one call of the network for many trees). The
network then learns the search's improved policies (`policy_target`) and its n-step returns (`n_step_return`)
from the `steps` tables of the last runs. What is measured is the network alone, without search: the exact
return of the policy that always takes its likeliest action, by dynamic programming over the known table,
beside the exact optimum. The table is not used for anything else.

The value begins at a half everywhere: holes, which end an episode with nothing, then look bad at once, and
the search keeps off them until it finds the goal.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rollout.commands.bench_models import TableModel
from rollout.config import RunConfig, check_config
from rollout.fleet.cluster import cluster
from rollout.fleet.driver import play_run
from rollout.fleet.progress import Progress
from rollout.policy.leaves import Leaf
from rollout.trajectory import scan
from rollout.trajectory.storage import Location

Array = NDArray[np.float64]

HORIZONS = {"4x4": 100, "8x8": 200}
"""Gymnasium's time limit of each map, in steps."""
NUM_ACTIONS = 4


class Network:
    """One hidden layer over a one-hot observation; a policy and a value from 0 to 1.

    Args:
        weights: By name: `hidden` [num_states, h], `policy` [h, num_actions], `value` [h, 1]. There are
            no biases: they would carry what is learnt of one state to states that were never seen.
    """

    def __init__(self, weights: dict[str, Array]) -> None:
        self.weights = weights
        self._moments = {name: (np.zeros_like(w), np.zeros_like(w)) for name, w in weights.items()}
        self._num_updates = 0

    @classmethod
    def random(cls, num_states: int, num_hidden: int, rng: np.random.Generator) -> Network:
        """A uniform policy and a value of a half, everywhere."""
        return cls(
            {
                "hidden": rng.normal(size=(num_states, num_hidden)),
                "policy": np.zeros((num_hidden, NUM_ACTIONS)),
                "value": np.zeros((num_hidden, 1)),
            }
        )

    @classmethod
    def load(cls, path: str) -> Network:
        """From a file that `save` wrote."""
        with np.load(path) as file:
            return cls({name: file[name] for name in file.files})

    def save(self, path: Path) -> None:
        """Writes the weights."""
        np.savez(path, **self.weights)  # pyright: ignore[reportArgumentType]

    def forward(self, states: NDArray[np.int64]) -> tuple[Array, Array, Array]:
        """Hidden layer [n, h], policies [n, num_actions] and values [n] of n states."""
        w = self.weights
        hidden = np.tanh(w["hidden"][states])
        logits = hidden @ w["policy"]
        policy = np.exp(logits - logits.max(axis=1, keepdims=True))
        policy /= policy.sum(axis=1, keepdims=True)
        value = 1.0 / (1.0 + np.exp(-(hidden @ w["value"])[:, 0]))
        return hidden, policy, value

    def update(
        self, states: NDArray[np.int64], policies: Array, values: Array, *, learning_rate: float
    ) -> None:
        """One step of Adam on the cross-entropies of policy and value."""
        w, n = self.weights, len(states)
        hidden, policy, value = self.forward(states)
        of_logits = (policy - policies) / n
        of_value = (value - values)[:, None] / n
        of_hidden = (of_logits @ w["policy"].T + of_value @ w["value"].T) * (1.0 - hidden**2)
        in_hidden = np.zeros_like(w["hidden"])
        np.add.at(in_hidden, states, of_hidden)
        gradients = {
            "hidden": in_hidden,
            "policy": hidden.T @ of_logits,
            "value": hidden.T @ of_value,
        }
        self._num_updates += 1
        for name, gradient in gradients.items():
            first, second = self._moments[name]
            first += 0.1 * (gradient - first)
            second += 0.001 * (gradient**2 - second)
            step = first / (1.0 - 0.9**self._num_updates)
            w[name] -= learning_rate * step / (np.sqrt(second / (1.0 - 0.999**self._num_updates)) + 1e-8)


@lru_cache(maxsize=2)
def _network(path: str) -> Network:
    return Network.load(path)


def evaluate(leaves: Sequence[Leaf], weights: str) -> list[tuple[float, list[float]]]:
    """The search's evaluator: value and prior of each leaf, in one pass.

    Args:
        leaves: Of any number of trees.
        weights: File of the network; another name for each version of it.
    """
    states = np.array([leaf.step.observation for leaf in leaves], np.int64)
    _, policies, values = _network(weights).forward(states)
    return list(zip(values.tolist(), policies.tolist(), strict=True))


@dataclass(frozen=True, slots=True)
class Examples:
    """What a run teaches: states [n], policies [n, num_actions], values [n]."""

    states: NDArray[np.int64]
    policies: Array
    values: Array


def read_examples(folder: Location) -> Examples:
    """Every step of a run that was searched, from its Parquet."""
    columns = ["observation", "policy_target", "n_step_return"]
    rows = [row for row in scan(folder, "steps", columns).to_table().to_pylist() if row["policy_target"]]
    return Examples(
        np.array([row["observation"] for row in rows], np.int64),
        np.array([row["policy_target"] for row in rows], np.float64).reshape(-1, NUM_ACTIONS),
        np.array([row["n_step_return"] for row in rows], np.float64),
    )


def train(network: Network, runs: Sequence[Examples], options: Options, rng: np.random.Generator) -> None:
    """Minibatches drawn evenly from all steps of the runs."""
    states = np.concatenate([run.states for run in runs])
    policies = np.concatenate([run.policies for run in runs])
    values = np.clip(np.concatenate([run.values for run in runs]), 0.0, 1.0)
    for _ in range(options.updates):
        rows = rng.integers(len(states), size=options.minibatch)
        network.update(states[rows], policies[rows], values[rows], learning_rate=options.learning_rate)


@dataclass(frozen=True, slots=True)
class Options:
    """What is played and how it is learnt; see `parse` for the meaning."""

    map: str = "4x4"
    slippery: bool = True
    iterations: int = 20
    episodes: int = 16
    simulations: int = 24
    window: int = 6
    updates: int = 300
    minibatch: int = 256
    learning_rate: float = 3e-3
    hidden: int = 256
    seed: int = 0
    output: str = "runs"
    plot: str = ""
    stop_at: float = 0.0


def parse(arguments: Sequence[str] | None = None) -> Options:
    """Reads the command line."""
    default = Options()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--map", choices=sorted(HORIZONS), default=default.map)
    parser.add_argument("--slippery", action=argparse.BooleanOptionalAction, default=default.slippery)
    for name, text in (
        ("iterations", "rounds of search and training"),
        ("episodes", "episodes of a round"),
        ("simulations", "simulations a move"),
        ("window", "rounds whose steps are trained on"),
        ("updates", "minibatches of a round"),
        ("minibatch", "steps of a minibatch"),
        ("hidden", "width of the hidden layer"),
    ):
        parser.add_argument(f"--{name}", type=_positive, default=getattr(default, name), help=text)
    parser.add_argument("--seed", type=int, default=default.seed)
    parser.add_argument("--learning-rate", type=float, default=default.learning_rate)
    parser.add_argument("--stop-at", type=float, default=0.0, help="stop at this share of the optimum")
    parser.add_argument("--output", default=default.output, help="folder of the runs")
    parser.add_argument("--plot", default="", help="draw the curve into this .svg or .png")
    return Options(**vars(parser.parse_args(arguments)))


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {number}")
    return number


def run_config(options: Options, iteration: int, weights: Path) -> RunConfig:
    """The run of one iteration."""
    kwargs = {"map_name": options.map, "is_slippery": options.slippery}
    return check_config(
        {
            "seed": options.seed + iteration,
            "episodes": options.episodes,
            "output": options.output,
            "env": {
                "args": {
                    "env_id": "FrozenLake-v1",
                    "kwargs": kwargs,
                    "max_episode_steps": HORIZONS[options.map],
                }
            },
            "engine": {"kind": "inline"},
            "search": {
                "algorithm": "gumbel",
                "simulations": options.simulations,
                "wave": 8,
                "discount": 0.99,
                "backup": "expectation",
                "outcomes": "widening",
                "outcome_k": 2.0,
                "evaluation_weight": 2.0,
                "evaluator": f"{Path(__file__).stem}:evaluate",
                "evaluator_args": {"weights": str(weights)},
                "n_step": 8,
            },
            "fleet": {"concurrent_episodes": 16, "concurrent_branches": 16, "batch": 64},
            "sink": {"record_nodes": False},
        }
    )


@dataclass(frozen=True, slots=True)
class Point:
    """The network after an iteration.

    Attributes:
        iteration: 0 is before the first.
        seconds: Since the beginning.
        greedy: Exact return of its likeliest actions, without search.
        searched: Mean return of the search's own episodes; None before the first.
    """

    iteration: int
    seconds: float
    greedy: float
    searched: float | None


def exact_returns(options: Options) -> tuple[float, float, Callable[[Network], float]]:
    """The optimum, random play, and the exact return of a network's greedy policy, on the known table."""
    horizon = HORIZONS[options.map]
    kwargs: dict[str, Any] = {"map_name": options.map, "is_slippery": options.slippery}
    model = TableModel.of_gymnasium("FrozenLake-v1", horizon, **kwargs)
    size = int(options.map.split("x")[0]) ** 2

    def greedy(network: Network) -> float:
        actions = network.forward(np.arange(size))[1].argmax(axis=1).tolist()
        return model.policy_value(lambda state: actions[state.cell])

    return model.optimal_values()[horizon][0], model.random_value(), greedy


def learn(options: Options, clock: Callable[[], float] = time.perf_counter) -> list[Point]:
    """The whole loop; writes `curve.json` beside the runs after every iteration."""
    folder = Path(options.output)
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(options.seed)
    network = Network.random(int(options.map.split("x")[0]) ** 2, options.hidden, rng)
    optimum, random_play, greedy = exact_returns(options)
    start_s = clock()
    points = [Point(0, 0.0, greedy(network), None)]
    print(f"exact optimum {optimum:.4f}, random play {random_play:.4f}", flush=True)
    runs: list[Examples] = []
    with cluster(1):
        for iteration in range(1, options.iterations + 1):
            weights = (folder / f"network-{options.seed}-{iteration}.npz").absolute()
            network.save(weights)
            config = run_config(options, iteration, weights)
            run_id = f"expert-{options.map}-{options.seed}-{iteration}-{int(time.time() * 1000):x}"
            run = asyncio.run(play_run(config, run_id, Progress(config.episodes)))
            runs = [*runs, read_examples(run)][-options.window :]
            train(network, runs, options, rng)
            returns = scan(run, "episodes", ["return"]).to_table()["return"].to_pylist()
            graded = [value for value in returns if value is not None]
            point = Point(iteration, clock() - start_s, greedy(network), sum(graded) / max(1, len(graded)))
            points.append(point)
            print(
                f"{iteration:3}  {point.seconds:6.1f} s  {len(runs[-1].states):5} steps  "
                f"search {point.searched:.3f}  greedy {point.greedy:.4f} "
                f"({point.greedy / optimum:.0%} of the optimum)",
                flush=True,
            )
            curve = {"optimum": optimum, "random": random_play, "options": asdict(options)}
            text = json.dumps({**curve, "points": [asdict(each) for each in points]}, indent=1)
            (folder / f"curve-{options.map}.json").write_text(text + "\n", encoding="utf-8")
            if options.stop_at and point.greedy >= options.stop_at * optimum:
                break
    network.save(folder / f"network-{options.seed}.npz")
    if options.plot:
        draw(points, optimum, random_play, options)
    return points


def draw(points: Sequence[Point], optimum: float, random_play: float, options: Options) -> None:
    """The curve, as a picture."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.add_subplot()
    minutes = [point.seconds / 60 for point in points]
    axes.axhline(optimum, color="#444", linewidth=1, label=f"exact optimum {optimum:.3f}")
    axes.axhline(0.8 * optimum, color="#444", linewidth=1, linestyle=":", label="80% of it")
    axes.axhline(
        random_play, color="#b33", linewidth=1, linestyle="--", label=f"random play {random_play:.3f}"
    )
    axes.plot(minutes, [point.greedy for point in points], marker="o", label="network alone, exact return")
    searched = [(m, point.searched) for m, point in zip(minutes, points, strict=True) if point.iteration]
    axes.plot(*zip(*searched, strict=True), alpha=0.4, label=f"with search, {options.episodes} episodes")
    axes.set(xlabel="minutes", ylabel="return", title=f"FrozenLake {options.map}, expert iteration")
    axes.set_ylim(bottom=0)
    axes.legend(fontsize=8)
    figure.savefig(options.plot)


if __name__ == "__main__":
    learn(parse())
