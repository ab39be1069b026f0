"""Responses from vLLM in the trainer's own processes: consecutive ranks form an engine, engines are replicas.

Every rank runs its part of an engine under vLLM's external_launcher, with a scheduler of its own: the ranks
of an engine stay in step because they get equal requests and draw from equal streams.
"""

from __future__ import annotations

import gc
import json
import secrets
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from megatron_sftrl.engine.policy import PolicyEngine
from megatron_sftrl.engine.reshard import Resharder
from megatron_sftrl.engine.together import SharedProgress, on_every_rank, on_rank_zero
from megatron_sftrl.engine.weight_stream import ReshardReport
from megatron_sftrl.models.engine_shards import EngineLayout
from megatron_sftrl.models.hf_config import hf_config_values
from megatron_sftrl.rollout.engine_memory import EngineMemory, Part
from megatron_sftrl.rollout.process_state import Guest
from megatron_sftrl.rollout.replicas import all_rollouts, share_of
from megatron_sftrl.rollout.requests import check_prompts, response_seed
from megatron_sftrl.rollout.stops import Decode, Stops
from megatron_sftrl.rollout.vllm_settings import (
    VllmSettings,
    check_vllm,
    cpu_cache_bytes,
    environment,
    memory_advice,
)
from megatron_sftrl.rollout.vllm_weights import load_weights
from megatron_sftrl.types import Prompt, Rollout, RolloutGroup, SamplingParams

if TYPE_CHECKING:
    from vllm import SamplingParams as VllmSamplingParams
    from vllm.outputs import RequestOutput
    from vllm.v1.executor import Executor


class VllmEngine:
    """A RolloutEngine (see api.py) on vLLM; construction is collective.

    Args:
        policy: whose weights will be generated with; its architecture, dtype and ranks are the engine's.
        settings: of the engine.
        decode: text of tokens; needed where sampling stops at texts.
        progress: told of every step of the engine.
    Raises:
        UserError: on every rank: vLLM is missing or too old, ranks that form no whole replicas, a model that
            vLLM cannot cut like this, not enough memory.
    """

    def __init__(
        self,
        policy: PolicyEngine,
        settings: VllmSettings,
        decode: Decode | None = None,
        progress: SharedProgress | None = None,
    ) -> None:
        parallel = policy.parallel
        check_vllm(settings, policy.architecture, world_size=parallel.world_size)
        self._settings, self._parallel, self._architecture = settings, parallel, policy.architecture
        self._layout = EngineLayout(tp=settings.tp, world_size=parallel.world_size)
        self._is_cuda = parallel.device.type == "cuda"
        self._guest = Guest(parallel.device, environment(parallel))
        self._resharder = Resharder(
            policy.chunks,
            policy.architecture,
            parallel,
            self._layout,
            bucket_bytes=settings.bucket_bytes,
            is_checked=settings.is_checked,
            has_checksums=settings.has_checksums,
        )
        self._policy, self._decode, self._progress = policy, decode, progress
        self._version: int | None = None
        self._temperature = 1.0
        dtype = policy.config.params_dtype
        # It is no result: vLLM keeps frames of its start alive, and with them whatever they return.
        self._guest.run(lambda: on_every_rank(lambda: self._start(dtype)))
        self._model = self._llm.apply_model(lambda model: model)[0]
        self._temper_logits()
        self._memory = EngineMemory(
            sleep=lambda: self._guest.run(lambda: self._llm.sleep(level=2)),
            wake=lambda part: self._guest.run(lambda: self._llm.wake_up(tags=[part])),
            is_cuda=self._is_cuda,
        )
        # The trainer may need what its construction left to the engine.
        self.sleep()

    @property
    def last_report(self) -> ReshardReport | None:
        """What the last update cost this rank."""
        return self._resharder.last_report

    def update(self, policy: PolicyEngine, *, version: int) -> None:
        """As in the protocol; `policy` is the one that the engine was made for."""
        assert policy is self._policy, "an engine serves the policy that it was made for"
        self._version = None
        self.wake()
        self._guest.run(self._load)
        self._wake("kv_cache")
        # The cached keys and values of a prompt were computed with the earlier weights.
        is_reset = self._guest.run(self._llm.reset_prefix_cache)
        assert is_reset, "requests are running during an update"
        self._version = version

    def generate(self, prompts: Sequence[Prompt], sampling: SamplingParams) -> list[RolloutGroup]:
        """As in the protocol; each replica takes every num_replicas-th prompt."""
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
        rollouts = self._guest.run(lambda: on_every_rank(lambda: self._answer_together(asked, sampling)))
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

    def wake(self) -> None:
        """Bring the weights' memory back; update() fills it and brings the cache's back."""
        self._wake("weights")

    def sleep(self) -> None:
        """Give weights and cache back to the GPU; on the CPU, where vLLM cannot, they stay in memory.

        Level 2 keeps no copy of the weights: the next update brings them. vLLM puts buffers (rotary tables)
        aside itself and restores them in wake().
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
        cache = None if self._is_cuda else cpu_cache_bytes(settings, self._architecture, dtype)
        name = on_rank_zero(lambda: secrets.token_hex(8))
        with tempfile.TemporaryDirectory(prefix="vllm-model-") as directory, memory_advice(settings):
            values = hf_config_values(self._architecture, dtype=dtype)
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
                enable_prefix_caching=settings.enable_prefix_caching,
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

    def _answer_together(self, asked: list[tuple[Prompt, int]], sampling: SamplingParams) -> list[Rollout]:
        if self._progress is None:
            return self._answer(asked, sampling)
        return self._progress.together(lambda: self._answer(asked, sampling))

    def _answer(self, asked: list[tuple[Prompt, int]], sampling: SamplingParams) -> list[Rollout]:
        """vLLM's own loop, step by step: a response that stops at a text is taken out by us.

        vLLM's stop strings need its tokenizer, which reads some files otherwise than the trainer's. The ranks
        of an engine stay in step: they see equal tokens and take the same responses out.
        """
        from vllm import TokensPrompt

        self._temperature = sampling.temperature or 1.0
        engine, stops = self._llm.llm_engine, Stops(sampling, self._decode)
        answers = [_Answer() for _ in asked]
        with memory_advice(self._settings):
            for place, (prompt, number) in enumerate(asked):
                request = TokensPrompt(prompt_token_ids=list(prompt.tokens))
                seed = response_seed(sampling.seed, prompt.id, number)
                engine.add_request(str(place), request, _vllm_sampling(sampling, seed))
            while engine.has_unfinished_requests():
                if self._progress is not None:
                    self._progress.moved()
                for output in engine.step():
                    answers[int(output.request_id)].take(output, stops)  # type: ignore[arg-type]
                    if answers[int(output.request_id)].is_finished and not output.finished:
                        engine.abort_request([output.request_id])
        return [
            Rollout(
                prompt_tokens=prompt.tokens,
                response_tokens=tuple(answer.tokens),
                logprobs=tuple(answer.logprobs),
                is_finished=answer.is_finished,
            )
            for (prompt, _), answer in zip(asked, answers, strict=True)
        ]


@dataclass(slots=True)
class _Answer:
    """A response on its way."""

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    is_finished: bool = False

    def take(self, output: RequestOutput, stops: Stops) -> None:
        """Append new tokens up to the one that ends the response."""
        completion = output.outputs[0]
        if self.is_finished or not completion.token_ids:
            return
        assert completion.logprobs is not None and completion.finish_reason in (None, "stop", "length")
        for token, logprobs in zip(completion.token_ids, completion.logprobs, strict=True):
            self.tokens.append(token)
            self.logprobs.append(logprobs[token].logprob)  # type: ignore[index]
            self.is_finished = stops(self.tokens)
            if self.is_finished:
                return


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
    """Every rank of the engine has it open by now; without a name nothing stays behind a job that is killed.

    Args:
        name: of what the executor made.
    """
    from vllm.distributed import parallel_state

    for file in Path("/dev/shm").glob(f"{name}*"):
        file.unlink(missing_ok=True)
    queue = parallel_state.get_tp_group().mq_broadcaster
    buffer = None if queue is None else queue.buffer  # none where ranks of no other process share the machine
    if buffer is not None and buffer.is_creator:
        buffer.shared_memory.unlink()
        buffer.is_creator = False  # nothing is left for its end to unlink
