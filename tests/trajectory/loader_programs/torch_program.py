"""The reader's batches become tensors as they are, from a scan and from Ray Data."""

from __future__ import annotations

import json

import ray
import torch

from rollout.fleet.data import to_ray
from rollout.trajectory import scan

columns = ["observation", "t", "state_hash"]
batches = list(scan("run", "steps", columns).to_numpy_batches(batch_size=10))
tensors = [torch.as_tensor(batch["observation"].copy()) for batch in batches]
found = {
    "shape": list(torch.cat(tensors).shape),
    "dtype": str(tensors[0].dtype),
    "sum": float(torch.cat(tensors).sum()),
}
ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
data = to_ray(scan("run", "steps", ["observation", "t"]))
rows = [batch["observation"] for batch in data.iter_torch_batches(batch_size=10)]
found["ray_shape"], found["ray_sum"] = list(torch.cat(rows).shape), float(torch.cat(rows).sum())
ray.shutdown()
print(json.dumps(found))
