"""The model in training: forward_backward and optim_step, two of the four verbs a trainer knows."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_sftrl.config.schema import TrainingConfig
from megatron_sftrl.engine.context_parallel import gather_whole
from megatron_sftrl.engine.determinism import named_operator
from megatron_sftrl.engine.lora import add_adapters, lora_targets
from megatron_sftrl.engine.megatron_config import check_fp8, transformer_config
from megatron_sftrl.engine.mixtures import ExpertBalance, ExpertBiases, forget_routing
from megatron_sftrl.engine.model import (
    LanguageModel,
    build_model_chunks,
    initialize_weights,
    zero_weights,
)
from megatron_sftrl.engine.objective import (
    MicrobatchReport,
    Objective,
    OutputHead,
    StepReport,
    microbatch_report,
    reduce_reports,
)
from megatron_sftrl.engine.optimizer import (
    OptimStep,
    TrainingState,
    build_optimizer,
    gradient_parts,
    learning_rate,
    step_if_finite,
    wrap_with_ddp,
)
from megatron_sftrl.engine.parallel import ParallelContext
from megatron_sftrl.engine.recompute import complete_recomputation
from megatron_sftrl.engine.reference import ReferenceModel
from megatron_sftrl.engine.router_replay import RouterReplay
from megatron_sftrl.engine.schedule import LastStageInput, as_megatron_loss, finalize_gradients, run_schedule
from megatron_sftrl.losses.registry import Loss
from megatron_sftrl.models.architecture import Architecture
from megatron_sftrl.types import TokenBatch
from megatron_sftrl.vocab_parallel import TokenDistribution

# How long a rank takes to its own gradients, before it waits for those of others.


class GradientClock:
    """Seconds from the beginning of a forward to the end of this rank's backward, summed until collected.

    The reduction over data-parallel ranks, where the fast ones wait for the slow, is not in them. Waiting
    inside (tensor, context, expert and pipeline parallel) is: ranks that share a model copy look alike. CUDA
    is timed by events in its stream, without waiting for it; the CPU by the wall clock.
    """

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._started: float | torch.cuda.Event = 0.0
        self._spans: list[tuple[float | torch.cuda.Event, float | torch.cuda.Event]] = []

    def start(self) -> None:
        self._started = self._now()

    def stop(self) -> None:
        """The last backward of this rank has been done, or queued."""
        self._spans.append((self._started, self._now()))

    def collect(self) -> float:
        """Seconds since the last call. The device has done what was queued."""
        spans, self._spans = self._spans, []
        return sum(_seconds(start, stop) for start, stop in spans)

    def _now(self) -> float | torch.cuda.Event:
        if not self._is_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event


def _seconds(start: float | torch.cuda.Event, stop: float | torch.cuda.Event) -> float:
    if isinstance(start, torch.cuda.Event) and isinstance(stop, torch.cuda.Event):
        return start.elapsed_time(stop) / 1e3
    assert isinstance(start, float) and isinstance(stop, float)
    return stop - start


@dataclass(frozen=True, slots=True, kw_only=True)
class Base:
    """A Hugging Face directory, and the SHA-256 over the names and contents of its weight files."""

    path: str
    weights: str


Ask = Callable[[TokenDistribution, TokenDistribution | None, Tensor], Sequence[Tensor]]
"""[T] nats, one or several, from the policy, the reference where there is one, and the labels [T] int64."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Part:
    """Some micro-batches of a step, at least one, and the loss they are given to.

    What the part counts in the step is in its token_weight. All parts have one length where stages of a
    pipeline exchange tensors of one size.

    Args:
        sampled_at: the temperature at which the tokens were sampled, where no update of their step has moved
            the weights yet. Their old_logprobs are then the policy's own in this forward, whatever the
            batches carry, and the report says what was seen of each token. None elsewhere.
    """

    batches: Sequence[TokenBatch]
    loss: Loss
    sampled_at: float | None = None


class PolicyEngine:
    """Owns the policy's chunks, their gradients and the optimizer on this rank.

    Args:
        with_optimizer: False for evaluation and scoring, which then need no gradient memory.
    """

    def __init__(
        self,
        architecture: Architecture,
        run: TrainingConfig,
        parallel: ParallelContext,
        *,
        with_optimizer: bool = True,
    ) -> None:
        self.architecture = architecture
        self.parallel = parallel
        self.on_microbatch: Callable[[], None] | None = None
        """Called when a micro-batch begins, of training, evaluation and scoring."""
        self.clock = GradientClock(parallel.device)
        self.optim = run.optim
        self.lora = run.lora
        self.base: Base | None = None
        """Where the frozen weights under the adapters of LoRA came from, set by what loads them."""
        self.token_multiple = run.train.fp8.multiple if run.train.fp8 else 1
        """Of the tokens of a micro-batch on each rank, where train.fp8 asks for one."""
        check_fp8(run.train, parallel.device)
        self.config: TransformerConfig = transformer_config(
            architecture, run.model, run.parallel, run.train, is_cuda=parallel.device.type == "cuda"
        )
        self._objective = Objective(
            vocab_size=architecture.vocab_size,
            parallel=parallel,
            fused=run.loss.fused,
            dtype=self.config.params_dtype,
            chunk_bytes=run.loss.chunk_bytes,
        )
        self.chunks: list[LanguageModel] = build_model_chunks(architecture, self.config, parallel)
        complete_recomputation(self.chunks, self.config, run.train)
        if run.model.hf is None and run.model.init_checkpoint is None:
            initialize_weights(self.chunks, architecture, seed=run.seed)
        else:
            # Real weights follow; drawing a large model's random ones would cost minutes.
            zero_weights(self.chunks)
        if run.lora is not None:
            add_adapters(self.chunks, architecture, run.lora, parallel, seed=run.seed)
        self._balance: ExpertBalance | None = None
        if run.model.moe_aux_loss_coeff:
            self._balance = ExpertBalance(self.chunks, architecture.num_layers, parallel)
        self._biases: ExpertBiases | None = None
        if run.model.moe_bias_update_rate and with_optimizer:
            self._biases = ExpertBiases(self.chunks, run.model.moe_bias_update_rate, parallel)
        self.router_replay: RouterReplay | None = None
        if run.grpo is not None and run.grpo.rollout.router_replay:
            self.router_replay = RouterReplay(self.chunks, architecture, parallel)
        self.wrapped: list[DistributedDataParallel] | list[LanguageModel] = self.chunks
        self.optimizer = None
        self.training_state: TrainingState | None = None
        if with_optimizer:
            self._prepare_training(run)

    def _prepare_training(self, run: TrainingConfig) -> None:
        wrapped = wrap_with_ddp(self.chunks, self.config, run.parallel)
        self.wrapped = wrapped
        self.config.finalize_model_grads_func = _finalize_after(self.clock)
        if run.parallel.overlap_grad_reduce:
            no_syncs = [chunk.no_sync for chunk in wrapped]
            self.config.no_sync_func = no_syncs if len(no_syncs) > 1 else no_syncs[0]  # type: ignore[assignment]
        if run.parallel.overlap_grad_reduce and len(wrapped) > 1:
            self.config.grad_sync_func = [chunk.start_grad_sync for chunk in wrapped]  # type: ignore[assignment]
        self.optimizer = build_optimizer(wrapped, run.optim, run.parallel, is_bf16=run.model.dtype == "bf16")
        self.training_state = TrainingState(wrapped, self.optimizer, self.parallel.device)

    def adapters_record(self) -> dict[str, Any] | None:
        """What checkpoint.json says about the adapters and their base; None without LoRA."""
        if self.lora is None:
            return None
        whole = {"modules_to_save": list(self.lora.modules_to_save)} if self.lora.modules_to_save else {}
        return {
            **whole,  # older records have no such key
            "rank": self.lora.rank,
            "alpha": self.lora.alpha,
            "targets": lora_targets(self.architecture, self.lora),
            "rslora": self.lora.rslora,
            "dropout": self.lora.dropout,
            "base": self.base.weights if self.base else None,
            "base_path": self.base.path if self.base else None,
        }

    @contextlib.contextmanager
    def lent_memory(self, *, offload: bool) -> Iterator[None]:
        """Gradients and optimizer state are off the device for the block, where `offload` asks for it.

        After a failure in the block they stay away: the run ends.
        """
        state = self.training_state if offload else None
        if state is not None:
            state.leave()
        yield
        if state is not None:
            state.come_back()

    def forward_backward(
        self,
        batches: Sequence[TokenBatch],
        loss: Loss,
        reference: ReferenceModel | None = None,
        *,
        sampled_at: float | None = None,
    ) -> StepReport:
        """Gradients of sum(token_loss * token_weight) over the step and all ranks, ready for optim_step.

        model.moe_aux_loss_coeff adds the routers' load-balancing loss to the gradients, not to the loss.
        `sampled_at` as in Part.
        """
        part = Part(batches=batches, loss=loss, sampled_at=sampled_at)
        return self.forward_backward_parts([part], reference)[0]

    def forward_backward_parts(
        self, parts: Sequence[Part], reference: ReferenceModel | None = None
    ) -> list[StepReport]:
        """The same of a step whose micro-batches have different losses, with a report of each part.

        The gradients are those of all parts together; what is measured of the experts is in the first report.
        """
        batches = [batch for part in parts for batch in part.batches]
        self.zero_gradients()
        if self._balance is not None:
            self._balance.begin_step(batches)
        if self._biases is not None:
            self._biases.begin_step()
        if self.router_replay is not None:
            self.router_replay.begin_step()
        longest = self._objective.longest(batches, over_all_ranks=True)
        self.clock.start()
        try:
            first, *others = self._run(parts, reference, longest=longest, forward_only=False)
        finally:
            self._forget_added_gradients()
        forget_routing(self.chunks)
        metrics = dict(first.metrics)
        if self._balance is not None:
            metrics |= self._balance.finish_step()
        # Demonstrations of an SFT term have been seen by no engine.
        if self.router_replay is not None and any(batch.experts is not None for batch in batches):
            metrics |= self.router_replay.finish_step()
        return [dataclasses.replace(first, metrics=metrics), *others]

    def zero_gradients(self) -> None:
        """Empty Megatron's gradient buffers; the schedule accumulates into them."""
        assert self.optimizer is not None and self.training_state is not None
        assert not self.training_state.is_away, "the training state comes back before the next step"
        for chunk in self.wrapped:
            assert isinstance(chunk, DistributedDataParallel)
            chunk.train()
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()

    @torch.no_grad()
    def evaluate(
        self, batches: Sequence[TokenBatch], loss: Loss, reference: ReferenceModel | None = None
    ) -> StepReport:
        """The same numbers without gradients."""
        part, longest = Part(batches=batches, loss=loss), self._objective.longest(batches)
        with self.evaluation():
            return self._run([part], reference, longest=longest, forward_only=True)[0]

    @torch.no_grad()
    @named_operator()
    def token_numbers(
        self, batches: Sequence[TokenBatch], ask: Ask, reference: ReferenceModel | None = None
    ) -> list[Tensor]:
        """What `ask` answers of each token, [k, T] per whole micro-batch; empty before the last stage."""
        parallel, longest = self.parallel, self._objective.longest(batches)
        reference_states = reference.hidden_states(batches) if reference is not None else []

        def look(stage: LastStageInput) -> tuple[Tensor, Tensor, Tensor]:
            policy = OutputHead(model=stage.model, hidden_states=stage.hidden_states)
            prior = None if reference is None else reference.head(reference_states[stage.index])
            answers = ask(
                self._objective.distribution(policy, longest=longest),
                None if prior is None else self._objective.distribution(prior, longest=longest),
                stage.batch.labels,
            )
            whole = torch.stack([gather_whole(each, stage.lengths, parallel) for each in answers])
            return as_megatron_loss(whole.new_zeros(()), whole)

        found = run_schedule(
            self.wrapped, batches, look, parallel, forward_only=True, on_microbatch=self.on_microbatch
        )
        if reference is not None:
            reference.finish_step()
        return found

    def gradient(self) -> list[Tensor]:
        """A copy in CPU memory, fp32, of this rank's part of what forward_backward left (gradient_parts)."""
        assert self.optimizer is not None
        parts = gradient_parts(self.optimizer, self.parallel)
        return [part.detach().to("cpu", torch.float32, copy=True) for part in parts]

    @named_operator()
    def optim_step(self, step: int, *, num_steps: int, loss: float = 0.0) -> OptimStep:
        """Clip, update the weights, and report; a step that is not finite changes nothing.

        Args:
            step: 0-based, for the learning rate over the `num_steps` of the whole run.
            loss: of the step: NaN and infinity skip it as a non-finite gradient norm does.
        """
        assert self.optimizer is not None
        lr = learning_rate(step, self.optim, num_steps=num_steps)
        gathers = [chunk.gathers for chunk in self.chunks if chunk.gathers is not None]
        for each in gathers:
            each.before_update()
        result = step_if_finite(
            self.optimizer, lr=lr, is_loss_finite=math.isfinite(loss), decays_all=self.optim.decay_all
        )
        for each in gathers:
            each.after_update()
        if self._biases is not None and not result.is_skipped:
            self._biases.move()
        return result

    @contextlib.contextmanager
    def evaluation(self) -> Iterator[None]:
        """The chunks in evaluation mode: recomputation and other training-only work is off."""
        before = [chunk.training for chunk in self.wrapped]
        for chunk in self.wrapped:
            chunk.eval()
        try:
            yield
        finally:
            for chunk, was_training in zip(self.wrapped, before, strict=True):
                chunk.train(was_training)

    def gather_parameters(self) -> None:
        """Fetch other ranks' updates now; with overlap_param_gather they would arrive in the next forward.

        What reads weights of this package's chunks waits by itself (LanguageModel.wait_for_weights).
        """
        for chunk in self.chunks:
            chunk.wait_for_weights()

    def reload_optimizer_weights(self) -> None:
        """Take weights that were loaded into the model over into the optimizer's fp32 copies."""
        if self.optimizer is not None:
            self.optimizer.reload_model_params()

    @named_operator()
    def _run(
        self, parts: Sequence[Part], reference: ReferenceModel | None, *, longest: int, forward_only: bool
    ) -> list[StepReport]:
        batches = [batch for part in parts for batch in part.batches]
        owners = [part for part in parts for _ in part.batches]
        reference_states = _reference_states(parts, reference)

        def last_stage(stage: LastStageInput) -> tuple[Tensor, Tensor, object]:
            part, states = owners[stage.index], reference_states.get(stage.index)
            values = self._objective.values(
                part.loss,
                OutputHead(model=stage.model, hidden_states=stage.hidden_states),
                reference.head(states) if reference is not None and states is not None else None,
                stage.batch,
                longest=longest,
                weighted=stage.weighted,
                sampled_at=part.sampled_at,
            )
            report = microbatch_report(values, stage.batch.token_weight)
            return as_megatron_loss(values.total, report)  # type: ignore[arg-type]

        reports = run_schedule(
            self.wrapped,
            batches,
            last_stage,
            self.parallel,
            forward_only=forward_only,
            on_microbatch=self.on_microbatch,
        )
        if reference is not None:
            reference.finish_step()
        found, first = [], 0
        for part in parts:
            mine = reports[first : first + len(part.batches)]
            whole = reduce_reports(mine, self.parallel, loss_name=part.loss.name)
            found.append(dataclasses.replace(whole, seen=tuple(self._seen(part.batches, mine))))
            first += len(part.batches)
        return found

    def _seen(self, batches: Sequence[TokenBatch], reports: Sequence[MicrobatchReport]) -> Iterator[Tensor]:
        """[2, T] of each whole micro-batch, where it was asked for; `reports` are the last stage's."""
        for batch, report in zip(batches, reports, strict=False):
            if report.seen is not None:
                lengths = batch.lengths()
                yield torch.stack([gather_whole(row, lengths, self.parallel) for row in report.seen])

    def _forget_added_gradients(self) -> None:
        """Take back the fused layer's mark for Megatron's DDP: this gradient is in main_grad already."""
        for chunk in self.wrapped:
            assert isinstance(chunk, DistributedDataParallel)
            for parameter in chunk.params_with_grad:
                parameter.grad_added_to_main_grad = False


def _reference_states(parts: Sequence[Part], reference: ReferenceModel | None) -> dict[int, Tensor]:
    """By the number of the micro-batch in the step, of the parts whose loss looks at the reference.

    Empty without any, and on all but the last stage.
    """
    if reference is None:
        return {}
    needs = ["reference" in part.loss.needs for part in parts for _ in part.batches]
    batches = [batch for part in parts for batch in part.batches]
    numbers = [number for number, is_needed in enumerate(needs) if is_needed]
    states = reference.hidden_states([batches[number] for number in numbers]) if numbers else []
    return dict(zip(numbers, states, strict=False))


def _finalize_after(clock: GradientClock) -> Callable[..., None]:
    """finalize_gradients with the clock stopped: there the schedule begins to wait for other ranks."""

    # Not a method: the configuration would hold the policy, and Megatron copies configurations.
    def finalize(chunks: list[torch.nn.Module], *args: Any, **kwargs: Any) -> None:
        clock.stop()
        finalize_gradients(chunks, *args, **kwargs)

    return finalize
