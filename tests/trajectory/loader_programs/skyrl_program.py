"""SkyRL's own dataset reads the export, tokenises and collates it."""

from __future__ import annotations

import json

from skyrl.train.dataset.dataset import PromptDataset
from tiny_model import make_tokenizer

prompts = PromptDataset(["skyrl/train.parquet"], make_tokenizer(), max_prompt_length=512, num_workers=1)
[fourth] = prompts.collate_fn([prompts[3]])
print(json.dumps({"rows": len(prompts), **fourth}))
