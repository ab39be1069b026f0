"""The models of a run, with the weights that it starts from."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_sftrl.engine.checkpoint import load_weights
from megatron_sftrl.engine.live_weights import load_hf_weights
from megatron_sftrl.engine.model import LanguageModel
from megatron_sftrl.engine.parallel import ParallelContext
from megatron_sftrl.engine.policy import PolicyEngine
from megatron_sftrl.engine.reference import ReferenceModel
from megatron_sftrl.engine.together import on_every_rank
from megatron_sftrl.models.architecture import Architecture
from megatron_sftrl.models.hf_weights import open_weights
from megatron_sftrl.trainers.origins import Origins
from megatron_sftrl.trainers.plan import ConfigT, RunPlan


def build_models(
    plan: RunPlan[ConfigT], parallel: ParallelContext, origins: Origins, *, is_resumed: bool
) -> tuple[PolicyEngine, ReferenceModel | None]:
    """The policy at its initial weights, and its reference where the run has one.

    A frozen reference is the policy before its first step (or reference.checkpoint); it is derived again
    at every start, before a checkpoint moves the policy on, and so needs no place in a checkpoint.

    Args:
        plan: of the run.
        parallel: this rank's place.
        origins: what the run began with.
        is_resumed: a checkpoint of the run follows. Initial weights that nothing is derived from are then
            not read: they may be gone.
    Raises:
        UserError: on every rank: weights that cannot be read, or are not those that the run began with.
    """
    config = plan.config
    policy = PolicyEngine(plan.architecture, config, parallel)
    section = config.reference
    is_derived = section is not None and section.kind == "frozen" and section.checkpoint is None
    if is_derived or not is_resumed:
        _load_start(plan, policy, origins)
    if config.reference is None:
        return policy, None
    reference = ReferenceModel(plan.architecture, config, config.reference, parallel)
    if config.reference.checkpoint is not None:
        _load_checkpoint(
            "reference.checkpoint", config.reference.checkpoint, reference.chunks, plan.architecture, origins
        )
    else:
        reference.copy_from(policy.chunks)
    return policy, reference


def _load_start(plan: RunPlan[ConfigT], policy: PolicyEngine, origins: Origins) -> None:
    """Initial weights from files, where the run names any."""
    model = plan.config.model
    if model.hf is not None:
        with open_weights(model.hf, allow_pickle=model.allow_pickle) as weights:
            on_every_rank(lambda: load_hf_weights(policy.chunks, weights, plan.architecture))
            origins.take_hf("model.hf", model.hf, weights)
    if model.init_checkpoint is not None:
        key = "model.init_checkpoint"
        _load_checkpoint(key, model.init_checkpoint, policy.chunks, plan.architecture, origins)
    if model.hf is not None or model.init_checkpoint is not None:
        policy.reload_optimizer_weights()


def _load_checkpoint(
    key: str,
    path: Path,
    chunks: Sequence[LanguageModel],
    architecture: Architecture,
    origins: Origins,
) -> None:
    found = load_weights(chunks, origins.checkpoint(key, path), architecture=architecture)
    origins.take_checkpoint(key, path, found)
