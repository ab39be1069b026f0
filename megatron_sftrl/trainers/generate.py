"""`sftrl generate`: responses of any checkpoint, under any layout, for a file of prompts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_sftrl.config.schema import RunConfig
from megatron_sftrl.data.chat import encode_prompt
from megatron_sftrl.data.prompts import end_token_ids, read_prompt
from megatron_sftrl.data.sources import describe_row, read_rows
from megatron_sftrl.data.tokenizer import Tokenizer
from megatron_sftrl.engine.checkpoint import load_weights
from megatron_sftrl.engine.parallel import ParallelContext, parallel_context
from megatron_sftrl.engine.policy import PolicyEngine
from megatron_sftrl.observability.run_directory import write_atomically
from megatron_sftrl.rollout.in_process import generate
from megatron_sftrl.trainers.plan import plan_model
from megatron_sftrl.types import Rollout, SamplingParams

_RESPONSES_AT_ONCE = 512
"""Responses generated together on one data-parallel replica; bounds the memory of a forward."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateRequest:
    """What to generate, and where it goes.

    Args:
        prompts: JSONL, Parquet or a datasets directory whose rows hold `prompt` or `messages`.
        out: JSONL; each row of `prompts` with `responses` (texts), `num_tokens` (of each response, the
            end token included) and `is_finished` added.
        checkpoint: a step directory or a run directory; None takes the run's own latest checkpoint.
        num_samples: responses per prompt.
        sampling: temperature, length and seed.
    """

    prompts: Path
    out: Path
    checkpoint: Path | None
    num_samples: int
    sampling: SamplingParams


def run_generate(config: RunConfig, request: GenerateRequest) -> None:
    """Generate and write; the output appears only when it is complete.

    Raises:
        ValueError: a prompt that cannot be used, no checkpoint, an output that exists.
    """
    if request.num_samples < 1:
        raise ValueError(f"num_samples: expected at least 1, got {request.num_samples}")
    if request.out.exists():
        raise ValueError(f"{request.out} exists already: choose another --out, or remove it")
    architecture, tokenizer = plan_model(config)
    rows, prompts = _read_prompts(request.prompts, tokenizer)
    with parallel_context(config.parallel) as parallel:
        policy = PolicyEngine(architecture, config, parallel, with_optimizer=False)
        load_weights(policy.chunks, request.checkpoint or config.run_dir, architecture=architecture)
        mine = range(parallel.dp_rank, len(prompts), parallel.dp_size)
        generated = _generate_share(policy, [(i, prompts[i]) for i in mine], request, tokenizer)
        whole = _collect(generated, parallel)
        if parallel.rank == 0:
            _write(request.out, rows, whole, tokenizer)
        dist.barrier()


def _read_prompts(path: Path, tokenizer: Tokenizer) -> tuple[list[Mapping[str, Any]], list[tuple[int, ...]]]:
    rows, prompts = [], []
    for row in read_rows(path):
        try:
            prompts.append(tuple(encode_prompt(tokenizer, read_prompt(row.values))))
        except ValueError as error:
            raise ValueError(f"{describe_row(path, row.number)}: {error}") from error
        rows.append(row.values)
    if not rows:
        raise ValueError(f"{path} holds no prompt")
    return rows, prompts


def _generate_share(
    policy: PolicyEngine,
    prompts: list[tuple[int, tuple[int, ...]]],
    request: GenerateRequest,
    tokenizer: Tokenizer,
) -> dict[int, list[Rollout]]:
    """Responses of this replica's prompts, by prompt number; samples of one prompt stay together."""
    stops = end_token_ids(tokenizer)
    per_call = max(1, _RESPONSES_AT_ONCE // request.num_samples)
    results: dict[int, list[Rollout]] = {}
    for start in range(0, len(prompts), per_call):
        part = prompts[start : start + per_call]
        copies = [(number, prompt) for number, prompt in part for _ in range(request.num_samples)]
        streams = [number * request.num_samples + i for number, _ in part for i in range(request.num_samples)]
        rollouts = generate(
            policy, [prompt for _, prompt in copies], request.sampling, stop_ids=stops, streams=streams
        )
        for (number, _), rollout in zip(copies, rollouts, strict=True):
            results.setdefault(number, []).append(rollout)
    return results


def _collect(mine: dict[int, list[Rollout]], parallel: ParallelContext) -> dict[int, list[Rollout]]:
    """Every replica's responses, on every rank."""
    shares: list[dict[int, list[Rollout]] | None] = [None] * parallel.dp_size
    dist.all_gather_object(shares, mine, group=parallel.dp_group)
    return {number: rollouts for share in shares if share for number, rollouts in share.items()}


def _write(
    out: Path, rows: list[Mapping[str, Any]], responses: dict[int, list[Rollout]], tokenizer: Tokenizer
) -> None:
    stops = end_token_ids(tokenizer)
    lines = []
    for number, row in enumerate(rows):
        answers = responses[number]
        added = {
            "responses": [
                tokenizer.decode([token for token in answer.response_tokens if token not in stops])
                for answer in answers
            ],
            "num_tokens": [len(answer.response_tokens) for answer in answers],
            "is_finished": [answer.is_finished for answer in answers],
        }
        lines.append(json.dumps({**row, **added}, ensure_ascii=False) + "\n")
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, "".join(lines))
