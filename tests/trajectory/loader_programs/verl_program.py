"""verl's own datasets read the exports, tokenise and collate them."""

from __future__ import annotations

import json

from omegaconf import OmegaConf
from tiny_model import make_tokenizer
from torch.utils.data import DataLoader
from verl.utils.dataset.multiturn_sft_dataset import MultiTurnSFTDataset
from verl.utils.dataset.rl_dataset import RLHFDataset, collate_fn

tokenizer = make_tokenizer()
settings = {
    "cache_dir": "verl-cache",
    "max_prompt_length": 512,
    "filter_overlong_prompts": True,
    "filter_overlong_prompts_workers": 1,
}
prompts = RLHFDataset("verl-rl/train.parquet", tokenizer, OmegaConf.create(settings))
batch = next(iter(DataLoader(prompts, batch_size=4, collate_fn=collate_fn)))
talks = MultiTurnSFTDataset("verl-sft/train.parquet", tokenizer, OmegaConf.create({"max_length": 256}))
second = talks[1]
print(
    json.dumps(
        {
            "prompts": len(prompts),
            "prompt": list(batch["raw_prompt"][3]),
            "reward_model": batch["reward_model"][3],
            "data_source": batch["data_source"][3],
            "index": int(batch["index"][3]),
            "talks": len(talks),
            "shape": list(second["input_ids"].shape),
            "trained": tokenizer.decode(second["input_ids"][second["loss_mask"].bool()]),
        }
    )
)
