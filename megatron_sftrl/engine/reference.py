"""A second model in the policy's layout, without gradients: frozen (GIFT) or a moving average (CurioSFT)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_sftrl.config.schema import ReferenceSection, TrainingConfig
from megatron_sftrl.engine.megatron_config import transformer_config
from megatron_sftrl.engine.model import LanguageModel, build_model_chunks
from megatron_sftrl.engine.objective import OutputHead
from megatron_sftrl.engine.parallel import ParallelContext
from megatron_sftrl.engine.schedule import LastStageInput, as_megatron_loss, run_schedule
from megatron_sftrl.models.architecture import Architecture
from megatron_sftrl.types import TokenBatch


class ReferenceModel:
    """Owns the reference's weights and where they are.

    It runs through the same schedule as the policy, ahead of it, and keeps the last stage's hidden states
    [T, H]; logits are made of them when the policy's micro-batch is at hand. So pp > 1 needs no path of its
    own and no [T, V] tensor outlives its micro-batch. A moving average of bf16 weights is kept in fp32 beside
    them, where the weights are between two steps.
    """

    def __init__(
        self,
        architecture: Architecture,
        run: TrainingConfig,
        section: ReferenceSection,
        parallel: ParallelContext,
    ) -> None:
        self.section = section
        self.parallel = parallel
        config = transformer_config(
            architecture, run.model, run.parallel, run.train, is_cuda=parallel.device.type == "cuda"
        )
        self.chunks = build_model_chunks(architecture, config, parallel)
        for chunk in self.chunks:
            chunk.requires_grad_(False)
            chunk.eval()
        self._home = torch.device("cpu") if section.placement == "offload" else parallel.device
        self._move(self._home)
        self._averages: list[dict[str, Tensor]] = [
            {
                name: weight.detach().to(torch.float32)
                for name, weight in chunk.named_parameters()
                if section.kind == "moving_average" and weight.dtype != torch.float32
            }
            for chunk in self.chunks
        ]

    @torch.no_grad()
    def copy_from(self, policy_chunks: Sequence[LanguageModel]) -> None:
        """Take the policy's weights as they are now."""
        for own, policy in self._pairs(policy_chunks):
            own.copy_(policy)
        self.round_average()

    def averages(self) -> dict[int, Tensor]:
        """By the id() of a weight, the fp32 average that it is rounded from; bf16 would lose small updates.

        Empty for a frozen reference, and for fp32 weights, which are the average themselves.
        """
        return {id(weight): average for weight, average in self._rounded()}

    @torch.no_grad()
    def round_average(self) -> None:
        """Bring the weights that the forward reads to where the fp32 average is."""
        for weight, average in self._rounded():
            weight.copy_(average)

    def is_due(self, steps_done: int) -> bool:
        """A moving average follows after every sync_every-th optimizer step, a frozen reference never."""
        return self.section.kind == "moving_average" and steps_done % self.section.sync_every == 0

    @torch.no_grad()
    def follow(self, policy_chunks: Sequence[LanguageModel]) -> None:
        """reference <- decay * reference + (1 - decay) * policy in fp32   (CurioSFT, arXiv:2602.02244)."""
        decay = self.section.decay
        for own, policy in self._pairs(policy_chunks):
            own.mul_(decay).add_(policy.to(own.device), alpha=1.0 - decay)
        self.round_average()

    @torch.no_grad()
    def hidden_states(self, batches: Sequence[TokenBatch]) -> list[Tensor]:
        """Last-stage hidden states of each micro-batch, in order; empty on other stages."""

        def keep(stage: LastStageInput) -> tuple[Tensor, Tensor, Tensor]:
            return as_megatron_loss(stage.hidden_states.new_zeros(()), stage.hidden_states.detach())

        self._move(self.parallel.device)
        states = run_schedule(self.chunks, batches, keep, self.parallel, forward_only=True)
        self._offload_body()
        return states

    def head(self, hidden_states: Tensor) -> OutputHead:
        """The output layer and what it is applied to, on the last stage."""
        return OutputHead(model=self.chunks[-1], hidden_states=hidden_states)

    def finish_step(self) -> None:
        """The step's last logits have been asked for: everything may leave the device."""
        self._move(self._home)

    def _offload_body(self) -> None:
        """The blocks leave after the forward; the output layer (or tied embedding) stays for logits()."""
        if self._home == self.parallel.device:
            return
        for chunk in self.chunks:
            chunk.decoder.to(self._home)

    def _move(self, device: torch.device) -> None:
        for chunk in self.chunks:
            chunk.to(device)

    def _pairs(self, policy_chunks: Sequence[LanguageModel]) -> list[tuple[Tensor, Tensor]]:
        """What is kept of each weight (its fp32 average where there is one), and the policy's."""
        pairs = []
        for own, averages, policy in zip(self.chunks, self._averages, policy_chunks, strict=True):
            policy.wait_for_weights()
            policy_parameters = dict(policy.named_parameters())
            pairs += [
                (averages.get(name, value), policy_parameters[name]) for name, value in own.named_parameters()
            ]
        return pairs

    def _rounded(self) -> list[tuple[Tensor, Tensor]]:
        """Each weight that is its average rounded, and the average."""
        return [
            (weight, averages[name])
            for chunk, averages in zip(self.chunks, self._averages, strict=True)
            for name, weight in chunk.named_parameters()
            if name in averages
        ]
