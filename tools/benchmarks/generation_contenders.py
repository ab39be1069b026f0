"""The contenders of generation.py, each in a process of its own."""

from __future__ import annotations

import argparse
import contextlib
import multiprocessing
import time
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from megatron_sftrl.config.schema import RunConfig
from megatron_sftrl.models.architecture import Architecture, from_section
from megatron_sftrl.models.hf_config import hf_config_values
from megatron_sftrl.types import Prompt, SamplingParams
from tools.benchmarks.model import benchmark_run

if TYPE_CHECKING:
    from megatron_sftrl.engine.policy import PolicyEngine
    from megatron_sftrl.rollout.api import RolloutEngine

BASELINE, OURS, VLLM = "transformers", "in_process", "vllm"
_TIMEOUT_S = 3600.0

Responses = list[list[tuple[int, ...]]]
"""By prompt."""
Answer = tuple[float, float, Responses]
"""Seconds by the clock, processor seconds, responses."""
Contender = Callable[[Sequence[Prompt], SamplingParams], Responses]


@contextlib.contextmanager
def contender(name: str, directory: Path, arguments: argparse.Namespace) -> Iterator[Connection]:
    """A process that answers; it is ready when this returns."""
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(name, directory, arguments, there))
    process.start()
    there.close()
    try:
        receive(here, name)
        yield here
        here.send(None)
        process.join(30)
    finally:
        process.kill()
        process.join()


def receive(connection: Connection, name: str) -> Answer:
    """What a contender sends; its traceback stands above when it dies instead."""
    try:
        if connection.poll(_TIMEOUT_S):
            return connection.recv()
    except EOFError:
        raise SystemExit(f"{name} failed: see above") from None
    raise SystemExit(f"{name} has not answered for {_TIMEOUT_S:.0f} s")


def _serve(name: str, directory: Path, arguments: argparse.Namespace, there: Connection) -> None:
    """The life of a contender's process."""
    torch.set_num_threads(arguments.threads)
    make = {BASELINE: _transformers, OURS: _in_process, VLLM: _vllm}[name]
    with make(directory, arguments) as answer:
        torch.set_num_threads(arguments.threads)
        there.send((0.0, 0.0, []))
        while (work := there.recv()) is not None:
            start, cpu_start = time.perf_counter(), time.process_time()
            responses = answer(*work)
            there.send((time.perf_counter() - start, time.process_time() - cpu_start, responses))


@contextlib.contextmanager
def _transformers(directory: Path, arguments: argparse.Namespace) -> Iterator[Contender]:
    """transformers.generate; writes its random weights to `directory`."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = config_of(directory, arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if config.model.dtype == "bf16" else torch.float32
    values = hf_config_values(architecture_of(config), dtype=dtype)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**values), dtype=dtype)
    model = model.to(device).eval()
    model.save_pretrained(directory)

    def answer(prompts: Sequence[Prompt], sampling: SamplingParams) -> Responses:
        tokens = torch.tensor([prompt.tokens for prompt in prompts], device=device)
        choice = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
        ends = {"eos_token_id": sorted(sampling.stop_ids), "pad_token_id": 0} if sampling.stop_ids else {}
        whole = model.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=sampling.max_new_tokens,
            num_return_sequences=sampling.num_samples,
            **(choice if sampling.temperature > 0 else {"do_sample": False}),  # type: ignore[arg-type]
            **ends,  # type: ignore[arg-type]
        )
        rows = [_until_end(row, sampling) for row in whole[:, tokens.shape[1] :].tolist()]
        return [rows[i : i + sampling.num_samples] for i in range(0, len(rows), sampling.num_samples)]

    def in_batches(prompts: Sequence[Prompt], sampling: SamplingParams) -> Responses:
        size = arguments.batch // sampling.num_samples
        return [
            group for i in range(0, len(prompts), size) for group in answer(prompts[i : i + size], sampling)
        ]

    yield in_batches


def _until_end(row: list[int], sampling: SamplingParams) -> tuple[int, ...]:
    end = next((i + 1 for i, token in enumerate(row) if token in sampling.stop_ids), len(row))
    return tuple(row[:end])


@contextlib.contextmanager
def _in_process(directory: Path, arguments: argparse.Namespace) -> Iterator[Contender]:
    from megatron_sftrl.engine.parallel import parallel_context
    from megatron_sftrl.engine.policy import PolicyEngine
    from megatron_sftrl.rollout.in_process import InProcessEngine

    config = config_of(directory, arguments)
    with parallel_context(config.parallel) as parallel:
        policy = PolicyEngine(architecture_of(config), config, parallel, with_optimizer=False)
        yield _engine(InProcessEngine(parallel, max_responses=arguments.batch), policy, directory)


@contextlib.contextmanager
def _vllm(directory: Path, arguments: argparse.Namespace) -> Iterator[Contender]:
    from megatron_sftrl.engine.parallel import parallel_context
    from megatron_sftrl.engine.policy import PolicyEngine
    from megatron_sftrl.rollout.vllm import beside_trainer
    from megatron_sftrl.rollout.vllm_settings import VllmSettings

    config = config_of(directory, arguments)
    length = arguments.prompt_tokens + arguments.new_tokens
    settings = VllmSettings(tp=1, max_model_len=length, max_num_seqs=arguments.batch)
    with parallel_context(config.parallel) as parallel:
        policy = PolicyEngine(architecture_of(config), config, parallel, with_optimizer=False)
        engine = beside_trainer(policy, settings)
        yield _engine(engine, policy, directory)
        engine.close()


def _engine(engine: RolloutEngine, policy: PolicyEngine, directory: Path) -> Contender:
    from megatron_sftrl.engine.live_weights import load_hf_weights
    from megatron_sftrl.models.hf_weights import open_weights

    with open_weights(directory) as weights:
        load_hf_weights(policy.chunks, weights, policy.architecture, policy.parallel)
    engine.update(policy, version=0)

    def answer(prompts: Sequence[Prompt], sampling: SamplingParams) -> Responses:
        groups = engine.generate(prompts, sampling)
        return [[rollout.response_tokens for rollout in group.rollouts] for group in groups]

    return answer


def config_of(directory: Path, arguments: argparse.Namespace) -> RunConfig:
    """A run with the model that the arguments describe."""
    return benchmark_run(
        arguments,
        max_length=arguments.prompt_tokens,
        head_dim=32,
        tokenizer=str(directory),
        max_position_embeddings=arguments.prompt_tokens + arguments.new_tokens,
        # Logits with some spread: the greedy choice must not hang on rounding.
        init_std=0.1,
    )


def architecture_of(config: RunConfig) -> Architecture:
    """Of the model that is described in full."""
    assert config.model.architecture is not None
    return from_section(config.model.architecture)
