"""Mixtures of experts in training: where their parameters live, and what keeps the experts equally busy."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.moe.experts import SequentialMLP
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.moe_utils import (
    MoEAuxLossAutoScaler,
    get_tokens_per_expert_and_token_count,
    switch_load_balancing_loss_func,
)
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_sftrl.engine.parallel import ParallelContext
from megatron_sftrl.types import TokenBatch

BALANCE_METRIC = "moe/load_balancing_loss"


class BalancedRouter(TopKRouter):
    """Megatron's router and its auxiliary loss, which counts by its micro-batch's share of the step's tokens.

    Of each layer and micro-batch m, which tp and cp ranks share (arXiv:2101.03961, eq. 4 to 6, k choices):

        aux_m = E sum_i f_i P_i       f_i: expert i's share of the k T_m choices, P_i: its mean probability

    The step gains coeff * sum_m aux_m T_m / T_step over all micro-batches and replicas; T counts real tokens.
    Megatron multiplies aux_m by the rank's tokens, for a division that schedule.py takes out.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.begin_step(torch.zeros(()))

    def begin_step(self, token_share: Tensor) -> None:
        """Forget the last step; a real token of this one is `token_share` of it, 1 / T_step."""
        self._token_share = token_share
        self.balance = torch.zeros_like(token_share)
        """This rank's part of sum_m aux_m T_m / T_step so far."""

    def _apply_aux_loss(
        self,
        probs: Tensor,  # [T, E]
        scores_for_aux_loss: Tensor,  # [T, E] fp32, zero rows at padding
        routing_map: Tensor,  # [T, E] bool, as well
        with_padding_mask: bool = False,
    ) -> Tensor:
        choices, _, num_tokens = get_tokens_per_expert_and_token_count(
            routing_map=routing_map, reduce_group=self.tp_cp_group, topk=self.topk, with_padding_mask=True
        )
        aux = switch_load_balancing_loss_func(
            probs=scores_for_aux_loss,
            tokens_per_expert=choices,
            total_num_tokens=num_tokens.clamp(min=1),  # type: ignore[union-attr]
            topk=self.topk,
            num_experts=self.config.num_moe_experts,  # type: ignore[arg-type]
            moe_aux_loss_coeff=1.0,
        )
        part = aux * num_tokens * self._token_share
        # Only where gradients are made: the first of two forwards under recomputation does not come here.
        self.balance = self.balance + part.detach()
        return MoEAuxLossAutoScaler.apply(probs, self.get_aux_loss_coeff("aux_loss") * part)  # type: ignore[return-value]


def forget_routing(chunks: Sequence[torch.nn.Module]) -> None:
    """Let go of what the last micro-batch left in Megatron's token dispatchers.

    Its probabilities carry their graph, which ends in the hooks of the parameters, and so in the model: a
    cycle through autograd that Python's collector cannot see, and that would keep a model and the threads of
    its process groups alive for as long as the process.
    """
    for chunk in chunks:
        for module in chunk.modules():
            if isinstance(module, MoELayer):
                module.token_dispatcher.probs = None  # type: ignore[union-attr]


class ExpertBalance:
    """The load-balancing loss of a step over all layers and ranks; the chunks have BalancedRouters.

    Args:
        num_layers: of the whole model.
    """

    def __init__(self, chunks: Sequence[torch.nn.Module], num_layers: int, parallel: ParallelContext) -> None:
        self._routers = [
            module for chunk in chunks for module in chunk.modules() if isinstance(module, BalancedRouter)
        ]
        self._num_layers, self._parallel = num_layers, parallel

    def begin_step(self, batches: Sequence[TokenBatch]) -> None:
        """Count the step's real tokens; a collective."""
        count = sum(
            batch.num_tokens - (0 if batch.is_padding is None else int(batch.is_padding.sum()))
            for batch in batches
        )
        total = torch.tensor(float(count), device=self._parallel.device)
        dist.all_reduce(total, group=self._parallel.dp_group)
        for router in self._routers:
            router.begin_step(1 / total.clamp(min=1))

    def finish_step(self) -> dict[str, float]:
        """sum_m aux_m T_m / T_step, averaged over the layers, before its coefficient; on every rank."""
        total = torch.stack([router.balance for router in self._routers]).sum()
        dist.all_reduce(total)
        return {BALANCE_METRIC: float(total) / self._num_layers}


class CountingRouter(TopKRouter):
    """Megatron's sigmoid router, which counts the visits of a step's real tokens on this rank."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        assert self.num_experts is not None
        self.visits = torch.zeros(self.num_experts, dtype=torch.int64)
        """[E], since the last begin_step."""

    def _apply_expert_bias(
        self,
        routing_map: Tensor,  # [T, E] bool
        padding_mask: Tensor | None = None,  # [T] True at padding
    ) -> None:
        # Only where gradients are made: the first of two forwards under recomputation does not count.
        if torch.is_grad_enabled():
            if padding_mask is not None:
                routing_map = routing_map & ~padding_mask[:, None]
            self.visits = self.visits.to(routing_map.device) + routing_map.sum(dim=0)


class ExpertBiases:
    """Moves the biases of CountingRouters behind a step (arXiv:2408.15664, algorithm 1; DeepSeek-V3, 2.1.2):

    b_i += rate * sign(mean_j n_j - n_i)       n_i: tokens of the step, on all ranks, that visited expert i
    """

    def __init__(self, chunks: Sequence[torch.nn.Module], rate: float, parallel: ParallelContext) -> None:
        self._routers = [
            module for chunk in chunks for module in chunk.modules() if isinstance(module, CountingRouter)
        ]
        self._rate, self._parallel = rate, parallel

    def begin_step(self) -> None:
        for router in self._routers:
            router.visits = torch.zeros_like(router.visits)

    def move(self) -> None:
        """A collective of the stage's ranks."""
        if not self._routers:  # a pipeline stage of dense layers
            return
        visits = torch.stack([router.visits for router in self._routers]).to(self._parallel.device)
        # A replica's tokens are spread over its tp (sequence parallelism) and cp ranks.
        dist.all_reduce(visits, group=self._routers[0].tp_cp_group)
        dist.all_reduce(visits, group=self._parallel.dp_group)
        # In whole numbers: E times the mean are all visits.
        signs = torch.sign(visits.sum(dim=1, keepdim=True) - visits.shape[1] * visits)
        for router, sign in zip(self._routers, signs, strict=True):
            router.expert_bias.add_(self._rate * sign)  # type: ignore[union-attr]


def balance_experts(layer: ModuleSpec, config: TransformerConfig) -> None:
    """Give a block's mixture the router that balances or counts, where the run asks for one."""
    if config.moe_aux_loss_coeff:
        submodules_of_mlp(layer).router = BalancedRouter
    if config.moe_router_bias_update_rate:
        submodules_of_mlp(layer).router = CountingRouter


def submodules_of_mlp(layer: ModuleSpec) -> Any:
    """Of a block's MLP or mixture: in a ModuleSpec (megatron-core 0.16.1), or bound to its class (0.19.2)."""
    mlp: Any = layer.submodules.mlp  # type: ignore[union-attr]
    return mlp.keywords["submodules"] if isinstance(mlp, partial) else mlp.submodules


def add_routing_biases(chunk: torch.nn.Module) -> None:
    """Give sigmoid routers the biases that experts are chosen by: fp32, without gradients.

    Megatron's own are buffers, which it moves after every step, skipped ones and padding included.
    """
    for module in chunk.modules():
        if isinstance(module, TopKRouter) and module.score_function == "sigmoid":
            bias = torch.zeros(module.num_experts, device=torch.cuda.current_device())  # type: ignore[arg-type]
            module.expert_bias = torch.nn.Parameter(bias, requires_grad=False)  # type: ignore[assignment]


def let_experts_add_biases(chunk: torch.nn.Module) -> None:
    """Give Megatron's experts an output of their own: they add a bias to it in place.

    Where nothing is reduced it is a view, on which autograd refuses that (megatron-core 0.16.1).
    """
    for module in chunk.modules():
        if isinstance(module, SequentialMLP) and module.config.add_bias_linear:
            for expert in module.local_experts:
                expert.linear_fc2.register_forward_hook(_own_output)  # type: ignore[union-attr]


def _own_output(_: torch.nn.Module, __: tuple, output: tuple) -> tuple:
    product, bias = output
    return product.clone(), bias


def mark_expert_parameters(chunk: torch.nn.Module) -> None:
    """Tell Megatron's DDP and optimizer which parameters live on the experts' grid (etp x ep x edp).

    Its layers do so only where ep > 1; at etp < tp and ep = 1 the tensor-parallel ranks hold copies of an
    expert that saw different tokens, and nothing would add their gradients up. In that grid every rank's part
    counts in the gradient norm, on whichever tp rank it lies.
    """
    for module in chunk.modules():
        if isinstance(module, MoELayer):
            assert isinstance(module.experts, torch.nn.Module)
            for parameter in module.experts.parameters():
                parameter.allreduce = False  # type: ignore[attr-defined]
                parameter.tensor_model_parallel = True  # type: ignore[attr-defined]
                # Else the biases of experts on different tensor-parallel ranks would share their gradients.
                parameter.sequence_parallel = False  # type: ignore[attr-defined]
