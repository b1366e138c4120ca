"""Environments: Gymnasium's in sandboxes (`envs.gym`), and sandboxes as Gymnasium's (`envs.sandbox`).

Importing this package registers `rollout/Sandbox-v0` with Gymnasium, which from version 1.0 on loads no
plug-ins by itself: `import envs` before `gymnasium.make("rollout/Sandbox-v0", ...)`, or
`gymnasium.make("envs:rollout/Sandbox-v0", ...)`.
"""

import gymnasium

__all__ = ["SANDBOX_ID"]

SANDBOX_ID = "rollout/Sandbox-v0"

# Without Gymnasium's wrappers: order, checks and time limit are the guest's, and travel with a checkpoint.
gymnasium.register(
    SANDBOX_ID,
    entry_point="envs.sandbox:SandboxEnv",
    vector_entry_point="envs.sandbox_vector:SandboxVectorEnv",
    order_enforce=False,
    disable_env_checker=True,
)
