"""A small valid run, for tests that change one thing in it."""

from __future__ import annotations

from megatron_sftrl.config.load import config_from_text
from megatron_sftrl.config.schema import RunConfig

EXAMPLE = """\
run_dir: runs/example
model:
  architecture:
    family: qwen3
    num_layers: 4
    hidden_size: 64
    ffn_hidden_size: 96
    num_attention_heads: 8
    num_query_groups: 4
    vocab_size: 101
    max_position_embeddings: 256
  dtype: fp32
tokenizer: {path: tokenizer}
data: {train: [train.jsonl], max_length: 128}
batch: {global_size: 8}
loss: {name: gift, beta: 5}
reference: {kind: frozen}
optim: {lr: 1e-5}
train: {steps: 20}
log: {wandb: off}
"""


def example(*overrides: str, text: str = EXAMPLE) -> RunConfig:
    """The example with overrides applied."""
    return config_from_text(text, source="run.yaml", overrides=overrides)


def message_of(*overrides: str, text: str = EXAMPLE) -> str:
    """What the user reads when the example with these overrides is refused."""
    try:
        example(*overrides, text=text)
    except ValueError as error:
        return str(error)
    raise AssertionError(f"accepted: {list(overrides)}")
