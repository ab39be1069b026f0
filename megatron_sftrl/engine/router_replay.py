"""Router replay: training visits the experts that the rollout engine chose for each token (arXiv:2510.11370).

A router whose logits are nearly equal may choose other experts in training than in the engine, and the
log-probabilities of the token are then far apart. With the engine's choice given, the trainer's own logits
only weigh those experts, with gradients, as each family weighs its own choice.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import tensor_parallel
from megatron.core.transformer.moe.moe_layer import MoELayer
from numpy.typing import NDArray
from torch import Tensor

from megatron_sftrl.engine.context_parallel import local_rows
from megatron_sftrl.engine.packed_sequences import PackedSequences
from megatron_sftrl.engine.parallel import ParallelContext
from megatron_sftrl.models.architecture import Architecture
from megatron_sftrl.types import OWN_CHOICE, TokenBatch, experts_dtype

CHANGED_METRIC = "router_replay/changed"

ResultT = TypeVar("ResultT")


class RouterReplay:
    """The routers of a policy's chunks: told which experts to visit, and asked which they have visited.

    A batch says it to its own forward (TokenBatch.experts, handed on in PackedSequences), so that the
    backward of any schedule computes the same again.
    """

    def __init__(
        self, chunks: Sequence[torch.nn.Module], architecture: Architecture, parallel: ParallelContext
    ) -> None:
        assert architecture.mixture is not None, "config.checks refuses a dense model"
        self._parallel = parallel
        self.shape = (len(architecture.layers_with_experts), architecture.mixture.experts_per_token)
        """(layers with experts, k), of the whole model."""
        self._dtype = experts_dtype(architecture.mixture.num_experts)
        place_of = {layer: place for place, layer in enumerate(architecture.layers_with_experts)}
        self._choices: dict[int, _Choice] = {}
        layers: list[Any] = [layer for chunk in chunks for layer in chunk.decoder.layers]  # type: ignore[union-attr]
        for layer in layers:
            if isinstance(layer.mlp, MoELayer):
                place = place_of[layer.layer_number - 1]
                self._choices[place] = _add_choice(layer, place, parallel)

    def begin_step(self) -> None:
        """Forget what was counted in the last step."""
        for choice in self._choices.values():
            choice.counts = torch.zeros(2, dtype=torch.int64, device=self._parallel.device)

    def finish_step(self) -> dict[str, float]:
        """Share of the step's (token, layer) whose own experts would have been others; on every rank."""
        total = torch.zeros(2, dtype=torch.int64, device=self._parallel.device)
        for choice in self._choices.values():
            total += choice.counts
        dist.all_reduce(total)
        changed, counted = total.tolist()
        return {CHANGED_METRIC: changed / max(counted, 1)}

    def recorded(
        self, forward: Callable[[], ResultT], batches: Sequence[TokenBatch]
    ) -> tuple[ResultT, list[NDArray[np.int16]]]:
        """What a forward without gradients over whole micro-batches returns, and its choices.

        Returns:
            Of each micro-batch [T, layers with experts, k], OWN_CHOICE where another rank has seen the token
            or has the layer.
        """
        for choice in self._choices.values():
            choice.heard = []
        try:
            result = forward()
            found = [self._choices_of(number, batch) for number, batch in enumerate(batches)]
        finally:
            for choice in self._choices.values():
                choice.heard = None
        return result, found

    def of_replica(self, part: NDArray[np.integer]) -> NDArray[np.integer]:
        """Put together what the ranks of this replica have recorded of a sequence; a collective among them.

        Returns:
            [n, layers with experts, k] of experts_dtype.
        """
        parallel = self._parallel
        whole = torch.from_numpy(part.astype(np.int32)).to(parallel.device)
        for group in (parallel.pp_group, parallel.cp_group, parallel.tp_group):
            if group.size() > 1:
                dist.all_reduce(whole, op=dist.ReduceOp.MAX, group=group)
        found = whole.cpu().numpy()
        assert found.min() != OWN_CHOICE, "a token's experts were recorded by no rank"
        return found.astype(self._dtype)

    def _choices_of(self, number: int, batch: TokenBatch) -> NDArray[np.int16]:
        whole = np.full((batch.num_tokens, *self.shape), OWN_CHOICE, np.int16)
        if self._choices:
            heard = torch.stack([choice.take(number) for choice in self._choices.values()], dim=1)
            rows = _rows_here(batch.lengths(), self._parallel).numpy()
            whole[rows[:, None], np.array([*self._choices])] = heard.cpu().numpy()
        return whole


def _rows_here(lengths: Sequence[int], parallel: ParallelContext) -> Tensor:
    """[T here] int64 rows of a whole micro-batch that this rank's routers see."""
    rows = local_rows(lengths, cp_rank=parallel.cp_rank, cp_size=parallel.cp_size)
    return _share_of_tokens(rows, parallel)


def _share_of_tokens(values: Tensor, parallel: ParallelContext) -> Tensor:
    """Of the first dimension, what sequence parallelism leaves this rank between its attentions."""
    if not parallel.sequence_parallel:
        return values
    return values.chunk(parallel.tp_size)[parallel.tp_rank]


class _Choice:
    """What a router takes in place of its own top k, standing where Megatron would have its RouterReplay.

    That class keeps every router of the process in one list, and the recomputing backwards in a queue.
    """

    def __init__(self) -> None:
        self.told: Tensor | None = None  # [T, k] of the forward that is on its way
        self.heard: list[Tensor] | None = None  # [T, k] of each forward, while somebody listens
        self.counts = torch.zeros(2, dtype=torch.int64)  # changed choices, and all that were told

    def get_replay_topk(
        self,
        scores: Tensor,  # [T, E]
        topk: int,
        num_groups: int | None,
        group_topk: int | None,
        default_compute_topk: Callable[..., tuple[Tensor, Tensor]],
    ) -> tuple[Tensor, Tensor]:
        """Scores and ids of a token's experts, [T, k] each; the name is Megatron's."""
        values, own = default_compute_topk(scores, topk, num_groups=num_groups, group_topk=group_topk)
        if self.heard is not None:
            self.heard.append(own.to(torch.int16))
        if self.told is None:
            return values, own
        is_told = self.told != OWN_CHOICE
        chosen = torch.where(is_told, self.told, own)
        if torch.is_grad_enabled():  # of two forwards under recomputation the second
            is_changed = (chosen.sort(dim=1).values != own.sort(dim=1).values).any(dim=1)
            self.counts = self.counts + torch.stack([is_changed.sum(), is_told[:, 0].sum()])
        return scores.gather(1, chosen), chosen

    def take(self, number: int) -> Tensor:
        assert self.heard is not None
        return self.heard[number]

    @contextlib.contextmanager
    def telling(self, told: Tensor | None) -> Iterator[None]:
        before, self.told = self.told, told
        try:
            yield
        finally:
            self.told = before


class _RecomputedMixture(MoELayer):
    """Megatron's recomputation of router, exchange and experts (moe), which visits the same experts again."""

    def forward(
        self, hidden_states: Tensor, intermediate_tensors: None = None, padding_mask: Tensor | None = None
    ) -> Any:
        assert intermediate_tensors is None, "part of a CUDA graph, which packed sequences do not have"
        router: Any = self.router
        choice: _Choice = router.router_replay
        told, forward = choice.told, super().forward

        def run(hidden_states: Tensor, padding_mask: Tensor | None) -> Any:
            with choice.telling(told):
                return forward(hidden_states, None, padding_mask)

        return tensor_parallel.checkpoint(run, False, hidden_states, padding_mask)


def _add_choice(layer: Any, place: int, parallel: ParallelContext) -> _Choice:
    """Let one block's router hear what its micro-batch says of it, the place-th of those with experts."""
    choice = layer.mlp.router.router_replay = _Choice()
    layer.register_forward_pre_hook(partial(_begin_block, choice, place, parallel), with_kwargs=True)
    layer.register_forward_hook(partial(_end_block, choice))
    if layer.mlp.moe_layer_recompute:
        layer.mlp.moe_layer_recompute, layer.mlp.__class__ = False, _RecomputedMixture
    return choice


def _begin_block(
    choice: _Choice, place: int, parallel: ParallelContext, _: torch.nn.Module, __: tuple, options: dict
) -> None:
    packed = options.get("packed_seq_params")
    assert isinstance(packed, PackedSequences)
    if packed.experts is not None:
        choice.told = _share_of_tokens(packed.experts[:, place], parallel).long()


def _end_block(choice: _Choice, _: torch.nn.Module, __: tuple, ___: object) -> None:
    choice.told = None
