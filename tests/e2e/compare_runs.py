"""A tiny comparison, and `sftrl compare` in a process whose stages are forks of it: no start of Python each.

python -m tests.e2e.compare_runs compare.yaml key=value ...
"""

from __future__ import annotations

import gc
import importlib
import os
import signal
import subprocess
import sys
import traceback
import types
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.e2e.product import sftrl
from tests.e2e.project import make_tokenizer, write_rows
from tests.ranks import LATE_IMPORTS

SFT_STEPS, GRPO_STEPS, SAMPLES = 3, 2, 4


@dataclass(frozen=True)
class CompareProject:
    """Files of a session: tests read them and write elsewhere."""

    root: Path

    @property
    def yaml(self) -> Path:
        """pear and the bar, seeds 0 and 1, from the weights of `base`; 10 held-out prompts."""
        return self.root / "compare.yaml"

    @property
    def base(self) -> Path:
        """A run of one step, which begins both arms and scores for pear."""
        return self.root / "base"

    def command(self, out: Path, *more: str) -> list[str]:
        """`sftrl compare` into a folder."""
        return ["compare", str(self.yaml), f"out_dir={out}", *more]


def make_compare_project(root: Path) -> CompareProject:
    """Write everything below `root`."""
    project = CompareProject(root)
    make_tokenizer(root / "tokenizer")
    rows = [
        {"prompt": f"{a}+{b}=", "response": str(a + b), "answer": str(a + b)}
        for a in range(6)
        for b in range(5)
    ]
    write_rows(root / "train.jsonl", rows[:20])
    write_rows(root / "held_out.jsonl", rows[20:])
    (root / "my_rewards.py").write_text(_MY_REWARDS)
    sft, grpo = runs_of(root)
    (root / "base.yaml").write_text(yaml.safe_dump({**sft, "run_dir": str(project.base), "seed": 5}))
    sftrl("sft", str(root / "base.yaml"), "train.steps=1")
    sft["model"]["init_checkpoint"] = str(project.base)
    held_out = str(root / "held_out.jsonl")
    comparison = {
        "out_dir": str(root / "never"),
        "seeds": [0, 1],
        "base": {
            "sft": sft,
            "grpo": grpo,
            "eval": {"prompts": [held_out], "demonstrations": held_out, "samples": SAMPLES},
        },
        "arms": {
            "pear": {"loss": {"name": "pear", "variant": "token"}, "score": {"checkpoint": str(project.base)}}
        },
    }
    project.yaml.write_text(yaml.safe_dump(comparison, sort_keys=False))
    return project


def runs_of(root: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What stands below base.sft and base.grpo; nothing of it has to be there yet."""
    architecture = {
        "family": "qwen3", "num_layers": 1, "hidden_size": 16, "ffn_hidden_size": 16,
        "num_attention_heads": 2, "num_query_groups": 1, "vocab_size": 101, "max_position_embeddings": 32,
        "init_std": 0.1,
    }  # fmt: skip
    common = {
        "optim": {"lr": 0.01},
        "checkpoint": {"every": 1},
        "log": {"wandb": "off", "progress": False},
    }
    sft = common | {
        "model": {"architecture": architecture, "dtype": "fp32"},
        "tokenizer": {"path": str(root / "tokenizer")},
        "data": {"train": [str(root / "train.jsonl")], "max_length": 16},
        "batch": {"global_size": 8, "micro_size": 8},
        "loss": {"name": "sft"},
        "train": {"steps": SFT_STEPS},
    }
    grpo = common | {
        "data": {"train": [str(root / "train.jsonl")], "max_prompt_length": 8},
        "rollout": {"prompts_per_step": 4, "group_size": 4, "max_new_tokens": 4},
        "batch": {"global_size": 16, "micro_size": 8},
        "rewards": [{"name": "digits", "modules": [str(root / "my_rewards.py")]}],
        "reward_workers": {"num_workers": 1},
        "loss": {"name": "grpo"},
        "train": {"steps": GRPO_STEPS},
    }
    return sft, grpo


_MY_REWARDS = '''"""A reward of a user."""

from megatron_sftrl import RewardConfig, RewardInputs, RewardOutput, register_reward


@register_reward("digits")
def digits(inputs: RewardInputs, config: RewardConfig) -> RewardOutput:
    """1 where two characters in five are digits, which a random model now and then writes."""
    share = sum(c.isdigit() for c in inputs.response) / max(len(inputs.response), 1)
    return RewardOutput(reward=float(share >= 0.2))
'''


class Fork:
    """subprocess.Popen for a stage: a fork of this process, which has imported everything already."""

    def __init__(self, command: list[str], *, stdout: Any, env: dict[str, str], **_: Any) -> None:
        self._code: int | None = None
        self.pid = os.fork()
        if self.pid == 0:
            code = 1
            try:
                os.setsid()
                for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
                    signal.signal(number, signal.SIG_DFL)  # the comparison's own were forked, too
                os.dup2(stdout.fileno(), 1)
                os.dup2(stdout.fileno(), 2)
                os.environ.update(env)
                code = _main(command[command.index("megatron_sftrl") + 1 :])
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)

    def poll(self) -> int | None:
        """The exit code of a fork that has ended."""
        if self._code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self._code = os.waitstatus_to_exitcode(status) if pid else None
        return self._code

    def send_signal(self, number: int) -> None:
        """As Popen's."""
        if self.poll() is None:
            os.kill(self.pid, number)


def _main(arguments: list[str]) -> int:
    from megatron_sftrl.cli import main

    return main(arguments)


if __name__ == "__main__":
    for module in ("apps.evaluate.run", "apps.report.page", "trainers.grpo", "trainers.sft"):
        importlib.import_module(f"megatron_sftrl.{module}")
    for module in LATE_IMPORTS:
        importlib.import_module(module)
    gc.freeze()  # as in the rank workers
    launch = importlib.import_module("megatron_sftrl.apps.compare.launch")
    launch.subprocess = types.SimpleNamespace(**{**vars(subprocess), "Popen": Fork})
    sys.exit(_main(sys.argv[1:]))
