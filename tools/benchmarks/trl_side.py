"""TRL's half of beside_trl.py, run by the Python that has TRL: it imports nothing of this package.

    python trl_side.py sft|grpo SETTINGS.json OUT.json

Writes the loss and the seconds of every step.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer, SFTConfig, SFTTrainer


class Clock(TrainerCallback):
    """Seconds by the clock of each optimizer step, and its loss."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.losses: list[float] = []
        self._start = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._start = time.perf_counter()

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.seconds.append(time.perf_counter() - self._start)

    def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
        if "loss" in logs:
            self.losses.append(float(logs["loss"]))


def main() -> None:
    kind, settings, out = sys.argv[1], json.loads(Path(sys.argv[2]).read_text()), Path(sys.argv[3])
    torch.set_num_threads(settings["threads"])
    rows = [json.loads(line) for line in Path(settings["data"]).read_text().splitlines()]
    clock = Clock()
    trainer = sft_trainer if kind == "sft" else grpo_trainer
    trainer(rows, settings, clock).train()
    out.write_text(json.dumps({"seconds": clock.seconds, "losses": clock.losses}))


def common(settings: dict[str, Any]) -> dict[str, Any]:
    """What makes a step of TRL's the same work: fp32, AdamW, no file written."""
    return {
        "output_dir": settings["run_dir"],
        "max_steps": settings["steps"],
        "learning_rate": settings["lr"],
        "lr_scheduler_type": "constant",
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "gradient_checkpointing": settings["recompute"],
        "use_cpu": True,
        "bf16": False,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "disable_tqdm": True,
    }


def sft_trainer(rows: list[dict], settings: dict[str, Any], clock: Clock) -> SFTTrainer:
    """A step is the whole file, so that its loss does not depend on an order."""

    def trainer(**how: Any) -> SFTTrainer:
        config = SFTConfig(**common(settings), loss_type="nll", **how)
        data, tokenizer = Dataset.from_list(rows), AutoTokenizer.from_pretrained(settings["model"])
        model = AutoModelForCausalLM.from_pretrained(settings["model"], dtype=torch.float32)
        return SFTTrainer(
            model, args=config, train_dataset=data, processing_class=tokenizer, callbacks=[clock]
        )

    if not settings["packing"]:
        per_pass = settings["rows_per_pass"]
        return trainer(
            per_device_train_batch_size=per_pass, gradient_accumulation_steps=len(rows) // per_pass
        )
    packed = {"packing": True, "max_length": settings["max_length"], "per_device_train_batch_size": 1}
    num_packs = len(trainer(**packed).train_dataset)  # type: ignore[arg-type]
    return trainer(**packed, gradient_accumulation_steps=num_packs)


def grpo_trainer(rows: list[dict], settings: dict[str, Any], clock: Clock) -> GRPOTrainer:
    """One group, one update, the plain loss."""
    size = settings["group_size"]
    config = GRPOConfig(
        **common(settings),
        per_device_train_batch_size=size,
        num_generations=size,
        max_completion_length=settings["max_new_tokens"],
        temperature=1.0,
        beta=0.0,
        num_iterations=1,
        loss_type="grpo",
    )
    return GRPOTrainer(
        settings["model"],
        reward_funcs=even_words,
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=AutoTokenizer.from_pretrained(settings["model"]),
        callbacks=[clock],
    )


def even_words(completions: list[list[dict[str, str]]], **_: object) -> list[float | None]:
    """The reward that beside_trl.py registers with ours."""
    texts = [completion[0]["content"].split() for completion in completions]
    return [float(sum(word[-1] in "02468" for word in words)) for words in texts]


if __name__ == "__main__":
    main()
