"""Configuration: a TOML file to one frozen, checked model.

Every key is documented where it is defined. Nothing here touches the machine: whether an engine or an
environment exists is found out by who uses it.
"""

from __future__ import annotations

import difflib
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, cast

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from rollout.errors import ConfigError
from rollout.types import RngPolicy

__all__ = [
    "EngineConfig",
    "EnvConfig",
    "FleetConfig",
    "ImageConfig",
    "RunConfig",
    "SearchConfig",
    "SinkConfig",
    "check_config",
    "load_config",
]


def _absolute(path: str) -> str:
    """A path that means the same from wherever the run is resumed."""
    return str(Path(path).expanduser().absolute()) if path else path


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class EnvConfig(_Section):
    """Which environment is played. Unknown keys of `args` are refused by the environment class itself."""

    entry_point: Annotated[str, Field(pattern=r"^[\w.]+:\w+$")] = "envs.gym:GymEnv"
    """The `Env` class, as `module:class`."""
    args: dict[str, Any] = Field(default_factory=dict[str, Any])
    """Keyword arguments of that class; for GymEnv: env_id, kwargs, max_episode_steps."""


class ImageConfig(_Section):
    """The guest image of the microvm engine."""

    name: str = "default"
    """Name under which `rollout image build` keeps it, or its digest."""
    packages: tuple[str, ...] = ()
    """Debian packages beside the default ones."""
    wheels: tuple[str, ...] = ()
    """Python requirements beside the default ones (msgpack, numpy, gymnasium at the host's versions)."""
    warm_up: tuple[str, ...] = ()
    """Shell commands run once in the guest before its base is saved."""


class EngineConfig(_Section):
    """Which sandboxes episodes are played in."""

    kind: Literal["auto", "inline", "process", "microvm"] = "auto"
    """`auto` takes the strongest wall that this machine has: microvm, then process. Never inline."""
    accel: Literal["auto", "kvm", "tcg"] = "auto"
    """Accelerator of microVMs; `auto` probes whether KVM really boots Linux here."""
    memory_mib: Annotated[int, Field(ge=64, le=65536)] = 768
    """Memory of a microVM, or the limit of a process sandbox."""
    max_sandboxes: Annotated[int, Field(ge=1)] = 1024
    """Live sandboxes on one host; a fork beyond it waits or fails with a CapacityError."""
    boot_timeout_s: Annotated[float, Field(gt=0)] = 120.0
    """Deadline of a boot."""
    fork_timeout_s: Annotated[float, Field(gt=0)] = 30.0
    """Deadline of a fork, handshake included."""
    call_timeout_s: Annotated[float, Field(gt=0)] = 60.0
    """Deadline of one call to the guest."""
    checkpoint_timeout_s: Annotated[float, Field(gt=0)] = 30.0
    """Deadline of a checkpoint."""
    cpu_share: Annotated[float, Field(gt=0)] | None = None
    """Steady share of a core of each microVM, by control groups; unset: no limit."""
    boost_share: Annotated[float, Field(gt=0)] = 1.0
    """Share of a core of a new clone, for `boost_s`, where `cpu_share` is set."""
    boost_s: Annotated[float, Field(ge=0)] = 2.0
    """How long a new clone has its `boost_share`."""
    memory_ceiling_mib: Annotated[int, Field(ge=64)] | None = None
    """Memory that a microVM and its VMM may use of their own, by control groups; beyond it, it is ended."""
    hibernate_after_s: Annotated[float, Field(gt=0)] | None = 300.0
    """Idle time after which a microVM gives its memory back, until its next request."""
    memory_reserve_mib: Annotated[int, Field(ge=0)] = 1024
    """With less memory than this available, the microVMs that were idle longest hibernate at once."""
    reuse_vmms: bool = True
    """Put the process of a microVM that has ended back to the next checkpoint, instead of starting another.

    Several times faster. A guest that has broken out into its VMM would meet the next guest there. Without it
    nothing of a VMM is shared with another either: each loads QEMU for itself and, under TCG, translates all
    code, instead of being a fork of a process that has done so, which takes four times as long and more than
    twice the memory.
    """
    python_path: tuple[str, ...] = ()
    """Folders with further modules for sandboxes of the process engine, which see only installed packages."""
    checkpoint_budget_bytes: Annotated[int, Field(ge=1 << 20)] = 4 << 30
    """What the checkpoints of one host may hold, in bytes."""


class SearchConfig(_Section):
    """How a move is chosen. Formulas and sources stand in the modules of `rollout.search`."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    algorithm: Literal[
        "uct", "puct", "gumbel", "ab_mcts", "best_of_n", "beam", "revision", "breadth_first", "random"
    ] = "uct"
    """`random` plays uniformly, without a search: the baseline."""
    simulations: Annotated[int, Field(ge=1)] = 64
    """Simulations a move."""
    wave: Annotated[int, Field(ge=1)] = 8
    """Trials in flight at once.

    With `deterministic` a seed gives one tree for each wave, whatever the workers.
    """
    deterministic: bool = True
    """Commit outcomes in the order of asking, a whole wave at a time; otherwise as they come."""
    in_flight: Literal["wu", "virtual_loss"] = "wu"
    """How trials in flight count: as visits only (WU-UCT), or as visits and lost value (KataGo)."""
    ensemble: Annotated[int, Field(ge=1)] = 1
    """Root-parallel trees: each gets its share of the simulations, and their root visits are added up."""
    discount: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Discount of rewards, in the search and in returns that it is trained towards."""
    return_bounds: tuple[float, float] | None = None
    """Lowest and highest return possible, where known: for proofs and virtual loss."""

    exploration: Annotated[float, Field(ge=0)] = 1.4142135623730951
    """UCT's c."""
    pb_c_init: Annotated[float, Field(ge=0)] = 1.25
    """PUCT's c1."""
    pb_c_base: Annotated[float, Field(gt=0)] = 19652.0
    """PUCT's c2."""
    normalise: Literal["auto", "none", "siblings", "tree"] = "auto"
    """Range of action values in the tree policy; `auto`: none for UCT, siblings for PUCT (as in mctx)."""
    first_play: Literal["lowest", "parent"] = "lowest"
    """PUCT's value of an unvisited action: 0 after normalisation, or the parent's value reduced."""
    first_play_reduction: Annotated[float, Field(ge=0)] = 0.2
    """The parent's value is reduced by this times the root of the visited actions' prior mass."""
    tie_noise: Annotated[float, Field(ge=0)] = 0.0
    """UCT and PUCT: ties are broken by noise of this size (mctx has 1e-7); 0: by the order of actions."""
    dirichlet_alpha: Annotated[float, Field(gt=0)] = 0.3
    """Concentration of the noise on the root's prior."""
    dirichlet_fraction: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Share of the noise in the root's prior; 0 is none."""
    considered_actions: Annotated[int, Field(ge=1)] = 16
    """Gumbel: root actions that sequential halving begins with."""
    gumbel_scale: Annotated[float, Field(ge=0)] = 1.0
    """Gumbel: scale of the root's noise; 0 for a deterministic choice (evaluation)."""
    c_visit: Annotated[float, Field(ge=0)] = 50.0
    """Gumbel: sigma(q) = (c_visit + max N) * c_scale * q."""
    c_scale: Annotated[float, Field(gt=0)] = 0.1
    """Gumbel: as above."""
    width: Annotated[int, Field(ge=1)] = 4
    """Beam: states that are kept at each depth."""
    branching: Annotated[int, Field(ge=1)] = 4
    """Beam and breadth-first: proposals at each open-ended state; listed actions are all tried."""
    score_prior: Literal["normal", "beta"] = "normal"
    """AB-MCTS: what scores are thought to come from; `beta` needs scores from 0 to 1."""

    backup: Literal["auto", "mean", "max", "best", "mixed", "expectation"] = "auto"
    """V(s) from its actions; `auto`: best for best_of_n, beam, revision and breadth_first, else mean.

    `best` is the max of its actions and its own evaluation: an answer can be good whatever follows it.

    `expectation` (DP-UCT) is right for stochastic environments, together with `outcomes = "widening"`.
    """
    mixed_weight: Annotated[float, Field(ge=0, le=1)] = 0.5
    """Weight of the max in the mixed backup."""
    evaluation_weight: Annotated[float, Field(ge=0)] = 0.0
    """Visits that a state's own evaluation counts for in each action's value, where a max is taken.

    Against the optimism of a max over few samples; good where the evaluator is.
    """
    outcomes: Literal["single", "widening"] = "single"
    """Outcomes of an action: one (a deterministic environment), or chance nodes by double widening."""
    outcome_k: Annotated[float, Field(gt=0)] = 1.0
    """A fresh branch is drawn while an action has had fewer than k * N^alpha of them."""
    outcome_alpha: Annotated[float, Field(ge=0, le=1)] = 0.5
    """As above."""
    action_k: Annotated[float, Field(ge=0)] = 0.0
    """Progressive widening: another action is tried while fewer than k * N^alpha are; 0 is no limit."""
    action_alpha: Annotated[float, Field(ge=0, le=1)] = 0.5
    """As above."""
    transpositions: bool = False
    """Join paths that lead to equal states (by state hash, at equal depth)."""
    proofs: bool = False
    """Carry final returns, which the environment declares, up the tree as proofs."""
    common_random_numbers: bool = False
    """Siblings get equal seeds at equal draws, so that their difference is less noisy."""

    move: Literal["auto", "visits", "value"] = "auto"
    """The played move: most visits or largest value; `auto`: visits, or value where the backup has a max."""
    temperature: Annotated[float, Field(ge=0)] = 0.0
    """Above 0 the move is drawn in proportion to visits^(1/temperature)."""

    tree_reuse: bool = False
    """Go on with what is known below the played move, with its exact counts, where the state that the move
    really led to (by state hash) is in the tree; else, and by default, each move has a fresh tree.
    """
    n_step: Annotated[int, Field(ge=0)] = 0
    """Rewards in the `n_step_return` of a step, before the search's value of the state after them; 0 takes
    all rewards up to the end of the episode.
    """

    evaluator: str = "playout"
    """Leaf values: `playout` (random, in the guest), `truncated` (`playout_horizon` random actions, then
    `bootstrap`), `zero`, or `module:function`, which is called with batches of leaves of many trees and gives
    values and priors (see `rollout.policy.model`).
    """
    evaluator_args: dict[str, Any] = Field(default_factory=dict[str, Any])
    """Keyword arguments of that function."""
    evaluator_batch: Annotated[int, Field(ge=1)] = 256
    """Leaves that make a call of that function worth while: it is made at once."""
    evaluator_wait_s: Annotated[float, Field(ge=0)] = 0.002
    """How long a search waits for others to join a call; it waits for none that is not playing."""
    bootstrap: str = "zero"
    """Values of the states that truncated playouts end in: `zero` or `module:function`."""
    playout_horizon: Annotated[int, Field(ge=1)] = 100
    """Longest playout, in steps."""
    randomness: RngPolicy = RngPolicy.SEEDED
    """What clones do with their generators.

    `inherit` lets the search see the future: for experiments only.
    """
    max_retries: Annotated[int, Field(ge=0)] = 2
    """How often a failed branch is tried again before its action is given up."""

    @property
    def wants_state_hash(self) -> bool:
        """Whether the search compares states, so that branches must report their digests."""
        return self.transpositions or self.tree_reuse or self.outcomes == "widening"

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.proofs and self.outcomes != "single":
            raise ValueError("proofs need outcomes = 'single': a sampled outcome proves nothing")
        if self.transpositions and self.algorithm not in ("uct", "puct", "gumbel"):
            raise ValueError(f"transpositions need uct, puct or gumbel, not {self.algorithm}")
        is_raw = self.normalise == "none" or (self.normalise == "auto" and self.algorithm == "uct")
        if self.in_flight == "virtual_loss" and is_raw and self.return_bounds is None:
            raise ValueError("virtual_loss needs return_bounds or a normalisation: how bad is a loss?")
        if self.return_bounds is not None and not self.return_bounds[0] < self.return_bounds[1]:
            raise ValueError(f"return_bounds must rise, got {self.return_bounds}")
        return self


class FleetConfig(_Section):
    """How a run is spread over a Ray cluster."""

    hosts: Annotated[int, Field(ge=1)] = 1
    """Host actors, spread over the nodes in turn; more than one on a node only if there are too few nodes."""
    concurrent_episodes: Annotated[int, Field(ge=1)] = 2
    """Episodes played at once."""
    concurrent_branches: Annotated[int, Field(ge=1)] = 8
    """Branches in progress on one host; more wait in its queue."""
    batch: Annotated[int, Field(ge=1)] = 16
    """Most branch jobs in one call to a host."""
    lease_s: Annotated[float, Field(gt=0)] = 15.0
    """A host whose driver is silent for so long kills its sandboxes and ends."""
    max_attempts: Annotated[int, Field(ge=1)] = 3
    """How often an episode is begun before it is recorded as failed."""


class SinkConfig(_Section):
    """How trajectories are written."""

    record_nodes: bool = True
    """Write the `nodes` table: every node of every search."""
    roll_rows: Annotated[int, Field(ge=1)] = 1_000_000
    """Rows (of all tables together) after which a log becomes Parquet files."""
    roll_bytes: Annotated[int, Field(ge=1 << 16)] = 64 << 20
    """Bytes, as columns in memory, after which it does so; a writer needs a few times as much memory."""
    roll_s: Annotated[float, Field(gt=0)] = 30.0
    """Seconds after which it does so anyway."""
    log_folder: Annotated[str, AfterValidator(_absolute)] = ""
    """Local folder of the write-ahead logs.

    By default they lie in the run's own folder, or in the user's cache if that is in an object store.
    """


class RunConfig(_Section):
    """One run."""

    seed: Annotated[int, Field(ge=0, lt=1 << 63)] = 0
    """Every random choice of the run derives from it."""
    episodes: Annotated[int, Field(ge=1)] = 8
    """Episodes to play; tasks are taken in turn."""
    max_steps: Annotated[int, Field(ge=1)] = 1000
    """An episode is truncated after so many moves, whatever its environment says."""
    output: str = "runs"
    """Gets the run's own folder: a local folder, or a URI of `pyarrow.fs` such as `s3://bucket/runs`."""
    env: EnvConfig = EnvConfig()
    image: ImageConfig = ImageConfig()
    engine: EngineConfig = EngineConfig()
    search: SearchConfig = SearchConfig()
    fleet: FleetConfig = FleetConfig()
    sink: SinkConfig = SinkConfig()


def load_config(path: str | Path, overrides: Sequence[str] = ()) -> RunConfig:
    """Reads a TOML file and applies `--set` overrides such as `search.simulations=64`.

    Raises:
        ConfigError: The file is missing or not TOML, a key is unknown (the nearest valid one is named), or a
            value is mistyped or out of range.
    """
    try:
        tree = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"cannot read the config {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from error
    for override in overrides:
        _apply_override(tree, override)
    return check_config(tree)


def check_config(tree: Mapping[str, Any]) -> RunConfig:
    """The configuration that a tree of sections and keys stands for.

    Raises:
        ConfigError: A key is unknown (the nearest valid one is named), or a value is mistyped or out of
            range.
    """
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        raise ConfigError(_one_line(error)) from None


def _apply_override(tree: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    if not equals or not all(key.split(".")):
        raise ConfigError(f"--set wants section.key=value, got {override!r}")
    try:
        value: object = tomllib.loads(f"v = {text}")["v"]
    except tomllib.TOMLDecodeError:
        value = text  # a bare word is a string, as users expect of a command line
    *sections, last = key.split(".")
    for section in sections:
        inner = tree.setdefault(section, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"--set {key}: {section!r} is a value, not a section")
        tree = cast("dict[str, Any]", inner)
    tree[last] = value


def _one_line(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    location = [str(part) for part in first["loc"]]
    name = ".".join(location)
    if first["type"] == "extra_forbidden":
        nearest = difflib.get_close_matches(location[-1], _keys_of(location[:-1]), n=1, cutoff=0.0)
        hint = f"; did you mean {'.'.join([*location[:-1], nearest[0]])!r}?" if nearest else ""
        return f"unknown key {name!r}{hint}"
    if first["type"] == "value_error":  # of a section as a whole, which is too long to be repeated
        return f"{name}: {first['msg'].removeprefix('Value error, ')}"
    return f"{name}: {first['msg']} (got {first['input']!r})"


def _keys_of(sections: Sequence[str]) -> list[str]:
    model: type[BaseModel] = RunConfig
    for section in sections:
        annotation = model.model_fields[section].annotation
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return []
        model = annotation
    return list(cast("Mapping[str, object]", model.model_fields))
