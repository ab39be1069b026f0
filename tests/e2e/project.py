"""What a user brings to a first run: a tokenizer with a chat template, rows of text, one YAML file."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

NUM_TRAIN_ROWS = 36  # not a multiple of the batch of 8: the fifth step crosses an epoch
NUM_VALID_ROWS = 10
NUM_STEPS = 8
VOCAB_SIZE = 101  # one more than the tokenizer has; odd, so that tp = 2 pads it
TIMING = (
    "tokens_per_second", "seconds/", "peak_memory_bytes", "rollout/tokens_per_second",
    "reward/slowest_seconds", "reshard/gigabytes_per_second", "checkpoint/", "ranks/",
    "rollout/wait_seconds", "rollout/generator_idle",
)  # fmt: skip

_SPECIAL = ("<|pad|>", "<|end|>", "<|user|>", "<|assistant|>")
_TEMPLATE = (
    "{% for message in messages %}{% if message.role == 'user' %}<|user|>{{ message.content }}"
    "{% else %}<|assistant|>{{ message.content }}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

Row = Mapping[str, object]
Metrics = list[dict[str, float]]


@dataclass(frozen=True)
class Project:
    """Files of a session: tests read them and write elsewhere."""

    root: Path

    @property
    def train(self) -> Path:
        return self.root / "train.jsonl"

    @property
    def valid(self) -> Path:
        return self.root / "valid.jsonl"

    @property
    def yaml(self) -> Path:
        """GIFT with a frozen reference, fp32, 8 steps of 8 rows, a checkpoint and an evaluation every 4."""
        return self.root / "run.yaml"

    @property
    def my_loss(self) -> Path:
        """A user's own losses."""
        return self.root / "my_loss.py"


def make_project(root: Path) -> Project:
    """Write everything below `root`; the same bytes every time."""
    project = Project(root)
    make_tokenizer(root / "tokenizer")
    draw = random.Random(0)
    write_rows(project.train, [_sum(draw) for _ in range(NUM_TRAIN_ROWS)])
    write_rows(project.valid, [_sum(draw) for _ in range(NUM_VALID_ROWS)])
    project.my_loss.write_text(_MY_LOSS)
    project.yaml.write_text(yaml.safe_dump(_config(project), sort_keys=False))
    return project


def make_tokenizer(directory: Path) -> None:
    """One id per printable character, four special tokens, and a chat template of user and assistant."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    names = [*_SPECIAL, *map(chr, range(32, 127)), "<unk>"]
    tokenizer = Tokenizer(
        models.WordLevel({name: index for index, name in enumerate(names)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|end|>",
        pad_token="<|pad|>",
        additional_special_tokens=["<|user|>", "<|assistant|>"],
    )
    fast.chat_template = _TEMPLATE
    fast.save_pretrained(directory)


def num_learned(row: Row) -> int:
    """Loss tokens of a row: the response and its end token."""
    return len(str(row["response"])) + 1


def read_rows(path: Path) -> list[dict]:
    """Rows of a JSONL file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_rows(path: Path, rows: Sequence[Row]) -> Path:
    """Rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def metrics_of(run_dir: Path) -> Metrics:
    """Every line of a run's metrics.jsonl, read without the product."""
    return read_rows(run_dir / "metrics.jsonl")


def without_timing(metrics: Metrics) -> Metrics:
    """What two runs of the same computation have in common."""
    return [{name: row[name] for name in row if not name.startswith(TIMING)} for row in metrics]


def _sum(draw: random.Random) -> Row:
    left, right = draw.randint(0, 99), draw.randint(0, 9999)
    return {"prompt": f"{left}+{right}=", "response": str(left + right)}


def _config(project: Project) -> dict:
    return {
        "run_dir": str(project.root / "never"),
        "seed": 7,
        "model": {
            "architecture": {
                "family": "qwen3",
                "num_layers": 2,
                "hidden_size": 32,
                "ffn_hidden_size": 48,
                "num_attention_heads": 4,
                "num_query_groups": 2,
                "vocab_size": VOCAB_SIZE,
                "max_position_embeddings": 64,
                "init_std": 0.1,
            },
            "dtype": "fp32",
        },
        "tokenizer": {"path": str(project.root / "tokenizer")},
        "data": {"train": [str(project.train)], "valid": [str(project.valid)], "max_length": 32},
        "batch": {"global_size": 8, "micro_size": 2},
        "loss": {"name": "gift", "beta": 4.0, "eps": 0},
        "reference": {"kind": "frozen"},
        # Adam divides by sqrt(v) + eps: with 1e-8 it amplifies rounding on near-zero gradients to 1e-4;
        # 1e-4 keeps layouts comparable (measured in tests/distributed/test_layouts.py).
        "optim": {"lr": 0.01, "warmup_steps": 2, "eps": 1e-4},
        "train": {"steps": NUM_STEPS, "eval_every": 4},
        "checkpoint": {"every": 4},
        "log": {"wandb": "off"},  # seconds of each start; conftest.py switches it on once
    }


_MY_LOSS = '''"""Losses of a user: GIFT again, and one that breaks on some samples."""

import torch

from megatron_sftrl import LossInputs, LossOutput, register_loss
from megatron_sftrl.losses.api import LossOptions


class GiftConfig(LossOptions):
    beta: float = 20.0
    """Log-odds added to the label under the reference; dimensionless, >= 0."""


@register_loss("my_gift", config=GiftConfig, needs=("reference",))
def my_gift(inputs: LossInputs, config: GiftConfig) -> LossOutput:
    """-sum_v q(v) log p(v), q = softmax(log p_ref + beta 1[v = y])   (arXiv:2601.09233, Alg. 1)."""
    target = inputs.reference.tilted(inputs.batch.labels, config.beta)      # [T, V]
    return LossOutput(token_loss=inputs.policy.cross_entropy(target))       # [T]


class BrokenConfig(LossOptions):
    token: int
    """The loss is NaN where this id is learned."""


@register_loss("broken_on_token", config=BrokenConfig)
def broken_on_token(inputs: LossInputs, config: BrokenConfig) -> LossOutput:
    """-log p(y), or NaN."""
    labels = inputs.batch.labels
    factor = torch.where(labels == config.token, float("nan"), -1.0)        # [T]
    return LossOutput(token_loss=factor * inputs.policy.logprobs(labels))


@register_loss("stopped")
def stopped(inputs: LossInputs, config: LossOptions) -> LossOutput:
    """-log p(y) without its gradient."""
    return LossOutput(token_loss=-inputs.policy.logprobs(inputs.batch.labels).detach())


register_loss("stopped_with_advantages", needs=("advantages",))(stopped)
'''
