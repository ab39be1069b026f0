"""What a user brings to a first run of `sftrl grpo`: prompts, a file of rewards, one YAML file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml

from tests.distributed.checkpoint_runs import stored_tensors
from tests.e2e.project import Metrics, Project, read_rows, write_rows

NUM_PROMPTS = 10  # not a multiple of the 4 of a step: the third step crosses an epoch
NUM_STEPS = 3
GROUP_SIZE = 4
MAX_NEW_TOKENS = 8


@dataclass(frozen=True)
class GrpoProject:
    """Files of a session: tests read them and write elsewhere."""

    root: Path

    @property
    def prompts(self) -> Path:
        """Rows with prompt and answer; every other one has `is_hopeless`."""
        return self.root / "prompts.jsonl"

    @property
    def rewards(self) -> Path:
        """A user's own rewards."""
        return self.root / "my_rewards.py"

    @property
    def yaml(self) -> Path:
        """fp32, 3 steps of 4 prompts with 4 responses, two passes over them in two mini-batches."""
        return self.root / "grpo.yaml"

    def command(self, run_dir: Path, *overrides: str) -> list[str]:
        """`sftrl grpo` into a directory."""
        return ["grpo", str(self.yaml), f"run_dir={run_dir}", *overrides]

    def reward(self, name: str, options: str = "") -> str:
        """The override that makes one of my_rewards.py the run's only reward."""
        more = f", {options}" if options else ""
        return f"rewards=[{{name: {name}, modules: [{self.rewards}]{more}}}]"


def make_grpo_project(project: Project, root: Path) -> GrpoProject:
    """Write everything below `root`; model and tokenizer are those of `project`."""
    made = GrpoProject(root)
    rows = [
        {"prompt": f"say {'xyz'[number % 3] * (1 + number)}", "answer": "a", "is_hopeless": number % 2 == 1}
        for number in range(NUM_PROMPTS)
    ]
    write_rows(made.prompts, rows)
    made.rewards.write_text(_MY_REWARDS)
    sft = yaml.safe_load(project.yaml.read_text())
    sft["model"]["architecture"]["num_layers"] = 4  # pp = 2 and vp = 2
    config = {name: sft[name] for name in ("seed", "model", "tokenizer")} | {
        # Adam's eps as in project.py: it keeps layouts comparable.
        "optim": {"lr": 0.01, "eps": 1e-4},
        "run_dir": str(root / "never"),
        "data": {"train": [str(made.prompts)], "max_prompt_length": 16},
        "rollout": {
            "prompts_per_step": 4,
            "group_size": GROUP_SIZE,
            "max_new_tokens": MAX_NEW_TOKENS,
            "passes": 2,
            "save_samples": 1000,
        },
        "batch": {"global_size": 8, "micro_size": 2},
        "rewards": [{"name": "vowels", "modules": [str(made.rewards)]}],
        "reward_workers": {"num_workers": 1},
        "loss": {"name": "grpo"},
        "train": {"steps": NUM_STEPS},
        "log": {"wandb": "off", "progress": False},
    }
    made.yaml.write_text(yaml.safe_dump(config, sort_keys=False))
    return made


def samples_of(run_dir: Path) -> list[dict]:
    """Every line of a run's rollouts.jsonl."""
    return read_rows(run_dir / "rollouts.jsonl")


def groups_of(run_dir: Path, step: int) -> dict[int, list[dict]]:
    """The responses of one step by prompt."""
    groups: dict[int, list[dict]] = {}
    for row in samples_of(run_dir):
        if row["step"] == step:
            groups.setdefault(row["group"], []).append(row)
    return groups


def changed_weights(ours: Path, theirs: Path) -> list[str]:
    """Weights that differ in a bit between two checkpoints, optimizer state aside."""
    mine, other = stored_tensors(ours), stored_tensors(theirs)
    names = [name for name in mine if not name.startswith("optimizer.")]
    assert names, f"no weights in {ours}: {sorted(mine)[:5]}"
    return [name for name in names if mine[name].numpy().tobytes() != other[name].numpy().tobytes()]


def assert_no_null(metrics: Metrics) -> None:
    """JSON has no NaN: the product writes null in its place."""
    assert [(row["step"], name) for row in metrics for name in row if row[name] is None] == []


def same(value: float, *, tolerance: float) -> object:
    """Absolutely or relatively that near."""
    return pytest.approx(value, rel=tolerance, abs=tolerance)


_MY_REWARDS = '''"""Rewards of a user: one to learn, others that are equal, rare, or in trouble."""

import os
import time

from megatron_sftrl import RewardConfig, RewardInputs, RewardOutput, register_reward
from megatron_sftrl.rl.rewards import Canary


@register_reward("vowels", config=RewardConfig)
def vowels(inputs: RewardInputs, config: RewardConfig) -> RewardOutput:
    """The share of vowels."""
    return RewardOutput(reward=sum(c in "aeiou" for c in inputs.response) / max(len(inputs.response), 1))


@register_reward("hopeless", config=RewardConfig, needs=("is_hopeless",))
def hopeless(inputs: RewardInputs, config: RewardConfig) -> RewardOutput:
    """Equal for all responses where the row says so."""
    return RewardOutput(reward=0.25 if inputs.row["is_hopeless"] else sum(map(ord, inputs.response)) / 1000)


@register_reward("constant", config=RewardConfig)
def constant(inputs: RewardInputs, config: RewardConfig) -> RewardOutput:
    """Equal for all responses; no binary fraction, so that a mean of it is rounded."""
    return RewardOutput(reward=0.1)


@register_reward("rare", config=RewardConfig)
def rare(inputs: RewardInputs, config: RewardConfig) -> RewardOutput:
    """1 for about a quarter of the responses."""
    return RewardOutput(reward=float(sum(map(ord, inputs.response)) % 4 == 0))


class TroubleConfig(RewardConfig):
    hang: str
    """A response that begins with it takes for ever."""
    crash: str
    """A response that begins with it ends its process."""
    nan: str
    """A response that begins with it gets no number."""


@register_reward("trouble", config=TroubleConfig)
def trouble(inputs: RewardInputs, config: TroubleConfig) -> RewardOutput:
    """1, or trouble."""
    if inputs.response.startswith(config.hang):
        time.sleep(1000)
    if inputs.response.startswith(config.crash):
        os._exit(3)
    return RewardOutput(reward=float("nan") if inputs.response.startswith(config.nan) else 1.0)


@register_reward(
    "blind",
    config=RewardConfig,
    canaries=lambda config: (Canary(response="4", is_right=True), Canary(response="5", is_right=False)),
)
def blind(inputs: RewardInputs, config: RewardConfig) -> RewardOutput:
    """Nothing is ever right."""
    return RewardOutput(reward=0.0)
'''
