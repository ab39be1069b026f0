"""The gradients of SFT and RL, and KL, of a saved model under a layout; runs on every rank.

Sequences are known by their first tokens, so that advantages and log-probabilities follow them into any
layout.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from megatron_sftrl.types import TokenBatch
from tests.distributed.engine_outputs import engine_config
from tests.distributed.test_layouts import step_batches

NUM_KEY_TOKENS = 5
"""Of the shortest sequence of step_batches."""
Key = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Products of the two gradients, Megatron's norm of the second, and KL at the tokens with loss."""

    aa: float
    ab: float
    bb: float
    norm: float
    kl: dict[Key, list[float]]


def sequences_of(batch: TokenBatch) -> list[slice]:
    """Those that carry loss."""
    bounds = batch.cu_seqlens.tolist()
    spans = [slice(start, stop) for start, stop in itertools.pairwise(bounds)]
    return [span for span in spans if batch.loss_mask[span].any()]


def key_of(tokens: Tensor) -> Key:
    return tuple(tokens[:NUM_KEY_TOKENS].tolist())


def advantage_of(key: Key) -> float:
    return (sum(key) % 7 - 3) / 2


def with_advantages(batch: TokenBatch, old: Mapping[Key, list[float]]) -> TokenBatch:
    """`old` are the log-probabilities of the learned tokens."""
    advantages, logprobs = torch.zeros(batch.num_tokens), torch.zeros(batch.num_tokens)
    for span in sequences_of(batch):
        key, mask = key_of(batch.tokens[span]), batch.loss_mask[span]
        advantages[span][mask] = advantage_of(key)
        logprobs[span][mask] = torch.tensor(old[key])
    return dataclasses.replace(batch, advantages=advantages, old_logprobs=logprobs)


def measure(
    directory: Path,
    other: Path,
    parallel: dict[str, Any],
    old: Mapping[Key, list[float]],
    num_microbatches: int,
) -> Measured:
    """`other` is the model before, in KL(before || after)."""
    from megatron.core import parallel_state

    from megatron_sftrl.config.schema import ReferenceSection
    from megatron_sftrl.engine.optimizer import gradient_products
    from megatron_sftrl.engine.parallel import initialize_parallel
    from megatron_sftrl.engine.policy import PolicyEngine
    from megatron_sftrl.engine.reference import ReferenceModel
    from megatron_sftrl.losses.registry import build_loss
    from megatron_sftrl.models import architecture_of
    from megatron_sftrl.trainers.experience import ask_kl_from
    from megatron_sftrl.trainers.weights import give_weights

    config = engine_config(directory, parallel, "fp32")
    architecture = architecture_of(config.model)
    context = initialize_parallel(config.parallel)
    policy = PolicyEngine(architecture, config, context)
    reference = ReferenceModel(architecture, config, ReferenceSection(kind="frozen"), context)
    give_weights(policy, directory, config)
    give_weights(policy, other, config, into=reference.chunks)

    def batches(step: int) -> list[TokenBatch]:
        return step_batches(
            step,
            num_groups=context.dp_size,
            group=context.dp_rank,
            multiple=2 * context.cp_size * context.tp_size,
            num_microbatches=num_microbatches,
        )

    shown = batches(0)
    policy.forward_backward(shown, build_loss("sft", {}))
    of_sft = policy.gradient()
    policy.forward_backward([with_advantages(each, old) for each in batches(1)], build_loss("grpo", {}))
    products = gradient_products(of_sft, policy.gradient(), context)
    norm = policy.optim_step(0, num_steps=1).grad_norm
    give_weights(policy, directory, config)
    with policy.evaluation():
        values = [each[0] for each in policy.token_numbers(shown, ask_kl_from, reference)]
    kl = {
        key_of(batch.tokens[span]): of_tokens[span][batch.loss_mask[span]].tolist()
        for batch, of_tokens in zip(shown, values, strict=False)
        for span in sequences_of(batch)
    }
    parallel_state.destroy_model_parallel()
    return Measured(aa=products.aa, ab=products.ab, bb=products.bb, norm=norm, kl=kl)
