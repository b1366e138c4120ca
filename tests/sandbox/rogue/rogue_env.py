"""An environment that does whatever its action says: code runs where an environment's own code runs.

It is registered when it is imported, so that `gymnasium.make("rogue_env:Rogue-v0")` finds it.
"""

import string
from typing import Any

import gymnasium


class RogueEnv(gymnasium.Env[str, str]):
    """Runs Python code; the observation is what the code leaves in `result`, as text."""

    def __init__(self) -> None:
        self.observation_space = gymnasium.spaces.Text(1 << 16, min_length=0, charset=string.printable)
        self.action_space = gymnasium.spaces.Text(1 << 16, charset=string.printable)
        self.memory: dict[str, Any] = {}

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[str, dict[str, Any]]:
        super().reset(seed=seed)
        return "", {}

    def step(self, action: str) -> tuple[str, float, bool, bool, dict[str, Any]]:
        scope: dict[str, Any] = {"env": self, "memory": self.memory, "result": ""}
        exec(action, scope)
        return str(scope["result"]), 0.0, False, False, {}


gymnasium.register("Rogue-v0", RogueEnv, disable_env_checker=True, order_enforce=False)
