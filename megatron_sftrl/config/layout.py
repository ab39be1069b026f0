"""Whether a model can be cut over the processes of a job: tp, pp, vp, cp, and ep and etp of its experts.

Pure functions of values, like checks.py, which puts their problems together.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Protocol

from megatron_sftrl.config.schema import ParallelSection, TrainingConfig


class MixtureSizes(Protocol):
    """The part of a Mixture that layouts are held against."""

    @property
    def num_experts(self) -> int: ...
    @property
    def experts_per_token(self) -> int: ...
    @property
    def normalizes_weights(self) -> bool: ...
    @property
    def routing(self) -> str: ...


class DeltaNetSizes(Protocol):
    """The part of a DeltaNet that layouts are held against."""

    @property
    def num_key_heads(self) -> int: ...


class ModelSizes(Protocol):
    """The part of an Architecture that layouts and lengths are held against."""

    @property
    def family(self) -> str: ...
    @property
    def num_layers(self) -> int: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def ffn_hidden_size(self) -> int: ...
    @property
    def num_attention_heads(self) -> int: ...
    @property
    def num_query_groups(self) -> int: ...
    @property
    def max_position_embeddings(self) -> int: ...
    @property
    def mixture(self) -> MixtureSizes | None: ...
    @property
    def delta_net(self) -> DeltaNetSizes | None: ...
    @property
    def all_biases(self) -> bool: ...


class StageSizes(Protocol):
    """The part of a layout that deals layers out to pipeline stages."""

    @property
    def pp(self) -> int: ...
    @property
    def first_stage_layers(self) -> int | None: ...
    @property
    def last_stage_layers(self) -> int | None: ...


def world_problems(config: TrainingConfig, architecture: ModelSizes, world_size: int) -> Iterator[str]:
    """The number of processes that train is no multiple of what the layout needs."""
    parallel = config.parallel
    grids = {"parallel.tp * pp * cp": (parallel.tp, parallel.pp, parallel.cp)}
    if architecture.mixture is not None:
        grids["parallel.etp * ep * pp"] = (parallel.etp or parallel.tp, parallel.ep, parallel.pp)
    replica = parallel.tp * parallel.pp * parallel.cp
    step = math.lcm(*map(math.prod, grids.values()))
    fits = world_size // step * step
    choices = [f"{count} (dp = {count // replica})" for count in (fits, fits + step) if count]
    for names, sizes in grids.items():
        if world_size % math.prod(sizes):
            yield (
                f"{world_size} process(es) are not a multiple of {names} = {' * '.join(map(str, sizes))} = "
                f"{math.prod(sizes)}: start {' or '.join(choices)} processes, or change the sizes"
            )


def layout_problems(config: TrainingConfig, architecture: ModelSizes) -> Iterator[str]:
    """Layers, heads and columns that tp, pp, vp and cp do not cut evenly."""
    parallel = config.parallel
    yield from _stage_problems(parallel, architecture.num_layers)
    cut = [
        ("attention heads", architecture.num_attention_heads),
        ("query groups (key/value heads)", architecture.num_query_groups),
    ]
    if architecture.mixture is None:
        cut.append(("MLP columns (ffn_hidden_size)", architecture.ffn_hidden_size))
    if architecture.delta_net is not None:
        cut.append(("key heads of gated delta nets", architecture.delta_net.num_key_heads))
        if parallel.cp > 1:
            yield (
                f"parallel.cp = {parallel.cp}: a gated delta net reads its sequence from the first token to "
                "the last, and is not split over cp: set cp = 1, and tp or pp for longer sequences"
            )
    for what, count in cut:
        if count % parallel.tp:
            yield (
                f"the model's {count} {what} do not divide by parallel.tp = {parallel.tp}: "
                f"choose tp among the divisors of {count}"
            )
    if parallel.vp > 1 and parallel.pp == 1:
        yield f"parallel.vp = {parallel.vp} needs parallel.pp > 1: set pp, or vp = 1"
    if parallel.sequence_parallel and parallel.tp == 1:
        yield "parallel.sequence_parallel needs parallel.tp > 1: set tp, or sequence_parallel = false"


def stage_layers(parallel: StageSizes, num_layers: int) -> tuple[int, ...]:
    """Layers of each pipeline stage, over its chunks, in a layout that check_run accepts."""
    first, last = parallel.first_stage_layers, parallel.last_stage_layers
    others = parallel.pp - (first is not None) - (last is not None)
    each = (num_layers - (first or 0) - (last or 0)) // max(1, others)
    middle = (each,) * others
    return (*(() if first is None else (first,)), *middle, *(() if last is None else (last,)))


def _stage_problems(parallel: ParallelSection, num_layers: int) -> Iterator[str]:
    named = {
        f"parallel.{name}": value
        for name in ("first_stage_layers", "last_stage_layers")
        if (value := getattr(parallel, name)) is not None
    }
    keys = " and ".join(f"{name} = {value}" for name, value in named.items())
    if parallel.pp == 1 and named:
        yield f"{keys}: there is one pipeline stage, which has all layers; set parallel.pp, or remove it"
        return
    if not named:
        if num_layers % (parallel.pp * parallel.vp):
            yield (
                f"the model's {num_layers} layers do not divide by parallel.pp * vp = {parallel.pp} * "
                f"{parallel.vp} = {parallel.pp * parallel.vp}: choose pp * vp among the divisors of "
                f"{num_layers}, or give the first or the last stage another number "
                "(parallel.first_stage_layers, parallel.last_stage_layers)"
            )
        return
    for name, value in named.items():
        if value % parallel.vp:
            yield f"{name} = {value} does not divide by parallel.vp = {parallel.vp}: choose a multiple of it"
    others, rest = parallel.pp - len(named), num_layers - sum(named.values())
    if rest < others or (others == 0 and rest) or rest % (max(1, others) * parallel.vp):
        yield (
            f"{keys} leave {rest} of the model's {num_layers} layers for {others} other stage(s) of "
            f"{parallel.vp} chunk(s): expected "
            + (f"a multiple of {others * parallel.vp}, at least that" if others else "none")
        )


def expert_problems(config: TrainingConfig, architecture: ModelSizes) -> Iterator[str]:
    """What ep, etp and the other keys of a mixture ask that its experts do not do."""
    parallel, mixture = config.parallel, architecture.mixture
    if mixture is None:
        for name, value, neutral in (("ep", parallel.ep, 1), ("etp", parallel.etp or "null", "null")):
            if value != neutral:
                yield (
                    f"parallel.{name} = {value} is about experts, and the model is no mixture of experts: "
                    f"remove it, or parallel.{name}={neutral} on the command line"
                )
        for name in ("moe_dispatcher", "moe_permute_fusion", "moe_router_fusion"):
            if getattr(parallel, name) not in (False, "alltoall"):
                yield f"parallel.{name} is about experts, and the model is no mixture of experts: remove it"
        for name in ("moe_aux_loss_coeff", "moe_bias_update_rate"):
            if value := getattr(config.model, name):
                yield (
                    f"model.{name} = {value} is about experts, and the model is no mixture of experts: "
                    f"remove it, or model.{name}=0 on the command line"
                )
        return
    etp = parallel.etp or parallel.tp
    if mixture.num_experts % parallel.ep:
        yield (
            f"the model's {mixture.num_experts} experts do not divide by parallel.ep = {parallel.ep}: "
            f"choose ep among the divisors of {mixture.num_experts}"
        )
    if architecture.ffn_hidden_size % etp:
        yield (
            f"the {architecture.ffn_hidden_size} columns of an expert (ffn_hidden_size) do not divide by "
            f"parallel.etp = {etp}{'' if parallel.etp else ' (as tp)'}: choose etp among the divisors of "
            f"{architecture.ffn_hidden_size}"
        )
    if architecture.all_biases and etp > 1:
        yield (
            f"parallel.etp = {etp}{'' if parallel.etp else ' (as tp)'}: experts with biases, as this model "
            "has them, are not cut (megatron-core refuses it): set parallel.etp = 1"
        )
    if parallel.tp % etp:
        yield (
            f"parallel.etp = {etp} does not divide parallel.tp = {parallel.tp}: choose etp among the "
            f"divisors of {parallel.tp}"
        )
    if parallel.tp > 1 and not parallel.sequence_parallel:
        yield (
            f"a mixture of experts at parallel.tp = {parallel.tp} needs parallel.sequence_parallel = true: "
            "without it every tensor-parallel rank would send the same tokens to the experts"
        )
    if parallel.moe_dispatcher == "flex" and etp * parallel.ep == 1:
        yield (
            "parallel.moe_dispatcher = flex exchanges tokens among more than one rank (megatron-core), and "
            "parallel.etp * ep = 1: set ep, or moe_dispatcher = alltoall"
        )
    if mixture.routing == "sigmoid" and config.model.moe_aux_loss_coeff:
        yield (
            f"model.moe_aux_loss_coeff = {config.model.moe_aux_loss_coeff}: the router's biases keep the "
            "experts of this model busy, and the loss does not know them (nor groups): remove it"
        )
    if mixture.routing != "sigmoid" and config.model.moe_bias_update_rate:
        yield (
            f"model.moe_bias_update_rate = {config.model.moe_bias_update_rate}: this model's router has no "
            "biases by which it chooses experts: take model.moe_aux_loss_coeff, or remove it"
        )
    if mixture.experts_per_token == 1 and mixture.normalizes_weights:
        yield (
            "the model sends each token to one expert and divides its weight by itself, so its router would "
            "never learn (megatron-core refuses it): use at least 2 experts per token"
        )
