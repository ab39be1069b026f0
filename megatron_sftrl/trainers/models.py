"""The models of a run, with the weights that it starts from."""

from __future__ import annotations

from megatron_sftrl.engine.checkpoint import load_weights
from megatron_sftrl.engine.hf_weights import load_hf_weights
from megatron_sftrl.engine.parallel import ParallelContext
from megatron_sftrl.engine.policy import PolicyEngine
from megatron_sftrl.engine.reference import ReferenceModel
from megatron_sftrl.engine.together import on_every_rank
from megatron_sftrl.hf.weights import open_weights
from megatron_sftrl.trainers.plan import ConfigT, RunPlan


def build_models(
    plan: RunPlan[ConfigT], parallel: ParallelContext
) -> tuple[PolicyEngine, ReferenceModel | None]:
    """The policy at its initial weights, and its reference where the run has one.

    A frozen reference is the policy before its first step (or reference.checkpoint); it is derived anew
    at every start, before a checkpoint moves the policy on, and so needs no place in a checkpoint.
    """
    config = plan.config
    policy = PolicyEngine(plan.architecture, config, parallel)
    if config.model.hf is not None:
        with open_weights(config.model.hf, allow_pickle=config.model.allow_pickle) as weights:
            on_every_rank(lambda: load_hf_weights(policy.chunks, weights, plan.architecture))
        policy.reload_optimizer_weights()
    if config.model.init_checkpoint is not None:
        load_weights(policy.chunks, config.model.init_checkpoint, architecture=plan.architecture)
        policy.reload_optimizer_weights()
    if config.reference is None:
        return policy, None
    reference = ReferenceModel(plan.architecture, config, config.reference, parallel)
    if config.reference.checkpoint is not None:
        load_weights(reference.chunks, config.reference.checkpoint, architecture=plan.architecture)
    else:
        reference.copy_from(policy.chunks)
    return policy, reference
