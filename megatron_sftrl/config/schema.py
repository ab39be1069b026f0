"""Everything a run can be told, as one tree of typed sections. An unknown key is an error.

Each field's text below it is its documentation: meaning, unit, range.
"""

from __future__ import annotations

import datetime
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from megatron_sftrl.config.data import (
    Aggregation,
    DataSection,
    NamedLoss,
    PromptSection,
    Section,
    SftTermSection,
)
from megatron_sftrl.config.gates import GateSection
from megatron_sftrl.config.lora import LoraSection
from megatron_sftrl.config.paths import ExpandedPath, ModuleName
from megatron_sftrl.config.rewards import RewardList, RewardWorkersSection
from megatron_sftrl.errors import UserError

# Which network is trained: its sizes and its first weights.


class ArchitectureSection(Section):
    """Sizes of a randomly initialised model, for those who have no config.json."""

    family: Literal["llama", "mistral", "qwen2", "qwen3", "mixtral", "qwen3_moe"]
    """Block layout: llama and mistral (no biases), qwen2 (q/k/v biases), qwen3 (q/k norms), mixtral and
    qwen3_moe (mixtures of experts)."""
    num_layers: int = Field(ge=1)
    """Transformer blocks."""
    hidden_size: int = Field(ge=1)
    """H, width of the residual stream."""
    ffn_hidden_size: int = Field(ge=1)
    """Width of the gated MLP, in a mixture of each expert."""
    num_attention_heads: int = Field(ge=1)
    """Query heads."""
    num_query_groups: int | None = Field(default=None, ge=1)
    """Key/value heads; the number of query heads when not given."""
    head_dim: int | None = Field(default=None, ge=1)
    """Width of one head; hidden_size / num_attention_heads when not given."""
    vocab_size: int = Field(ge=2)
    """V, rows of the embedding before padding for tensor parallelism."""
    max_position_embeddings: int = Field(default=4096, ge=1)
    """Longest sequence, in tokens."""
    rope_theta: float = Field(default=10000.0, gt=0)
    """Base of the rotary frequencies."""
    norm_eps: float = Field(default=1e-6, gt=0)
    """Added to the variance in RMSNorm."""
    tie_embeddings: bool = False
    """Use the embedding as the output layer."""
    num_experts: int | None = Field(default=None, ge=1)
    """Experts in each block of a mixture."""
    experts_per_token: int | None = Field(default=None, ge=1)
    """Experts that a token visits in a mixture; their weights are made to sum to 1."""
    init_std: float = Field(default=0.02, gt=0)
    """Standard deviation of the random weights."""

    @model_validator(mode="after")
    def _mixtures_need_experts(self) -> ArchitectureSection:
        is_mixture = self.family in ("mixtral", "qwen3_moe")
        if is_mixture != (self.num_experts is not None) or is_mixture != (self.experts_per_token is not None):
            raise UserError(
                "num_experts and experts_per_token belong to the families mixtral and qwen3_moe: "
                f"set both or neither, for family {self.family} {'both' if is_mixture else 'neither'}"
            )
        return self


class ModelSection(Section):
    """Which network is trained, and from which weights it starts."""

    hf: ExpandedPath | None = None
    """A Hugging Face model directory: sizes from its config.json, initial weights from its safetensors files;
    its tokenizer is used when tokenizer.path is not given."""
    allow_pickle: bool = False
    """Read model.hf's weights from pickled .bin files, as tensors only, when it has no safetensors."""
    text_only: bool = False
    """Of a multimodal model (Gemma 3 or Qwen3.5 with images) train the language model alone; what is exported
    is a model of text."""
    hf_config: ExpandedPath | None = None
    """Sizes only, from a Hugging Face config.json or the directory that holds one."""
    architecture: ArchitectureSection | None = None
    """Explicit sizes, instead of the two above."""
    init_checkpoint: ExpandedPath | None = None
    """Start from the weights of this checkpoint (step or run directory); random when not given."""
    dtype: Literal["bf16", "fp32"] = "bf16"
    """Dtype of parameters and activations; optimizer state is fp32 in both, gradients are what
    parallel.grad_reduce_dtype says."""
    layers: Literal["auto", "te", "torch"] = "auto"
    """te: Transformer Engine's layers, which need CUDA. torch: PyTorch's operators in the same layout, on any
    device. auto: Transformer Engine's where CUDA is there and the package is installed; one that does not
    import is refused."""
    moe_aux_loss_coeff: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Weight of the load-balancing loss of a mixture of experts (Megatron's aux_loss, 1 in a balanced layer).
    A step takes its mean over micro-batches, by their tokens, and its sum over layers."""
    moe_bias_update_rate: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """How far a step moves the biases by which a DeepSeek-V3, a GLM-4.5 or a MiniMax-M2 chooses experts
    (arXiv:2408.15664): up that of an expert that fewer of the step's tokens visited than the mean, down that
    of one that more did. 0 leaves them as they were loaded."""

    @model_validator(mode="after")
    def _one_source(self) -> ModelSection:
        sources = (self.hf, self.hf_config, self.architecture)
        if sum(source is not None for source in sources) != 1:
            raise UserError("give exactly one of model.hf, model.hf_config and model.architecture")
        if self.hf is not None and self.init_checkpoint is not None:
            raise UserError(
                "model.hf and model.init_checkpoint both name initial weights: for the checkpoint's, give "
                "the directory as model.hf_config instead of model.hf"
            )
        return self


class TokenizerSection(Section):
    """Text to ids."""

    path: ExpandedPath
    """A Hugging Face tokenizer directory, a SentencePiece model by any name, or a tekken.json."""
    chat_template: ExpandedPath | None = None
    """A Jinja file used instead of the tokenizer's own chat template; SentencePiece and tekken have none."""
    chat_template_kwargs: dict[str, Any] = Field(default={})
    """Switches of the chat template, such as {enable_thinking: false} or {reasoning_effort: high}, for
    training and generation; a row's own column chat_template_kwargs comes first."""
    date: datetime.date | None = None
    """The date that a chat template is told when it asks for today's, such as 2026-01-31: tokens must not
    depend on the day. Not given: templates that can do without print a date of their own."""


class ParallelSection(Section):
    """How the model and the batch are split. dp is what is left: world_size / (tp * pp * cp)."""

    tp: int = Field(default=1, ge=1)
    """Tensor parallel size."""
    pp: int = Field(default=1, ge=1)
    """Pipeline parallel size."""
    vp: int = Field(default=1, ge=1)
    """Model chunks per pipeline stage (virtual pipeline); needs pp > 1 when larger than 1."""
    first_stage_layers: int | None = Field(default=None, ge=1)
    """Layers of the first pipeline stage, all of its chunks together; as many as the other stages have when
    not given. Each stage's layers divide by vp."""
    last_stage_layers: int | None = Field(default=None, ge=1)
    """The same for the last stage. Fewer there make up for the output layer and the loss, which take about as
    long as a layer or two of a 70B model, twice that with a reference."""
    cp: int = Field(default=1, ge=1)
    """Context parallel size: each sequence is split over this many ranks."""
    sequence_parallel: bool = False
    """Split the residual stream over tp between the tensor-parallel regions; needs tp > 1, and a mixture of
    experts at tp > 1 needs it."""
    ep: int = Field(default=1, ge=1)
    """Expert parallel size: the experts of a mixture are spread over this many ranks, taken from dp x cp (and
    from tp where etp is smaller than tp)."""
    etp: int | None = Field(default=None, ge=1)
    """Tensor parallel size inside each expert; tp when not given."""
    distributed_optimizer: bool = False
    """Shard the optimizer state over dp."""
    grad_reduce_dtype: Literal["fp32", "bf16"] = "fp32"
    """Dtype in which gradients are kept, and summed over micro-batches and dp. bf16 needs half the memory and
    half the messages, and rounds the sum after each micro-batch; model.dtype has to be bf16. Adam computes in
    fp32 in both."""
    overlap_grad_reduce: bool = False
    """Reduce gradients while the backward still runs."""
    overlap_param_gather: bool = False
    """Gather updated parameters while the next forward runs; needs the two settings above."""
    moe_dispatcher: Literal["alltoall", "flex"] = "alltoall"
    """How a mixture's tokens reach the ranks of their experts. flex: DeepEP's kernels, which need CUDA, the
    package deep_ep and tp * ep > 1; a token is sent once to each node instead of once to each expert."""
    moe_permute_fusion: bool = False
    """Sort a mixture's tokens by expert in one kernel of Transformer Engine's."""
    moe_router_fusion: bool = False
    """Choose a mixture's experts in one kernel of Transformer Engine's."""
    megatron: dict[str, Any] = Field(default={})
    """Fields of Megatron's TransformerConfig, DistributedDataParallelConfig and OptimizerConfig that have no
    key here, such as {bucket_size: 80000000, moe_router_dtype: fp32}, as Megatron's documentation has them.
    Names and types are checked; what another key sets, or what would break a promise of this package, is
    refused."""


class BatchSection(Section):
    """How sequences become optimizer steps."""

    global_size: int = Field(ge=1)
    """Sequences per optimizer step, over all ranks."""
    micro_size: int = Field(default=1, ge=1)
    """Sequences per micro-batch, when packing is off."""
    packing: bool = False
    """Fill each micro-batch with as many sequences as fit into max_tokens."""
    max_tokens: int | None = Field(default=None, ge=2)
    """Tokens per packed micro-batch; needed when packing is on, at least data.max_length."""
    aggregation: Aggregation = "token_mean"
    """Mean over loss tokens; mean over sequences of their token means; sum over tokens divided by
    (sequences * data.max_length), of GRPO by (responses * rollout.max_new_tokens)."""

    @model_validator(mode="after")
    def _packing_needs_a_size(self) -> BatchSection:
        if self.packing != (self.max_tokens is not None):
            raise UserError("batch.packing and batch.max_tokens go together: set both or neither")
        return self


class LossSection(NamedLoss):
    """The objective. Keys other than name, modules, fused and chunk_mb are the loss's own options."""

    name: str
    """A registered loss: sft, gift, pear, curiosft, ... or one of your own."""
    modules: list[ModuleName] = Field(default=[])
    """Python files or importable modules that register losses, imported before the name is looked up."""
    fused: Literal["auto", "on", "off"] = "auto"
    """Output layer and loss together, logits existing for a chunk of tokens at a time. auto: where a
    micro-batch has more logits than one chunk. Same numbers, up to rounding."""
    chunk_mb: int | None = Field(default=None, ge=1)
    """Mebibytes of logits in one chunk. Not given: 112 on the CPU; on GPUs 512, or what 4,096 tokens
    have where that is more."""

    @property
    def chunk_bytes(self) -> int | None:
        """The same in bytes."""
        return None if self.chunk_mb is None else self.chunk_mb * 2**20


class ReferenceSection(Section):
    """A second model of the policy's shape and layout, without gradients."""

    kind: Literal["frozen", "moving_average"]
    """frozen: the weights that training starts from (GIFT). moving_average: follows the policy (CurioSFT)."""
    placement: Literal["resident", "offload"] = "resident"
    """offload keeps the weights in CPU memory and brings them in, layer by layer ahead of their use, for the
    reference's forward."""
    checkpoint: ExpandedPath | None = None
    """Frozen weights from this checkpoint instead of the policy's initial weights."""
    decay: float = Field(default=0.01, ge=0, le=1)
    """moving_average: reference <- decay * reference + (1 - decay) * policy, in fp32 whatever model.dtype is.
    The default is what CurioSFT's release executes (alpha = 0.99 is the policy's share): after an update the
    reference is 99 % policy. The paper's words, a slowly moving teacher, would be decay: 0.99."""
    sync_every: int = Field(default=5, ge=1)
    """moving_average: steps, as in train.steps, between two updates."""


class OptimSection(Section):
    """AdamW (or SGD) and its schedule."""

    name: Literal["adamw", "sgd"] = "adamw"
    """Optimizer."""
    lr: float = Field(gt=0)
    """Peak learning rate."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """Shape after the warm-up."""
    min_lr_ratio: float = Field(default=0.0, ge=0, le=1)
    """Final learning rate / peak, for cosine and linear."""
    schedule_steps: int | None = Field(default=None, ge=1)
    """Steps, warm-up included, after which cosine and linear end at min_lr_ratio; train.steps when not given.
    A run that ends before stops on the way down."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps, as in train.steps, over which the learning rate rises linearly from 0."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW moments."""
    eps: float = Field(default=1e-8, gt=0)
    """AdamW epsilon."""
    momentum: float = Field(default=0.0, ge=0, lt=1)
    """SGD momentum."""
    weight_decay: float = Field(default=0.01, ge=0)
    """Decoupled decay of matrices, and with decay_all of everything."""
    decay_all: bool = False
    """Decay norms and biases, too, as a plain torch.optim.AdamW over all parameters does."""
    clip_grad: float = Field(default=1.0, ge=0)
    """Largest global gradient norm; 0 switches clipping off."""
    exp_avg_dtype: Literal["fp32", "bf16"] = "fp32"
    """Dtype of AdamW's first moment. bf16 here or below is Megatron's precision-aware optimizer: it needs
    Transformer Engine, parallel.distributed_optimizer and model.dtype: bf16."""
    exp_avg_sq_dtype: Literal["fp32", "bf16"] = "fp32"
    """Dtype of AdamW's second moment."""
    cpu_offload: float = Field(default=0.0, ge=0, le=1)
    """Share of each rank's fp32 weights and moments that stay in CPU memory, where the CPU updates them; 1
    for all. Needs what exp_avg_dtype: bf16 needs, and both moments in fp32."""

    @property
    def has_low_moments(self) -> bool:
        """Whether a moment is kept in fewer than 32 bits."""
        return "bf16" in (self.exp_avg_dtype, self.exp_avg_sq_dtype)


class Fp8Section(Section):
    """Eight-bit products of Transformer Engine's linear layers."""

    format: Literal["hybrid", "e4m3"] = "hybrid"
    """hybrid: weights and activations in e4m3, gradients in e5m2. e4m3: all in e4m3."""
    recipe: Literal["tensorwise", "blockwise", "mxfp8"] = "tensorwise"
    """What shares a scale. tensorwise: a tensor, from its present values (compute capability 8.9 or later).
    blockwise: 128 values, or 128 x 128 of a weight (9.0). mxfp8: 32 values (10.0)."""

    @property
    def multiple(self) -> int:
        """What the sides of every product are multiples of, tokens included."""
        return 32 if self.recipe == "mxfp8" else 16


RecomputedModule = Literal["layernorm", "mlp", "mlp_act", "moe", "moe_act"]
"""Parts of a block, by Megatron's names (mlp_act is ours)."""


class TrainSection(Section):
    """How long, and with what memory."""

    steps: int | None = Field(default=None, ge=1)
    """Steps in all: optimizer steps of `sftrl sft`; of `sftrl grpo` rollouts, each with its updates."""
    epochs: int | None = Field(default=None, ge=1)
    """Passes over the data, instead of steps; an incomplete last batch of the run is left out."""
    fp8: Fp8Section | None = None
    """Products of the blocks' linear layers in eight bits; bf16 when not given. Weights, gradients, attention
    and the output layer stay as they are. Needs Transformer Engine's layers."""
    deterministic: bool = False
    """On GPUs, the same bits from the same run: kernels that add in a changing order are replaced by slower
    ones, and an operator that has no other ends the run. A resumed run then continues bit by bit, which it
    does on the CPU in any case. Not for rollout.engine: vllm."""
    recompute: Literal["none", "selective", "full"] = "none"
    """What the backward computes again instead of keeping it. full: whole blocks, of which only the input is
    kept. selective: the parts of a block that recompute_modules names. Same numbers in all three."""
    recompute_modules: list[RecomputedModule] | None = None
    """With selective. mlp_act: the SwiGLU of a dense block, a fifth of its activations. moe_act: that of the
    experts. layernorm: the norms that are modules of their own (PyTorch's, and the one before a router).
    mlp: the dense MLP. moe: router, exchange and experts. When not given all that is elementwise, which costs
    next to no time: mlp_act or moe_act, and layernorm where it frees memory. Megatron's core_attn is not
    among them: an attention that never writes its scores keeps nothing to free."""
    recompute_layers: int | None = Field(default=None, ge=1)
    """With full: recompute only the first so many blocks of each model chunk (of each pipeline stage at vp 1)
    and keep the activations of the others. Use what `sftrl plan` shows as free."""
    eval_every: int = Field(default=0, ge=0)
    """Steps between evaluations on data.valid; 0: only at the end."""
    max_nonfinite_steps: int = Field(default=3, ge=1)
    """Consecutive steps with a non-finite gradient that end the run; each of them is skipped and counted."""
    hang_minutes: float = Field(default=30.0, ge=0)
    """Minutes in which nothing is finished on any rank (rows that are tokenized, a micro-batch, a token, a
    reward, a file of a checkpoint) until every rank shows its stacks on standard error and ends, for torchrun
    to restart them; 0: never. A phase may take as long as it wants while it moves. Collectives of torch and
    vLLM wait half a minute longer; while models are built and loaded, that is the only limit."""

    @model_validator(mode="after")
    def _one_length(self) -> TrainSection:
        if (self.steps is None) == (self.epochs is None):
            raise UserError("give exactly one of train.steps and train.epochs")
        return self


class CheckpointSection(Section):
    """What is kept on disk."""

    every: int = Field(default=0, ge=0)
    """Steps between checkpoints; 0: only at the end."""
    keep_last: int = Field(default=2, ge=1)
    """Complete checkpoints kept."""
    async_save: bool = False
    """Copy the state into host memory (as much as the checkpoint is large) and write it while training goes
    on; the next save, a stop and the end of the run wait for it. A kill meanwhile loses that checkpoint."""


class LogSection(Section):
    """Where the numbers go; metrics.jsonl is always written."""

    wandb: Literal["off", "offline", "online"] = "offline"
    """Weights & Biases; offline writes into the run directory and needs no account."""
    wandb_project: str = "megatron_sftrl"
    """Project name there and in trackio, MLflow's experiment."""
    tensorboard: bool = False
    """Write TensorBoard events into the run directory."""
    trackio: bool = False
    """Log to trackio, on this machine unless TRACKIO_SPACE_ID or TRACKIO_SERVER_URL says otherwise."""
    mlflow: bool = False
    """Log to MLflow: mlflow.db in the run directory, or the server that MLFLOW_TRACKING_URI names."""
    progress: bool = True
    """Progress bar on rank 0."""


class TrainingConfig(Section, ABC):
    """What every training run says; a kind of run adds its data."""

    run_dir: ExpandedPath
    """Directory of this run: resolved.yaml, metrics.jsonl, checkpoints/. A run that finds its own checkpoints
    there resumes."""
    seed: int = Field(default=1234, ge=0)
    """Initial weights, data order and sampling."""
    model: ModelSection
    tokenizer: TokenizerSection
    parallel: ParallelSection = ParallelSection()
    batch: BatchSection
    loss: LossSection
    reference: ReferenceSection | None = None
    lora: LoraSection | None = None
    optim: OptimSection
    train: TrainSection
    checkpoint: CheckpointSection = CheckpointSection()
    log: LogSection = LogSection()
    gates: list[GateSection] = Field(default=[])
    """Limits on what a step measured, such as {metric: entropy, below: 0.05, action: stop}. Some losses and
    `sftrl grpo` have gates of their own, which warn; one on the same metric here takes their place."""

    @property
    @abstractmethod
    def max_length(self) -> int:
        """Longest sequence that a step may hold, in tokens."""

    @property
    @abstractmethod
    def length_keys(self) -> str:
        """The settings that max_length is the sum of, for messages."""

    @property
    def longest_trained(self) -> int:
        """Longest sequence of a micro-batch of training, in tokens."""
        return self.max_length

    @property
    @abstractmethod
    def held_out(self) -> list[Path]:
        """Files of held-out data, none where there is no evaluation."""

    @property
    def grpo(self) -> GrpoConfig | None:
        """Itself where responses are generated and rewarded, None in supervised fine-tuning."""
        return None


class RunConfig(TrainingConfig):
    """One run of `sftrl sft`."""

    data: DataSection

    @property
    def max_length(self) -> int:
        return self.data.max_length

    @property
    def length_keys(self) -> str:
        return "data.max_length"

    @property
    def held_out(self) -> list[Path]:
        return self.data.valid


# What a run of `sftrl grpo` says beyond what every training run says.


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

    engine: Literal["auto", "in_process", "vllm"] = "auto"
    """in_process: the training engine itself, in every layout. vllm: vLLM in the same processes, with weights
    moved from shard to shard. auto: vllm where CUDA and vLLM are there and train.deterministic is off, else
    in_process; resolved.yaml holds what was taken, and settings of the other engine are refused."""
    vllm: VllmSection = VllmSection()
    prompts_per_step: int = Field(ge=1)
    """Prompts of one step, over all ranks."""
    group_size: int = Field(default=8, ge=1)
    """G, responses per prompt."""
    demonstrations: int = Field(default=0, ge=0)
    """How many of the G are the response that the row itself has (data.columns.response), in place of
    generated ones: rewarded and compared like the others, and learned by loss.shaping (LUFFY has 1 of 8).
    In a group whose row has none, all are generated."""
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
    router_replay: bool = False
    """Of a mixture of experts: the policy's forwards in training visit the experts that the engine chose for
    each token, weighed by the trainer's own logits (R3, arXiv:2510.11370); the reference chooses its own.
    Rollouts grow by tokens * layers with experts * experts_per_token bytes, on every rank."""
    share_prompts: bool = False
    """Updates compute a prompt once for the responses of its group in a micro-batch, with torch's layers."""
    passes: int = Field(default=1, ge=1)
    """Times that each response is trained on, in mini-batches of batch.global_size."""
    offload: bool = False
    """On GPUs: while responses are generated, gradients are dropped and the optimizer's state waits in CPU
    memory. vLLM gives its own memory back while the trainer trains in any case."""
    ahead: int = Field(default=0, ge=0, le=1)
    """1: the prompts of the next step are answered before the updates of this one, so that they are judged
    while it trains, and its responses are those of weights one step old (rollout/staleness). The loss then
    weighs every token with the engine's own log-probability (loss.correction is tis where it is not given).
    The step after a checkpoint (checkpoint.every) has responses of its own weights, and a resumed run is the
    same."""
    devices: int = Field(default=0, ge=0)
    """Of the processes of the job the last so many only generate, each with a device of its own, and the
    others train; every update sends them the weights. With ahead: 1 both sides work at the same time, without
    it one waits for the other. 0: every process trains and generates in turns."""
    tp: int = Field(default=1, ge=1)
    """in_process with devices: tensor parallel size of a generator, whatever the trainers'; devices / tp
    generators share the prompts."""
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
    """Published settings that hold where this file says nothing: luffy, chord, srft, curiosft_rl, dapo,
    deepseekmath, dr_grpo, gspo."""
    data: PromptSection
    rollout: RolloutSection
    rewards: RewardList
    """What makes a response good: their weighted sum is the reward. The first one says what a success is, for
    pass@k: a response that it gives at least 0.5."""
    reward_workers: RewardWorkersSection = RewardWorkersSection()
    advantages: AdvantagesSection = AdvantagesSection()
    filters: FiltersSection = FiltersSection()
    sft: SftTermSection | None = None

    @property
    def max_length(self) -> int:
        return self.data.max_prompt_length + self.rollout.max_new_tokens

    @property
    def length_keys(self) -> str:
        return "data.max_prompt_length + rollout.max_new_tokens"

    @property
    def longest_trained(self) -> int:
        return max(self.max_length, self.sft.data.max_length if self.sft else 0)

    @property
    def held_out(self) -> list[Path]:
        return self.data.valid

    @property
    def grpo(self) -> GrpoConfig:
        return self
