"""Responses from vLLM in the trainer's own processes: consecutive ranks form an engine, engines are replicas.

Every rank runs its part of an engine under vLLM's external_launcher, with a scheduler of its own: the ranks
of an engine stay in step because they get equal requests and draw from equal streams.
"""

from __future__ import annotations

import gc
import json
import secrets
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from megatron_sftrl.engine.parallel import ParallelContext
from megatron_sftrl.engine.policy import PolicyEngine
from megatron_sftrl.engine.together import SharedProgress, on_every_rank, on_rank_zero
from megatron_sftrl.errors import UserError
from megatron_sftrl.models.architecture import Architecture
from megatron_sftrl.models.engine_shards import EngineLayout
from megatron_sftrl.rollout.api import (
    Decode,
    OnResponse,
    Stops,
    check_prompts,
    no_matter,
    response_seed,
)
from megatron_sftrl.rollout.process_state import Guest
from megatron_sftrl.rollout.reshard import Resharder, ReshardReport, between_all_ranks
from megatron_sftrl.rollout.vllm_settings import (
    VllmSettings,
    check_on_cpu,
    check_vllm,
    cpu_cache_bytes,
    environment,
    memory_advice,
    ranks,
    vllm_config,
)
from megatron_sftrl.types import Prompt, Rollout, RolloutGroup, SamplingParams

if TYPE_CHECKING:
    from vllm import LLM
    from vllm import SamplingParams as VllmSamplingParams
    from vllm.outputs import RequestOutput
    from vllm.v1.executor import Executor


# The memory of an engine that shares its GPU: gone while the trainer trains, back in parts for an update.


Part = Literal["weights", "kv_cache"]
"""What an engine wakes by itself: weights come first, since an update needs room for its messages, too."""


class EngineMemory:
    """Which parts of an engine's memory are there.

    Args:
        sleep: gives everything back; weights and cache are lost.
        is_cuda: on the CPU no engine can give memory back, and neither is called.
    """

    def __init__(self, *, sleep: Callable[[], None], wake: Callable[[Part], object], is_cuda: bool) -> None:
        self._sleep, self._wake, self._is_cuda = sleep, wake, is_cuda
        self._asleep: set[Part] = set()

    def sleep(self) -> None:
        if self._is_cuda and len(self._asleep) < 2:
            self._sleep()
            self._asleep = {"weights", "kv_cache"}

    def wake(self, part: Part) -> None:
        """Take memory for a part that is asleep; its contents are arbitrary."""
        if part not in self._asleep:
            return
        assert part == "weights" or "weights" not in self._asleep, "weights wake before the cache"
        # The engine takes its memory from the driver, not from what torch keeps for the trainer's next step.
        torch.cuda.empty_cache()
        self._wake(part)
        self._asleep.remove(part)


# Prompts dealt to engines that generate side by side, and their responses brought together again.


def share_of(num_prompts: int, layout: EngineLayout, rank: int) -> range:
    """Numbers of the prompts that the replica of `rank` continues: every num_replicas-th."""
    return range(layout.replica(rank), num_prompts, layout.num_replicas)


def all_rollouts(
    mine: list[Rollout], layout: EngineLayout, rank: int, *, num_prompts: int, size: int
) -> list[tuple[Rollout, ...]]:
    """The groups of all prompts, in order, on every rank; collective over the whole job.

    Args:
        mine: this rank's, `size` for each prompt of share_of(); the ranks of a replica have the same.
        num_prompts: of all replicas.
    """
    drawn = [0] * layout.world_size
    dist.all_gather_object(drawn, hash(tuple(rollout.response_tokens for rollout in mine)))
    groups: dict[int, tuple[Rollout, ...]] = {}
    for replica in range(layout.num_replicas):
        ranks = layout.replica_ranks(replica)
        assert len({drawn[each] for each in ranks}) == 1, (
            f"ranks {ranks} are one engine and drew different tokens"
        )
        # One replica after the other: gathering objects fills what every rank has up to the longest.
        told = [mine if rank == ranks[0] else None]
        dist.broadcast_object_list(told, src=ranks[0])
        rollouts = told[0]
        assert rollouts is not None
        for index, prompt in enumerate(share_of(num_prompts, layout, ranks[0])):
            groups[prompt] = tuple(rollouts[index * size : (index + 1) * size])
    return [groups[prompt] for prompt in range(num_prompts)]


# New weights for a running vLLM engine, and the proof that it took all of them.


def load_weights(
    llm: LLM, model: torch.nn.Module, weights: Iterable[tuple[str, Tensor]], *, is_cuda: bool
) -> None:
    """Replace every weight of a running engine.

    This is vLLM's reload_weights, which keeps to itself what was loaded, with repairs: without them the
    engine goes on with earlier weights, silently (on the CPU those of experts and of a tied head, anywhere
    the experts and sinks of a GPT-OSS), or fails (at the norms of q and k of a MiniMax-M2).

    Args:
        model: of this rank in the engine.
        weights: (Hugging Face name, tensor of the whole shape).
    Raises:
        UserError: a name that the engine does not have, or a parameter of it that lacks elements.
    """
    from vllm.config import set_current_vllm_config
    from vllm.model_executor.layers.fused_moe.fused_moe_method_base import FusedMoEMethodBase
    from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload
    from vllm.model_executor.model_loader.reload.layerwise import get_layerwise_info

    config = llm.llm_engine.vllm_config
    if config.model_config.hf_config.model_type == "gpt_oss":
        weights = with_experts_apart(weights)
    expected = {name for name, _ in model.named_parameters()}
    for parameter in model.parameters():
        loader: Any = getattr(parameter, "weight_loader", None)
        if isinstance(loader, partial):
            # The reload asks each loader for its name.
            loader.__name__ = loader.func.__name__  # type: ignore[attr-defined]
    for module in model.modules():
        method: Any = getattr(module, "quant_method", None)
        if not is_cuda and isinstance(method, FusedMoEMethodBase):
            # A kernel that is there keeps the experts' weights as it packed them first.
            method.moe_kernel = None
        if isinstance(getattr(module, "sinks", None), torch.nn.Parameter):
            # A GPT-OSS copies sinks past their loader, which in a reload is into a parameter without memory.
            # A layer that counts as begun keeps its own.
            get_layerwise_info(module).load_numel_total = 0
    with set_current_vllm_config(config), torch.no_grad():
        initialize_layerwise_reload(model)
        try:
            missing = expected - model.load_weights(weights)  # type: ignore[operator]
            for name, module in model.named_modules():
                info = get_layerwise_info(module)
                size = sum(parameter.numel() for parameter in module.parameters(recurse=False))
                # Finished layers have no total any more. The vocabulary's padding is never loaded.
                is_open = info.load_numel_total and not isinstance(module, VocabParallelEmbedding)
                if is_open and info.load_numel < size:
                    missing.add(f"{name} ({info.load_numel} of {size} elements)")
        finally:
            # Also after a failure: what was left half loaded would count in the next update.
            finalize_layerwise_reload(model, config.model_config)
        if not is_cuda:
            for module in model.modules():
                if isinstance(module, ParallelLMHead):
                    # A tied head is not among the loaded layers, and holds a packed copy of its own.
                    head: Any = module
                    head.quant_method.process_weights_after_loading(head)
    if missing:
        raise UserError(
            f"no weight of the policy reached these parameters of the rollout engine: {sorted(missing)}; use "
            "rollout.engine: in_process, and report this architecture"
        )


def with_experts_apart(weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """The tensors of a GPT-OSS with each of its experts by itself, under vLLM's name for that.

    A whole stack vLLM copies past the parameters' loaders, in a reload into parameters without memory.
    """
    for name, tensor in weights:
        layer, experts, part = name.partition(".mlp.experts.")
        if not experts:
            yield name, tensor
            continue
        for expert, values in enumerate(tensor):
            yield f"{layer}{experts}{expert}.{part}", values


class VllmEngine:
    """A RolloutEngine (see api.py) on vLLM, after check_vllm; construction is collective.

    Args:
        parallel: the ranks that form engines.
        dtype: of the weights.
        resharder: gives this rank what it reads of them.
        decode: needed where sampling stops at texts.
        progress: told of every step of the engine.
    Raises:
        UserError: on every rank: not enough memory.
    """

    def __init__(
        self,
        architecture: Architecture,
        parallel: ParallelContext,
        dtype: torch.dtype,
        resharder: Resharder,
        settings: VllmSettings,
        decode: Decode | None = None,
        progress: SharedProgress | None = None,
    ) -> None:
        self._settings, self._parallel, self._architecture = settings, parallel, architecture
        self._layout = EngineLayout(tp=settings.tp, world_size=parallel.world_size)
        self._is_cuda = parallel.device.type == "cuda"
        self._guest = Guest(parallel.device, environment(parallel), ranks(parallel))
        self._resharder = resharder
        self._decode, self._progress = decode, progress
        self._version: int | None = None
        self._temperature = 1.0
        # It is no result: vLLM keeps frames of its start alive, and with them whatever they return.
        self._guest.run(lambda: on_every_rank(lambda: self._start(dtype)))
        self._model = self._llm.apply_model(lambda model: model)[0]
        self._temper_logits()
        if not self._is_cuda:
            _choose_by_sigmoids(self._model)
        self._memory = EngineMemory(
            sleep=lambda: self._guest.run(lambda: self._llm.sleep(level=2)),
            wake=lambda part: self._guest.run(lambda: self._llm.wake_up(tags=[part])),
            is_cuda=self._is_cuda,
        )
        # The trainer may need what its construction left to the engine.
        self.sleep()

    @property
    def last_report(self) -> ReshardReport | None:
        return self._resharder.last_report

    def update(self, policy: PolicyEngine | None, *, version: int) -> None:
        """The weights are those that the Resharder gives; a `policy` is not looked at."""
        self._version = None
        self._wake("weights")
        self._guest.run(self._load)
        self._wake("kv_cache")
        # The cached keys and values of a prompt were computed with the earlier weights.
        is_reset = self._guest.run(self._llm.reset_prefix_cache)
        assert is_reset, "requests are running during an update"
        self._version = version

    def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: SamplingParams,
        on_response: OnResponse = no_matter,
    ) -> list[RolloutGroup]:
        """Each replica takes every num_replicas-th prompt."""
        assert self._version is not None, "update() comes first, and again after sleep()"
        check_prompts(
            prompts,
            sampling,
            max_length=self._settings.max_model_len,
            limit="max_model_len",
            vocab_size=self._architecture.vocab_size,
        )
        mine = share_of(len(prompts), self._layout, self._parallel.rank)
        asked = [(prompts[i], number) for i in mine for number in range(sampling.num_samples)]
        place, size = self._layout.tp_rank(self._parallel.rank), self._layout.tp

        def ended(number: int, rollout: Rollout) -> None:
            if number % size == place:
                on_response(*asked[number], rollout)

        rollouts = self._guest.run(
            lambda: on_every_rank(lambda: self._answer_together(asked, sampling, ended))
        )
        groups = all_rollouts(
            rollouts,
            self._layout,
            self._parallel.rank,
            num_prompts=len(prompts),
            size=sampling.num_samples,
        )
        return [
            RolloutGroup(prompt=prompt, rollouts=group, version=self._version)
            for prompt, group in zip(prompts, groups, strict=True)
        ]

    def sleep(self) -> None:
        """Give weights and cache back to the GPU; on the CPU, where vLLM cannot, they stay in memory.

        Level 2 keeps no copy of the weights: the next update brings them. vLLM puts buffers (rotary tables)
        aside itself and restores them when it wakes.
        """
        self._version = None
        self._memory.sleep()

    def close(self) -> None:
        """Release the engine's memory and process groups; the trainer's stay."""
        from vllm.distributed import parallel_state

        core = self._llm.llm_engine.engine_core
        # vLLM's own shutdown, also run when its client is collected, would destroy torch's default group as
        # well: here are its parts without that one.
        core._finalizer.detach()  # type: ignore[attr-defined]
        self._guest.run(core.engine_core.model_executor.shutdown)  # type: ignore[attr-defined]
        parallel_state.destroy_model_parallel()
        parallel_state.get_world_group().destroy()
        parallel_state._WORLD = parallel_state._NODE_COUNT = None
        del core, self._llm, self._model
        gc.collect()
        if self._is_cuda:
            torch.cuda.empty_cache()

    def _wake(self, part: Part) -> None:
        with memory_advice(self._settings):
            on_every_rank(lambda: self._memory.wake(part))

    def _start(self, dtype: torch.dtype) -> None:
        from vllm import LLM

        settings, timeout = self._settings, int(self._parallel.timeout.total_seconds())
        is_hybrid = self._architecture.has_output_gate
        cache = None if self._is_cuda else cpu_cache_bytes(settings, self._architecture, dtype)
        name = on_rank_zero(lambda: secrets.token_hex(8))
        with tempfile.TemporaryDirectory(prefix="vllm-model-") as directory, memory_advice(settings):
            values = vllm_config(self._architecture, dtype)
            Path(directory, "config.json").write_text(json.dumps(values), encoding="utf-8")
            self._llm = LLM(
                directory,
                load_format="dummy",
                skip_tokenizer_init=True,
                generation_config="vllm",  # no sampling defaults out of files
                dtype=dtype,  # type: ignore[arg-type]
                tensor_parallel_size=settings.tp,
                distributed_executor_backend="external_launcher" if self._is_cuda else _cpu_executor(name),
                max_model_len=settings.max_model_len,
                distributed_timeout_seconds=timeout,
                cpu_distributed_timeout_seconds=timeout,
                max_num_seqs=settings.max_num_seqs,
                gpu_memory_utilization=settings.gpu_memory_utilization,
                kv_cache_memory_bytes=cache,
                enforce_eager=settings.enforce_eager or not self._is_cuda,
                enable_prefix_caching=settings.enable_prefix_caching and (self._is_cuda or not is_hybrid),
                # The trainer's, whatever config.json says: states add up over a whole response.
                mamba_ssm_cache_dtype="float32" if is_hybrid else "auto",
                enable_return_routed_experts=settings.returns_experts,
                # A prompt cut into chunks draws a token for each; vLLM then winds its random stream back,
                # which torch's generators for the CPU cannot.
                enable_chunked_prefill=self._is_cuda,
                enable_sleep_mode=self._is_cuda,
                logprobs_mode="raw_logprobs",
                # Requests carry seeds of their own; equal here, since the ranks of an engine must not differ.
                seed=0,
            )
        _unname_shared_memory(name)

    def _temper_logits(self) -> None:
        """Let the model itself divide its logits by the temperature.

        vLLM reports log-probabilities either at temperature 1 (raw_logprobs) or renormalised over what top_k
        and top_p kept (processed_logprobs). With tempered logits and vLLM's own temperature at 1, its raw
        ones are those of the protocol: the whole vocabulary at the sampling temperature.
        """
        from vllm.model_executor.layers.logits_processor import LogitsProcessor

        (last,) = [module for module in self._model.modules() if isinstance(module, LogitsProcessor)]

        def temper(module: torch.nn.Module, inputs: object, logits: Tensor) -> Tensor:
            return logits if self._temperature == 1.0 else logits.float().div_(self._temperature)

        last.register_forward_hook(temper)

    def _load(self) -> None:
        with self._resharder.stream() as stream, memory_advice(self._settings):
            load_weights(self._llm, self._model, stream, is_cuda=self._is_cuda)

    def _answer_together(
        self, asked: list[tuple[Prompt, int]], sampling: SamplingParams, ended: Ended
    ) -> list[Rollout]:
        if self._progress is None:
            return self._answer(asked, sampling, ended)
        return self._progress.together(lambda: self._answer(asked, sampling, ended))

    def _answer(
        self, asked: list[tuple[Prompt, int]], sampling: SamplingParams, ended: Ended
    ) -> list[Rollout]:
        """vLLM's own loop, step by step: a response that stops at a text is taken out by us.

        vLLM's stop strings need its tokenizer, which reads some files otherwise than the trainer's. The ranks
        of an engine stay in step: they see equal tokens and take the same responses out.
        """
        from vllm import TokensPrompt

        self._temperature = sampling.temperature or 1.0
        engine, stops = self._llm.llm_engine, Stops(sampling, self._decode)
        answers = [_Answer() for _ in asked]
        told: set[int] = set()
        with memory_advice(self._settings):
            for place, (prompt, number) in enumerate(asked):
                request = TokensPrompt(prompt_token_ids=list(prompt.tokens))
                seed = response_seed(sampling.seed, prompt.id, number)
                engine.add_request(str(place), request, _vllm_sampling(sampling, seed))
            while engine.has_unfinished_requests():
                if self._progress is not None:
                    self._progress.moved()
                for output in engine.step():
                    place = int(output.request_id)
                    answers[place].take(output, stops)  # type: ignore[arg-type]
                    if answers[place].is_finished and not output.finished:
                        engine.abort_request([output.request_id])
                    if (answers[place].is_finished or output.finished) and place not in told:
                        told.add(place)
                        ended(place, self._rollout(asked[place][0], answers[place]))
        return [self._rollout(prompt, answer) for (prompt, _), answer in zip(asked, answers, strict=True)]

    def _rollout(self, prompt: Prompt, answer: _Answer) -> Rollout:
        rollout = answer.rollout(prompt)
        if not self._settings.returns_experts:
            return rollout
        return with_experts(rollout, answer.experts, self._architecture)


def _choose_by_sigmoids(model: torch.nn.Module) -> None:
    """Let routers of vLLM's CPU build take all experts for one group: sigmoids without groups they refuse."""
    from vllm.model_executor.layers.fused_moe.router.cpu_router import CPURouter

    for module in model.modules():
        router: Any = getattr(module, "router", None)
        if isinstance(router, CPURouter) and router.scoring_func == "sigmoid" and not router.use_grouped_topk:
            router.use_grouped_topk, router.num_expert_group, router.topk_group = True, 1, 1


def beside_trainer(
    policy: PolicyEngine,
    settings: VllmSettings,
    decode: Decode | None = None,
    progress: SharedProgress | None = None,
) -> VllmEngine:
    """Engines on the ranks that train the policy.

    Raises:
        UserError: on every rank: what check_vllm refuses, or not enough memory.
    """
    architecture, parallel = policy.architecture, policy.parallel
    check_vllm(settings, architecture, world_size=parallel.world_size)
    dtype = policy.config.params_dtype
    if parallel.device.type == "cpu":
        check_on_cpu(architecture, dtype)
    resharder = between_all_ranks(
        policy.chunks,
        architecture,
        parallel,
        EngineLayout(tp=settings.tp, world_size=parallel.world_size),
        bucket_bytes=settings.bucket_bytes,
        is_checked=settings.is_checked,
        has_checksums=settings.has_checksums,
    )
    return VllmEngine(architecture, parallel, dtype, resharder, settings, decode, progress)


Ended = Callable[[int, Rollout], None]
"""Told of a response that has come to its end, with its place among those that were asked for."""


@dataclass(slots=True)
class _Answer:
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    is_finished: bool = False
    experts: NDArray[np.integer] | None = None  # of all layers, told with the last token

    def take(self, output: RequestOutput, stops: Stops) -> None:
        """Append new tokens up to the one that ends the response."""
        completion = output.outputs[0]
        if completion.routed_experts is not None:
            self.experts = completion.routed_experts
        if self.is_finished or not completion.token_ids:
            return
        assert completion.logprobs is not None and completion.finish_reason in (None, "stop", "length")
        for token, logprobs in zip(completion.token_ids, completion.logprobs, strict=True):
            self.tokens.append(token)
            self.logprobs.append(logprobs[token].logprob)  # type: ignore[index]
            self.is_finished = stops(self.tokens)
            if self.is_finished:
                return

    def rollout(self, prompt: Prompt) -> Rollout:
        """The response, which has come to its end."""
        return Rollout(
            prompt_tokens=prompt.tokens,
            response_tokens=tuple(self.tokens),
            logprobs=tuple(self.logprobs),
            is_finished=self.is_finished,
        )


def with_experts(rollout: Rollout, told: NDArray[np.integer] | None, architecture: Architecture) -> Rollout:
    """The rollout with what vLLM told of its experts, [n, all layers, k].

    Raises:
        RuntimeError: the experts of other tokens, or none.
    """
    assert architecture.mixture is not None
    num_tokens = len(rollout.prompt_tokens) + len(rollout.response_tokens) - 1
    expected = (num_tokens, architecture.num_layers, architecture.mixture.experts_per_token)
    if told is None or told.shape != expected:
        raise RuntimeError(
            f"rollout.router_replay: expected vLLM's experts of {expected} (tokens, layers, choices), got "
            f"{None if told is None else told.shape}: use rollout.engine: in_process"
        )
    return replace(rollout, experts=told[:, list(architecture.layers_with_experts)])


def _vllm_sampling(sampling: SamplingParams, seed: int) -> VllmSamplingParams:
    from vllm import SamplingParams as VllmSamplingParams
    from vllm.sampling_params import RequestOutputKind

    is_greedy = sampling.temperature == 0
    return VllmSamplingParams(
        temperature=0.0 if is_greedy else 1.0,
        top_p=1.0 if is_greedy else sampling.top_p,
        top_k=0 if is_greedy else sampling.top_k,
        max_tokens=sampling.max_new_tokens,
        stop_token_ids=sorted(sampling.stop_ids),
        seed=seed,
        logprobs=0,  # of the sampled token alone
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
    )


def _cpu_executor(name: str) -> type[Executor]:
    """The external launcher, with shared memory of a name that no other engine on this machine has.

    vLLM names it after the ranks alone: a second job could not start, nor any after one that was killed.
    """
    from vllm.v1.executor.uniproc_executor import ExecutorWithExternalLauncher

    class CpuExecutor(ExecutorWithExternalLauncher):
        def _distributed_args(self) -> tuple[str, int, int]:
            _, rank, local_rank = super()._distributed_args()
            # The part behind the colon is the name; the process group is there already.
            return f"env:{name}", rank, local_rank

    return CpuExecutor


def _unname_shared_memory(name: str) -> None:
    """Every rank of the engine has it open by now; without a name nothing outlives a job that is killed."""
    from vllm.distributed import parallel_state

    for file in Path("/dev/shm").glob(f"{name}*"):
        file.unlink(missing_ok=True)
    queue = parallel_state.get_tp_group().mq_broadcaster
    buffer = None if queue is None else queue.buffer  # none where ranks of no other process share the machine
    if buffer is not None and buffer.is_creator:
        buffer.shared_memory.unlink()
        buffer.is_creator = False  # nothing is left for its end to unlink
