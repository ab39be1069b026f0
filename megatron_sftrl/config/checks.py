"""What no single section can know: whether the settings of a run fit together, the model and the machine.

Pure functions of values: nothing is built, no file is read, no process group is needed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from operator import attrgetter

from megatron_sftrl.config.layout import (
    ModelSizes,
    expert_problems,
    layout_problems,
    stage_layers,
    world_problems,
)
from megatron_sftrl.config.placement import generators_config
from megatron_sftrl.config.schema import (
    GrpoConfig,
    RecomputedModule,
    RunConfig,
    TrainingConfig,
    TrainSection,
)
from megatron_sftrl.errors import UserError

# Which settings have no effect beside the others: writing one of them down is a user's mistake.


@dataclass(frozen=True, slots=True, kw_only=True)
class IdleSetting:
    """A key (full dotted path) that the setting `reason` makes idle; is_written: not merely the default."""

    key: str
    reason: str
    is_written: bool


def idle_settings(config: TrainingConfig) -> list[IdleSetting]:
    """Every key that the rest of `config` leaves without effect, written or not."""
    idle: list[IdleSetting] = []

    def add(section: str, names: tuple[str, ...], reason: str) -> None:
        written = attrgetter(section)(config).model_fields_set
        for name in names:
            idle.append(IdleSetting(key=f"{section}.{name}", reason=reason, is_written=name in written))

    if config.reference is not None and config.reference.kind == "frozen":
        add("reference", ("decay", "sync_every"), "reference.kind is frozen")
    if config.reference is not None and config.reference.kind == "moving_average":
        add("reference", ("checkpoint",), "a moving average starts from the policy (reference.kind)")
    if config.optim.name == "sgd":
        add("optim", ("betas", "eps"), "optim.name is sgd")
    else:
        add("optim", ("momentum",), "optim.name is adamw")
    if config.optim.schedule == "constant":
        add("optim", ("min_lr_ratio", "schedule_steps"), "optim.schedule is constant")
    if config.loss.fused == "off":
        add("loss", ("chunk_mb",), "loss.fused is off")
    if config.lora is not None and config.lora.start is not None:
        add("lora", ("init",), "lora.start gives A and B")
    if config.batch.packing:
        add("batch", ("micro_size",), "batch.packing fills micro-batches by tokens (batch.max_tokens)")
    if (grpo := config.grpo) is not None:
        if grpo.rollout.engine == "vllm":
            add("rollout", ("max_concurrent",), "rollout.engine is vllm (rollout.vllm.max_num_seqs)")
        if grpo.rollout.engine == "in_process":
            add("rollout", ("vllm",), "rollout.engine is in_process")
        if grpo.rollout.devices and grpo.rollout.engine == "vllm":
            add("rollout", ("tp",), "rollout.engine is vllm (rollout.vllm.tp)")
        if not grpo.rollout.devices:
            add("rollout", ("tp",), "rollout.devices is 0: the policy generates in its own layout")
        if grpo.rollout.devices:
            add("rollout", ("offload",), "rollout.devices have memory of their own")
        if not grpo.filters.dynamic_sampling:
            add("filters", ("max_rounds",), "filters.dynamic_sampling is off")
        if grpo.sft is not None and grpo.sft.data.train_weights is None:
            add("sft.data", ("mix_by",), "sft.data.train has no weights")
    if config.model.hf is None:
        add("model", ("allow_pickle",), "model.hf is not given")
    if config.model.architecture is not None:
        add("model", ("text_only",), "model.architecture is given, and no files")
    if isinstance(config, RunConfig) and config.data.train_weights is None:
        add("data", ("mix_by",), "data.train has no weights")
    if not config.held_out:
        add("train", ("eval_every",), "data.valid is empty")
    if config.train.recompute != "selective":
        add("train", ("recompute_modules",), f"train.recompute is {config.train.recompute}")
    if config.train.recompute != "full":
        add("train", ("recompute_layers",), f"train.recompute is {config.train.recompute}")
    return idle


# Whether the sections fit each other, the model and the number of processes.


def check_run(
    config: TrainingConfig, architecture: ModelSizes, world_size: int, *, loss_needs: tuple[str, ...]
) -> None:
    """Hold the sections against each other, the architecture and the number of processes of the job.

    batch.global_size need not divide by dp * micro_size: a rank without sequences runs an empty micro-batch,
    and token_weight keeps every loss token's share.

    Args:
        loss_needs: what the loss declared, for example ("reference",).
    Raises:
        UserError: everything that does not fit, one line each.
    """
    num_generators = 0 if config.grpo is None else config.grpo.rollout.devices
    problems = [
        *_devices_problems(config, architecture, world_size),
        *world_problems(config, architecture, max(1, world_size - num_generators)),
        *layout_problems(config, architecture),
        *expert_problems(config, architecture),
        *_optimizer_problems(config),
        *_precision_problems(config, architecture),
        *_recompute_problems(config, architecture),
        *_length_problems(config, architecture),
        *_reference_problems(config, loss_needs),
        *_schedule_problems(config),
        *_lora_problems(config),
        *_rollout_problems(config, loss_needs),
        *_replay_problems(config, architecture),
        *_sharing_problems(config, architecture),
        *_idle_problems(config),
    ]
    if problems:
        raise UserError("\n  ".join([f"the run cannot start, {len(problems)} problem(s)", *problems]))


def recomputed_modules(
    train: TrainSection, *, is_mixture: bool, with_te: bool
) -> tuple[RecomputedModule, ...]:
    """The parts of a block that selective recomputation makes again, () without it.

    Args:
        with_te: the layers are Transformer Engine's.
    Raises:
        UserError: train.recompute_modules names a part that these layers do not have or that is made again
            with another one.
    """
    if train.recompute != "selective":
        return ()
    act: RecomputedModule = "moe_act" if is_mixture else "mlp_act"
    if train.recompute_modules is None:
        return (act,) if with_te and not is_mixture else ("layernorm", act)
    refused = {
        "layernorm": with_te
        and not is_mixture
        and "Transformer Engine's dense layers have no separate norms",
        "mlp": is_mixture and "the model is a mixture of experts, whose blocks have moe",
        "mlp_act": is_mixture and "the model is a mixture of experts, whose blocks have moe_act",
        "moe": not is_mixture and "the model is no mixture of experts, its blocks have mlp",
        "moe_act": not is_mixture and "the model is no mixture of experts, its blocks have mlp_act",
    }
    named = train.recompute_modules
    problems = [f"{name}: {reason}" for name in named if (reason := refused[name])]
    problems += [
        f"{name}_act: it is a part of {name}" for name in ("mlp", "moe") if {name, f"{name}_act"} <= {*named}
    ]
    if not named:
        problems = ["nothing is named: leave it out for what costs least, or set train.recompute: none"]
    if problems:
        raise UserError("\n  ".join(["train.recompute_modules does not fit the layers:", *problems]))
    return tuple(dict.fromkeys(named))


def _recompute_problems(config: TrainingConfig, architecture: ModelSizes) -> Iterator[str]:
    found = []
    # Whose layers "auto" stands for is known when they are built; what neither kind has is refused here.
    for with_te in {"te": (True,), "torch": (False,), "auto": (True, False)}[config.model.layers]:
        try:
            recomputed_modules(config.train, is_mixture=architecture.mixture is not None, with_te=with_te)
            found.append("")
        except UserError as error:
            found.append(str(error))
    if all(found):
        yield found[0]
    parallel, most = config.parallel, config.train.recompute_layers
    largest = max(stage_layers(parallel, architecture.num_layers)) // parallel.vp
    if config.train.recompute == "full" and most is not None and most > largest:
        yield (
            f"train.recompute_layers = {most} is more than the {largest} layer(s) of the largest model "
            "chunk: lower it, or remove it to recompute all"
        )


def _optimizer_problems(config: TrainingConfig) -> Iterator[str]:
    parallel = config.parallel
    if parallel.overlap_param_gather and not (
        parallel.distributed_optimizer and parallel.overlap_grad_reduce
    ):
        yield (
            "parallel.overlap_param_gather needs parallel.distributed_optimizer = true and "
            "parallel.overlap_grad_reduce = true: set both, or overlap_param_gather = false"
        )
    if parallel.grad_reduce_dtype == "bf16" and config.model.dtype == "fp32":
        yield (
            "parallel.grad_reduce_dtype = bf16 needs model.dtype = bf16: gradients are kept in the weights' "
            "dtype or in fp32; set model.dtype, or remove it"
        )
    if parallel.distributed_optimizer and config.optim.name == "sgd":
        yield (
            "parallel.distributed_optimizer shards Adam's state only (megatron-core): set "
            "distributed_optimizer = false, or optim.name = adamw"
        )


def _precision_problems(config: TrainingConfig, architecture: ModelSizes) -> Iterator[str]:
    parallel, optim, fp8 = config.parallel, config.optim, config.train.fp8
    if optim.has_low_moments or optim.cpu_offload:
        name = "cpu_offload" if optim.cpu_offload else "exp_avg_dtype and exp_avg_sq_dtype"
        found = {
            "parallel.distributed_optimizer = true": parallel.distributed_optimizer,
            "optim.name = adamw": optim.name == "adamw",
            "model.dtype = bf16": config.model.dtype == "bf16",
        }
        if missing := [needed for needed, is_there in found.items() if not is_there]:
            yield f"optim.{name} needs {' and '.join(missing)} (megatron-core): set it, or remove {name}"
    if optim.has_low_moments and optim.cpu_offload:
        yield (
            "optim.cpu_offload keeps moments in fp32, on the CPU and beside it (megatron-core): set "
            "exp_avg_dtype and exp_avg_sq_dtype to fp32, or cpu_offload to 0"
        )
    if fp8 is not None:
        if config.model.dtype != "bf16":
            yield f"train.fp8 needs model.dtype = bf16, got {config.model.dtype}: set it, or remove train.fp8"
        for what, size in _product_sides(config, architecture).items():
            if size % fp8.multiple:
                yield (
                    f"train.fp8.recipe = {fp8.recipe} multiplies matrices whose sides are multiples of "
                    f"{fp8.multiple}, and {what} is {size}: choose another recipe or layout, or remove it"
                )
    if config.train.deterministic and config.grpo is not None and config.grpo.rollout.engine == "vllm":
        yield (
            "train.deterministic covers this package's steps, and vLLM's kernels choose their own order of "
            "sums: set rollout.engine = in_process, or train.deterministic = false"
        )
    if config.train.deterministic and parallel.moe_dispatcher == "flex":
        yield (
            "train.deterministic needs an exchange of tokens in a fixed order, which is not known of "
            "DeepEP's: set parallel.moe_dispatcher = alltoall, or train.deterministic = false"
        )


def _product_sides(config: TrainingConfig, architecture: ModelSizes) -> dict[str, int]:
    """Sides of a rank's weight matrices in attention and MLP; layout problems are told elsewhere."""
    tp, etp = config.parallel.tp, config.parallel.etp or config.parallel.tp
    queries = architecture.num_attention_heads * architecture.head_dim
    keys = architecture.num_query_groups * architecture.head_dim
    mlp = etp if architecture.mixture is not None else tp
    return {
        "hidden_size": architecture.hidden_size,
        "num_attention_heads * head_dim / tp": queries // tp,
        "the width of queries, keys and values / tp": (queries + 2 * keys) // tp,
        f"ffn_hidden_size / {'etp' if architecture.mixture is not None else 'tp'}": (
            architecture.ffn_hidden_size // mlp
        ),
    }


def _length_problems(config: TrainingConfig, architecture: ModelSizes) -> Iterator[str]:
    max_tokens, lengths = config.batch.max_tokens, {config.length_keys: config.max_length}
    if config.grpo is not None and config.grpo.sft is not None:
        lengths["sft.data.max_length"] = config.grpo.sft.data.max_length
    for keys, max_length in lengths.items():
        if max_tokens is not None and max_tokens < max_length:
            yield (
                f"batch.max_tokens = {max_tokens} is less than {keys} = {max_length}: the longest "
                "sequence would fit into no micro-batch; raise max_tokens or shorten sequences"
            )
        if max_length > architecture.max_position_embeddings:
            yield (
                f"{keys} = {max_length} is more than the model's max_position_embeddings = "
                f"{architecture.max_position_embeddings}: shorten sequences"
            )


def _reference_problems(config: TrainingConfig, loss_needs: tuple[str, ...]) -> Iterator[str]:
    is_needed = "reference" in loss_needs
    who = f"loss '{config.loss.name}'"
    if config.grpo is not None and config.grpo.sft is not None:
        who += f" with sft.loss '{config.grpo.sft.loss.name}'"
    if is_needed and config.reference is None:
        yield (
            f"{who} needs a reference model: add `reference: {{kind: frozen}}` (the weights that training "
            "starts from) or `reference: {kind: moving_average}` (follows the policy), or reference.kind=... "
            "on the command line"
        )
    if config.reference is not None and not is_needed:
        yield (
            f"{who} uses no reference model: remove the section `reference`, or reference=null on the "
            "command line"
        )


def _schedule_problems(config: TrainingConfig) -> Iterator[str]:
    steps = config.train.steps
    if steps is not None and config.optim.warmup_steps > steps:
        yield (
            f"optim.warmup_steps = {config.optim.warmup_steps} is more than train.steps = {steps}: "
            "the peak learning rate would never be reached; lower warmup_steps"
        )
    if (end := config.optim.schedule_steps) is not None and config.optim.warmup_steps >= end:
        yield (
            f"optim.schedule_steps = {end} leaves nothing after optim.warmup_steps = "
            f"{config.optim.warmup_steps}: it counts the warm-up, too; raise it"
        )


def _lora_problems(config: TrainingConfig) -> Iterator[str]:
    if config.lora is None:
        return
    if (checkpoint := config.model.init_checkpoint) is not None:
        yield (
            "lora trains adapters over the weights of a Hugging Face directory, and model.init_checkpoint is "
            f"none: make one of it with `sftrl convert to-hf --checkpoint {checkpoint} --out DIR`, and give "
            "that as model.hf in place of model.init_checkpoint"
        )
    elif config.model.hf is None:
        yield "lora trains adapters over the weights of a Hugging Face directory: give it as model.hf"
    if config.model.moe_bias_update_rate:
        yield (
            "model.moe_bias_update_rate moves biases of the frozen model under the adapters, which a "
            "checkpoint of adapters does not hold: remove it"
        )
    reference = config.reference
    if reference is not None and reference.placement == "offload" and reference.checkpoint is None:
        yield "reference.placement = offload: with lora the reference is the policy's weights; remove it"


def _rollout_problems(config: TrainingConfig, loss_needs: tuple[str, ...]) -> Iterator[str]:
    if (grpo := config.grpo) is None:
        return
    prompts, group = grpo.rollout.prompts_per_step, grpo.rollout.group_size
    size = config.batch.global_size
    if group == 1 and "advantages" in loss_needs:
        yield (
            "rollout.group_size = 1 compares a response with itself, so that every advantage is 0 and "
            "nothing is learned: set it to at least 2"
        )
    if grpo.rollout.demonstrations >= group:
        yield (
            f"rollout.demonstrations = {grpo.rollout.demonstrations} leaves none of the rollout.group_size = "
            f"{group} responses for the policy to generate: lower it"
        )
    if (prompts * group) % size:
        yield (
            f"batch.global_size = {size} does not divide the responses of a step, rollout.prompts_per_step * "
            f"group_size = {prompts} * {group} = {prompts * group}: choose it among their divisors, such as "
            f"{prompts * group} for one update per step"
        )
    yield from _ahead_problems(grpo, loss_needs)


def _replay_problems(config: TrainingConfig, architecture: ModelSizes) -> Iterator[str]:
    if config.grpo is None or not config.grpo.rollout.router_replay:
        return
    if architecture.mixture is None:
        yield (
            f"rollout.router_replay: a {architecture.family} without experts has no routers: remove it, or "
            "train a mixture of experts"
        )
        return
    if config.parallel.moe_router_fusion:
        yield (
            "rollout.router_replay: the fused router of parallel.moe_router_fusion chooses experts itself: "
            "remove one of them"
        )
    train = config.train
    if train.fp8 is not None and train.recompute == "selective" and "moe" in (train.recompute_modules or ()):
        yield (
            "rollout.router_replay: train.recompute_modules = moe under train.fp8 does not know it yet: take "
            "moe_act, or train.recompute: full"
        )


def _sharing_problems(config: TrainingConfig, architecture: ModelSizes) -> Iterator[str]:
    if config.grpo is None or not config.grpo.rollout.share_prompts:
        return
    if not config.batch.packing:
        yield (
            "rollout.share_prompts puts the responses to a prompt into one packed micro-batch: set "
            "batch.packing: true with batch.max_tokens, or remove share_prompts"
        )
    if config.grpo.rollout.group_size == 1:
        yield "rollout.share_prompts has no effect: rollout.group_size = 1; remove it"
    if architecture.delta_net is not None:
        yield (
            f"rollout.share_prompts: a gated delta net ({architecture.family}) begins every sequence with an "
            "empty state, not with that behind a prompt: remove share_prompts"
        )
    for key in ("moe_aux_loss_coeff", "moe_bias_update_rate"):
        if getattr(config.model, key):
            yield (
                f"rollout.share_prompts: model.{key} balances experts over the tokens of a step, of which a "
                "shared prompt's would count once: remove one of them"
            )


def _ahead_problems(grpo: GrpoConfig, loss_needs: tuple[str, ...]) -> Iterator[str]:
    rollout = grpo.rollout
    if not rollout.ahead:
        return
    updates = rollout.passes * max(1, rollout.prompts_per_step * rollout.group_size // grpo.batch.global_size)
    if updates > 1 and "rollout_logprobs" not in loss_needs:
        yield (
            f"rollout.ahead = 1 with {updates} updates per step (rollout.passes, batch.global_size) drifts "
            f"from the weights that sampled, and loss '{grpo.loss.name}' does not correct for them: set "
            "loss.correction = tis or icepop where the loss has it, make it one update, or remove "
            "rollout.ahead"
        )
    if grpo.checkpoint.every == 1:
        yield (
            "rollout.ahead has no effect: checkpoint.every = 1, and the step after a checkpoint has "
            "responses of its own weights; raise checkpoint.every, or remove rollout.ahead"
        )


def _devices_problems(config: TrainingConfig, architecture: ModelSizes, world_size: int) -> Iterator[str]:
    if (grpo := config.grpo) is None or not grpo.rollout.devices:
        return
    devices, is_vllm = grpo.rollout.devices, grpo.rollout.engine == "vllm"
    tp = grpo.rollout.vllm.tp if is_vllm else grpo.rollout.tp
    key = "rollout.vllm.tp" if is_vllm else "rollout.tp"
    if devices >= world_size:
        yield (
            f"rollout.devices = {devices} leaves none of the {world_size} process(es) to train: start more, "
            "or lower it"
        )
    if devices % tp:
        yield (
            f"rollout.devices = {devices} do not form generators of {key} = {tp}: choose tp among the "
            f"divisors of {devices}, or other devices"
        )
    if is_vllm:  # which says itself what it cannot cut
        return
    theirs = generators_config(grpo, is_mixture=architecture.mixture is not None)
    for problem in (*layout_problems(theirs, architecture), *expert_problems(theirs, architecture)):
        yield f"the generators of rollout.devices: {problem.replace('parallel.tp', 'rollout.tp')}"


def _idle_problems(config: TrainingConfig) -> Iterator[str]:
    for setting in idle_settings(config):
        if setting.is_written:
            yield (
                f"{setting.key} has no effect: {setting.reason}; remove it, or {setting.key}=null on the "
                "command line"
            )
