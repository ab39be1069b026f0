"""A second model in the policy's layout, without gradients: frozen (GIFT) or a moving average (CurioSFT)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from megatron_sftrl.config.schema import ReferenceSection, TrainingConfig
from megatron_sftrl.engine.lora import other_adapters, trained_weights, whole_weights
from megatron_sftrl.engine.megatron_config import transformer_config
from megatron_sftrl.engine.model import LanguageModel, build_model_chunks
from megatron_sftrl.engine.objective import OutputHead
from megatron_sftrl.engine.parallel import ParallelContext
from megatron_sftrl.engine.schedule import LastStageInput, as_megatron_loss, run_schedule
from megatron_sftrl.models.architecture import Architecture
from megatron_sftrl.types import TokenBatch


class HostWeights:
    """Weights whose one copy is in host memory, and which are on the device for some of a step.

    Forwards only read them: nothing is ever copied back, what was brought in is dropped. A parameter is the
    same object all the time; its data is the host's memory, pinned where there is CUDA, or the device's.
    """

    def __init__(self, chunks: Sequence[LanguageModel], device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._loads = [load for chunk in chunks for load in self._loads_of(chunk)]

    @torch.no_grad()
    def bring_in(self) -> None:
        """Queue the copies of all weights in the order of their use; each module waits for its own."""
        for load in self._loads:
            for parameter, host in load.weights:
                # Memory of the stream that computes, where it is used last.
                parameter.data = torch.empty_like(host, device=self._device)
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            for load in self._loads:
                for parameter, host in load.weights:
                    parameter.data.copy_(host, non_blocking=True)
                if self._stream is not None:
                    load.arrived = torch.cuda.Event()
                    load.arrived.record(self._stream)

    def leave(self, but: Sequence[Tensor] = ()) -> None:
        """Give the device's memory up, except that of the parameters `but`."""
        staying = {id(parameter) for parameter in but}
        if self._stream is not None:
            torch.cuda.current_stream(self._device).wait_stream(self._stream)
        for load in self._loads:
            for parameter, host in load.weights:
                if id(parameter) not in staying:
                    parameter.data = host

    def _loads_of(self, chunk: LanguageModel) -> Iterator[_Load]:
        """What is read outside of the layers first (embedding, last norm, output layer), then each layer."""
        layers = list(chunk.decoder.layers)
        inside = {id(parameter) for layer in layers for parameter in layer.parameters()}
        ends = [parameter for parameter in chunk.parameters() if id(parameter) not in inside]
        for module, parameters in [(chunk, ends), *((layer, list(layer.parameters())) for layer in layers)]:
            load = _Load([(parameter, self._on_host(parameter)) for parameter in parameters])
            module.register_forward_pre_hook(partial(_wait, load))
            yield load

    def _on_host(self, parameter: Tensor) -> Tensor:
        host = torch.empty_like(parameter, device="cpu", pin_memory=self._stream is not None)
        parameter.data = host.copy_(parameter.data)
        return host


@dataclass(slots=True, eq=False)
class _Load:
    """Parameters and their host memory, and when they have been brought in; at once without CUDA."""

    weights: list[tuple[Tensor, Tensor]]
    arrived: torch.cuda.Event | None = None


def _wait(load: _Load, module: torch.nn.Module, inputs: object) -> None:
    if load.arrived is not None:
        torch.cuda.current_stream().wait_event(load.arrived)


class ReferenceModel:
    """Owns the reference's weights and where they are (offload: see HostWeights; on the CPU they stay).

    It runs through the same schedule as the policy, ahead of it, and keeps the last stage's hidden states
    [T, H]; logits are made of them when the policy's micro-batch is at hand. So pp > 1 needs no path of its
    own and no [T, V] tensor outlives its micro-batch. A moving average of bf16 weights is kept in fp32 beside
    them, where the weights are between two steps.
    """

    has_adapters = False
    """Its state is that of adapters alone (SharedReference)."""

    def __init__(
        self,
        architecture: Architecture,
        run: TrainingConfig,
        section: ReferenceSection,
        parallel: ParallelContext,
    ) -> None:
        self.section = section
        self.parallel = parallel
        self._host: HostWeights | None = None
        config = transformer_config(
            architecture, run.model, run.parallel, run.train, is_cuda=parallel.device.type == "cuda"
        )
        self.chunks = build_model_chunks(architecture, config, parallel)
        for chunk in self.chunks:
            chunk.requires_grad_(False)
            chunk.eval()
        if section.placement == "offload" and parallel.device.type != "cpu":
            self._host = HostWeights(self.chunks, parallel.device)
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

    def averages(self) -> Mapping[int, Tensor]:
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
            if not policy.requires_grad:
                continue  # a routing bias: the average of what does not move, without its rounding
            own.mul_(decay).add_(policy.to(own.device), alpha=1.0 - decay)
        self.round_average()

    @torch.no_grad()
    def hidden_states(self, batches: Sequence[TokenBatch]) -> list[Tensor]:
        """Last-stage hidden states of each micro-batch, in order; empty on other stages."""

        def keep(stage: LastStageInput) -> tuple[Tensor, Tensor, Tensor]:
            return as_megatron_loss(stage.hidden_states.new_zeros(()), stage.hidden_states.detach())

        if self._host is not None:
            self._host.bring_in()
        with self._as_reference():
            # Its routers choose for themselves, also where they are the policy's (SharedReference).
            own = [replace(batch, experts=None) for batch in batches]
            states = run_schedule(self.chunks, own, keep, self.parallel, forward_only=True)
        if self._host is not None:
            self._host.leave(but=self._head_weights())
        return states

    def head(self, hidden_states: Tensor) -> OutputHead:
        """The output layer and what it is applied to, on the last stage."""
        return OutputHead(model=self.chunks[-1], hidden_states=hidden_states)

    def finish_step(self) -> None:
        """The step's last logits have been asked for: everything may leave the device."""
        if self._host is not None:
            self._host.leave()

    def _as_reference(self) -> contextlib.AbstractContextManager[None]:
        """The chunks are the reference for the block."""
        return contextlib.nullcontext()

    def _head_weights(self) -> list[Tensor]:
        """What head() reads once the forward is over: the output layer, or the tied embedding."""
        return [self.chunks[-1].output_weight()] if self.parallel.is_last_stage else []

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


class SharedReference(ReferenceModel):
    """The policy's own weights with other adapters, for a run that trains adapters: no second copy of them.

    What is trained beside adapters (lora.modules_to_save) it has a copy of, from the start.

    Args:
        chunks: the policy's.
        keeps_start: the adapters' start adds something, so that the reference has a copy of it.
    """

    has_adapters = True

    def __init__(
        self,
        section: ReferenceSection,
        parallel: ParallelContext,
        chunks: Sequence[LanguageModel],
        *,
        keeps_start: bool,
    ) -> None:
        self.section, self.parallel, self.chunks = section, parallel, list(chunks)
        self._host = None
        if keeps_start or section.kind == "moving_average":
            kept = trained_weights(chunks)
        else:
            kept = whole_weights(chunks)
        dtype = torch.float32 if section.kind == "moving_average" else None
        self._own = {id(each): each.detach().to(dtype or each.dtype, copy=True) for each in kept}

    def averages(self) -> Mapping[int, Tensor]:
        """By the id() of a trained weight of the policy, the average of it, fp32."""
        return self._own if self.section.kind == "moving_average" else {}

    def head(self, hidden_states: Tensor) -> OutputHead:
        last = self.chunks[-1]
        own = self._own.get(id(last.output_weight()))
        weight = None if own is None else own.to(last.config.params_dtype)
        return OutputHead(model=last, hidden_states=hidden_states, weight=weight)

    def _as_reference(self) -> contextlib.AbstractContextManager[None]:
        return other_adapters(self.chunks, self._own)

    def _pairs(self, policy_chunks: Sequence[LanguageModel]) -> list[tuple[Tensor, Tensor]]:
        for chunk in policy_chunks:
            chunk.wait_for_weights()
        return [
            (self._own[id(each)], each) for each in trained_weights(policy_chunks) if id(each) in self._own
        ]

    def _rounded(self) -> list[tuple[Tensor, Tensor]]:
        """None: the forward rounds them where it reads them."""
        return []
