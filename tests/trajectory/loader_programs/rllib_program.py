"""RLlib's offline data reads the export, makes episodes of it, and behaviour cloning trains on them."""

from __future__ import annotations

import json
from pathlib import Path

import gymnasium
import ray
from ray.rllib.algorithms.bc import BCConfig

ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
config = (
    BCConfig()
    .environment(
        observation_space=gymnasium.spaces.Box(-10, 10, (4,)), action_space=gymnasium.spaces.Discrete(4)
    )
    .env_runners(num_env_runners=0)
    .offline_data(
        input_=[str(Path("rllib/train.parquet").absolute())],
        dataset_num_iters_per_learner=1,
        map_batches_kwargs={"concurrency": 1},
    )
    .training(train_batch_size_per_learner=8)
)
algorithm = config.build()
num_rows = algorithm.offline_data.data.count()
learner = algorithm.train()["learners"]["default_policy"]
algorithm.stop()
ray.shutdown()
found = {"rows": num_rows, "steps": learner["num_module_steps_trained"], "loss": learner["policy_loss"]}
print(json.dumps(found, default=float))
