"""`sftrl generate`: responses of any checkpoint, under any layout, for a file of prompts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from megatron_sftrl.config.data import PromptColumns
from megatron_sftrl.config.schema import TrainingConfig
from megatron_sftrl.data.chat import encode_prompt
from megatron_sftrl.data.formats import read_formatted
from megatron_sftrl.data.tokenizer import Tokenizer
from megatron_sftrl.engine.parallel import run_context
from megatron_sftrl.engine.policy import PolicyEngine
from megatron_sftrl.engine.together import on_rank_zero
from megatron_sftrl.errors import UserError, error_of
from megatron_sftrl.observability.run_directory import write_atomically
from megatron_sftrl.rollout.in_process import InProcessEngine
from megatron_sftrl.trainers.checked import check_stop_ids, checked_model, response_text, stop_ids
from megatron_sftrl.trainers.weights import give_weights, only_read
from megatron_sftrl.types import Prompt, RolloutGroup, SamplingParams

_RESPONSES_AT_ONCE = 512
"""Responses generated together on one data-parallel replica; bounds the memory of a forward."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerateRequest:
    """What to generate, and where it goes.

    Args:
        prompts: a path of rows, as in data.train, that hold `prompt` or `messages`.
        out: JSONL; each row of `prompts` with `responses` (texts), `num_tokens` (of each response, the end
            token included) and `is_finished` added.
        checkpoint: a step, run or Hugging Face directory; None takes the run's own latest checkpoint.
        num_samples: responses per prompt.
        sampling: temperature, length, seed, and ends beside those of the run, its model and the checkpoint.
        with_logprobs: add `logprobs` as well: of each response token, nats at the temperature (greedy: at 1).
    """

    prompts: Path
    out: Path
    checkpoint: Path | None
    num_samples: int
    sampling: SamplingParams
    with_logprobs: bool = False


def run_generate(config: TrainingConfig, request: GenerateRequest) -> None:
    """Generate and write; the output appears only when it is complete.

    Raises:
        UserError: a prompt that cannot be used, no checkpoint, an output that exists.
    """
    if request.num_samples < 1:
        raise UserError(f"num_samples: expected at least 1, got {request.num_samples}")
    if request.out.exists():
        raise UserError(f"{request.out} exists already: choose another --out, or remove it")
    config = only_read(config)
    architecture, tokenizer = checked_model(config)
    check_stop_ids("--stop-id", sorted(request.sampling.stop_ids), architecture.vocab_size)
    columns = config.grpo.data.columns if config.grpo is not None else None
    rows, prompts = _read_prompts(request.prompts, tokenizer, columns)
    checkpoint = request.checkpoint or config.run_dir
    sampling = replace(
        request.sampling,
        num_samples=request.num_samples,
        stop_ids=request.sampling.stop_ids
        | stop_ids(config, tokenizer, vocab_size=architecture.vocab_size, checkpoint=checkpoint),
        stop=(*request.sampling.stop, *(grpo.rollout.stop if (grpo := config.grpo) is not None else ())),
    )
    with run_context(config) as parallel:
        policy = PolicyEngine(architecture, config, parallel, with_optimizer=False)
        give_weights(policy, checkpoint, config)
        engine = InProcessEngine(parallel, max_responses=_RESPONSES_AT_ONCE, decode=tokenizer.decode)
        engine.update(policy, version=0)
        groups = engine.generate([Prompt(id=i, tokens=tokens) for i, tokens in enumerate(prompts)], sampling)
        on_rank_zero(lambda: _write(request, rows, groups, tokenizer, sampling))


def _read_prompts(
    path: Path, tokenizer: Tokenizer, columns: PromptColumns | None
) -> tuple[list[Mapping[str, Any]], list[tuple[int, ...]]]:
    rows, prompts = [], []
    for row in read_formatted(path, "prompts", columns=columns, key="--prompts"):
        try:
            prompts.append(tuple(encode_prompt(tokenizer, row.conversation())))
        except ValueError as error:
            raise UserError(f"{row.source}: {error}") from error
        rows.append(row.values)
    if not rows:
        raise UserError(f"{path} holds no prompt")
    return rows, prompts


def _write(
    request: GenerateRequest,
    rows: list[Mapping[str, Any]],
    groups: list[RolloutGroup],
    tokenizer: Tokenizer,
    sampling: SamplingParams,
) -> None:
    lines = []
    for row, group in zip(rows, groups, strict=True):
        answers = group.rollouts
        added: dict[str, list] = {
            "responses": [response_text(tokenizer, answer.response_tokens, sampling) for answer in answers],
            "num_tokens": [len(answer.response_tokens) for answer in answers],
            "is_finished": [answer.is_finished for answer in answers],
        }
        if request.with_logprobs:
            added["logprobs"] = [list(answer.logprobs) for answer in answers]
        lines.append(json.dumps({**row, **added}, ensure_ascii=False) + "\n")
    try:
        request.out.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(request.out, "".join(lines))
    except OSError as error:
        raise error_of(f"{request.out} cannot be written: {error}", error) from error
