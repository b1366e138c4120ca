"""TRL's own trainers prepare each export, collate it, and take one step of training on it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import datasets
from tiny_model import save_model
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, SFTConfig, SFTTrainer

TRAINERS: dict[str, tuple[Any, Any]] = {
    "trl-sft": (SFTTrainer, SFTConfig),
    "trl-dpo": (DPOTrainer, DPOConfig),
    "trl-kto": (KTOTrainer, KTOConfig),
}
SETTINGS: dict[str, Any] = {
    "max_steps": 1,
    "per_device_train_batch_size": 2,
    "report_to": [],
    "save_strategy": "no",
    "use_cpu": True,
    "disable_tqdm": True,
}

tokenizer = save_model(Path("model"))
found: dict[str, Any] = {}
for name, (trainer_class, config_class) in TRAINERS.items():
    data = datasets.load_dataset("parquet", data_files=f"{name}/train.parquet", split="train")
    trainer = trainer_class(
        model="model",
        args=config_class(output_dir=f"out-{name}", **SETTINGS),
        train_dataset=data,
        processing_class=tokenizer,
    )
    trained = trainer.train()
    prepared = trainer.train_dataset
    ids = {key: tokenizer.decode(prepared[0][key]) for key in prepared.column_names if key.endswith("ids")}
    found[name] = {
        "rows": len(prepared),
        "steps": trained.global_step,
        "loss": trained.training_loss,
        "text": ids,
    }
print(json.dumps(found))
