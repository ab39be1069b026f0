"""What a run of `sftrl grpo` says beyond what every training run says."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from megatron_sftrl.config.paths import ExpandedPath
from megatron_sftrl.config.rewards import RewardList, RewardWorkersSection
from megatron_sftrl.config.schema import TrainingConfig
from megatron_sftrl.config.section import Section


class PromptSection(Section):
    """The prompts, and the answers that rewards look at."""

    train: list[ExpandedPath] = Field(min_length=1)
    """JSONL or Parquet files, or directories written by datasets.save_to_disk, with `prompt` or `messages`;
    every other column reaches the rewards."""
    valid: list[ExpandedPath] = Field(default=[])
    """Held-out prompts of the same kinds; no evaluation when empty."""
    max_prompt_length: int = Field(ge=1)
    """Longest prompt, in tokens; a longer one is refused before the run begins."""
    shuffle: bool = True
    """A new order each epoch, derived from the run's seed and the epoch."""


class VllmSection(Section):
    """The vLLM engine, for rollout.engine: vllm."""

    tp: int = Field(default=1, ge=1)
    """Tensor parallel size of an engine, whatever the trainer's; the ranks form world_size / tp engines."""
    max_num_seqs: int = Field(default=256, ge=1)
    """Responses that one engine generates at the same time."""
    gpu_memory_utilization: float = Field(default=0.5, gt=0, le=1)
    """Share of each GPU's memory that vLLM may take in all."""
    enforce_eager: bool = False
    """No CUDA graphs: slower, starts sooner, needs less memory. Always so on the CPU."""
    bucket_mb: int = Field(default=512, ge=1)
    """Mebibytes of weights in flight during an update."""
    checksums: bool = False
    """Compare the bits of all weights at their holder and their receiver in every update."""
    probe_limit: float = Field(default=0.3, gt=0)
    """Nats: after each update the mean |difference| of engine and trainer over a few generated tokens that
    ends the run. In bf16 0.05 to 0.2 on single tokens is usual, stale weights give several nats."""


class RolloutSection(Section):
    """How responses are generated."""

    engine: Literal["in_process", "vllm"] = "in_process"
    """in_process: the training engine itself, in every layout. vllm: vLLM in the same processes, with weights
    moved from shard to shard."""
    vllm: VllmSection = VllmSection()
    prompts_per_step: int = Field(ge=1)
    """Prompts of one step, over all ranks."""
    group_size: int = Field(default=8, ge=1)
    """G, responses per prompt."""
    max_new_tokens: int = Field(ge=1)
    """Longest response, end token included."""
    temperature: float = Field(default=1.0, gt=0)
    """Logits are divided by it, when sampling and in the loss."""
    top_p: float = Field(default=1.0, gt=0, le=1)
    """The smallest set of likeliest tokens that holds at least this probability is sampled from."""
    top_k: int = Field(default=0, ge=0)
    """The k likeliest tokens are sampled from; 0 for all."""
    stop_ids: list[int] = Field(default=[])
    """Token ids that end a response, beside those of the tokenizer, of its chat template and of the model's
    generation_config.json. An export ends at all of them."""
    stop: list[Annotated[str, Field(min_length=1)]] = Field(default=[])
    """Texts that end a response, special tokens written out. The token that completes one is the last of the
    response and is trained on like an end token; rewards read the text in front of it. An export does not
    know them: give them to vLLM or transformers again."""
    max_concurrent: int = Field(default=512, ge=1)
    """in_process: responses generated together on one replica; bounds the memory of the cache."""
    passes: int = Field(default=1, ge=1)
    """Times that each response is trained on, in mini-batches of batch.global_size."""
    offload: bool = False
    """On GPUs: while responses are generated, gradients are dropped and the optimizer's state waits in CPU
    memory. vLLM gives its own memory back while the trainer trains in any case."""
    save_samples: int = Field(default=4, ge=0)
    """Groups written to rollouts.jsonl each step."""

    def in_flight(self, dp: int) -> tuple[int, int]:
        """Of a training step on one of `dp` replicas: most responses at once, most prompts in one forward."""
        num_prompts = -(-self.prompts_per_step // dp)
        if num_prompts * self.group_size <= self.max_concurrent:
            return num_prompts * self.group_size, num_prompts
        # Places that come free may begin inside a group and end inside another one.
        return self.max_concurrent, -(-(self.max_concurrent - 1) // self.group_size) + 1


class AdvantagesSection(Section):
    """From the rewards of a group to the advantages of its responses."""

    estimator: Literal["group_normalized", "dr_grpo", "leave_one_out"] = "group_normalized"
    """(r - mean) / (std + 1e-6); r - mean; r - mean of the others."""


class FiltersSection(Section):
    """Which responses are trained on."""

    dynamic_sampling: bool = False
    """Leave groups out in which the first reward is equal for all, and draw further prompts in their place
    (DAPO, where all are right or all are wrong). A step draws as many as the last one's share of useful
    groups asks for, with a margin; useful groups beyond a full step are put back, and the next step's policy
    answers their prompts again."""
    max_rounds: int = Field(default=4, ge=1)
    """Generations of one step under dynamic_sampling, each of at most 4 * rollout.prompts_per_step prompts.
    Of what was found by then whole mini-batches (batch.global_size) are trained on; the rest is put back."""
    mask_truncated: bool = False
    """Responses without their end token count in the group's mean, but carry no loss."""
    max_idle_steps: int = Field(default=10, ge=1)
    """Steps in a row with nothing to learn from that end the run: in every group the rewards are equal or
    unknown, or the responses are masked."""


class GrpoConfig(TrainingConfig):
    """One run of `sftrl grpo`."""

    preset: str | None = None
    """Published settings that hold where this file says nothing: luffy, srft, curiosft_rl, dapo,
    deepseekmath, dr_grpo, gspo."""
    data: PromptSection
    rollout: RolloutSection
    rewards: RewardList
    """What makes a response good: their weighted sum is the reward. The first one says what a success is, for
    pass@k: a response that it gives at least 0.5."""
    reward_workers: RewardWorkersSection = RewardWorkersSection()
    advantages: AdvantagesSection = AdvantagesSection()
    filters: FiltersSection = FiltersSection()

    @property
    def max_length(self) -> int:
        """As in the base class."""
        return self.data.max_prompt_length + self.rollout.max_new_tokens

    @property
    def length_keys(self) -> str:
        """As in the base class."""
        return "data.max_prompt_length + rollout.max_new_tokens"

    @property
    def has_validation(self) -> bool:
        """As in the base class."""
        return bool(self.data.valid)
