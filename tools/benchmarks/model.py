"""The model and the batch that the benchmarks share."""

from __future__ import annotations

import argparse
from collections.abc import Mapping

import torch

from megatron_sftrl import TokenBatch
from megatron_sftrl.config.schema import RunConfig


def add_model_arguments(
    parser: argparse.ArgumentParser, *, hidden: int = 768, layers: int = 8, vocab: int = 32768
) -> None:
    """--hidden, --layers, --vocab."""
    parser.add_argument("--hidden", type=int, default=hidden)
    parser.add_argument("--layers", type=int, default=layers)
    parser.add_argument("--vocab", type=int, default=vocab)


def benchmark_run(
    arguments: argparse.Namespace,
    *,
    max_length: int,
    parallel: Mapping[str, int] | None = None,
    head_dim: int = 64,
    global_size: int = 1,
    tokenizer: str = "unused",
    **architecture: float,
) -> RunConfig:
    """A run with a Qwen3 of the sizes in `arguments`; bf16 on CUDA."""
    return RunConfig.model_validate(
        {
            "run_dir": "unused",
            "model": {
                "architecture": {
                    "family": "qwen3",
                    "num_layers": arguments.layers,
                    "hidden_size": arguments.hidden,
                    "ffn_hidden_size": 3 * arguments.hidden,
                    "num_attention_heads": arguments.hidden // head_dim,
                    "num_query_groups": arguments.hidden // (2 * head_dim),
                    "head_dim": head_dim,
                    "vocab_size": arguments.vocab,
                    **architecture,
                },
                "dtype": "bf16" if torch.cuda.is_available() else "fp32",
            },
            "tokenizer": {"path": tokenizer},
            "parallel": {**(parallel or {})},
            "data": {"train": ["unused"], "max_length": max_length},
            "batch": {"global_size": global_size},
            "loss": {"name": "sft"},
            "optim": {"lr": 1e-4},
            "train": {"steps": 1},
        }
    )


def random_batch(num_tokens: int, vocab_size: int, device: torch.device, *, behavior: float) -> TokenBatch:
    """One sequence of random tokens, all of which carry loss; `behavior` nats for each behavior_logprob."""
    ids = torch.randint(0, vocab_size, (num_tokens + 1,), generator=torch.Generator().manual_seed(0))
    return TokenBatch(
        tokens=ids[:-1],
        labels=ids[1:],
        positions=torch.arange(num_tokens),
        loss_mask=torch.ones(num_tokens, dtype=torch.bool),
        cu_seqlens=torch.tensor([0, num_tokens], dtype=torch.int32),
        token_weight=torch.full((num_tokens,), 1.0 / num_tokens),
        behavior_logprobs=torch.full((num_tokens,), behavior),
    ).to(device)
