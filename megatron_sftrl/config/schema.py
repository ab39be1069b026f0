"""Everything a run can be told, as one tree of typed sections. An unknown key is an error.

Each field's text below it is its documentation: meaning, unit, range.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from megatron_sftrl.config.model import ModelSection
from megatron_sftrl.config.paths import ExpandedPath, ModuleName
from megatron_sftrl.config.section import Section
from megatron_sftrl.errors import UserError


class TokenizerSection(Section):
    """Text to ids."""

    path: ExpandedPath
    """A Hugging Face tokenizer directory, or a SentencePiece .model file."""
    chat_template: ExpandedPath | None = None
    """A Jinja file used instead of the tokenizer's own chat template."""


class ParallelSection(Section):
    """How the model and the batch are split. dp is what is left: world_size / (tp * pp * cp)."""

    tp: int = Field(default=1, ge=1)
    """Tensor parallel size."""
    pp: int = Field(default=1, ge=1)
    """Pipeline parallel size."""
    vp: int = Field(default=1, ge=1)
    """Model chunks per pipeline stage (virtual pipeline); needs pp > 1 when larger than 1."""
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
    overlap_grad_reduce: bool = False
    """Reduce gradients while the backward still runs."""
    overlap_param_gather: bool = False
    """Gather updated parameters while the next forward runs; needs the two settings above."""


class DataSection(Section):
    """The demonstrations."""

    train: list[ExpandedPath] = Field(min_length=1)
    """JSONL or Parquet files, or directories written by datasets.save_to_disk."""
    valid: list[ExpandedPath] = Field(default=[])
    """Held-out data of the same kinds; no evaluation when empty."""
    max_length: int = Field(ge=2)
    """Longest sequence, prompt and response together, in tokens."""
    truncation: Literal["error", "drop", "right", "left_prompt"] = "error"
    """A sequence longer than max_length: stop the run, leave the row out (counted), cut the end, or cut the
    start of the prompt."""
    shuffle: bool = True
    """A new order each epoch, derived from the run's seed and the epoch."""


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
    aggregation: Literal["token_mean", "sequence_mean", "constant_length"] = "token_mean"
    """Mean over loss tokens; mean over sequences of their token means; sum over tokens divided by
    (sequences * data.max_length), of GRPO by (responses * rollout.max_new_tokens)."""

    @model_validator(mode="after")
    def _packing_needs_a_size(self) -> BatchSection:
        if self.packing != (self.max_tokens is not None):
            raise UserError("batch.packing and batch.max_tokens go together: set both or neither")
        return self


class LossSection(BaseModel):
    """The objective. Keys other than name and modules are the loss's own options."""

    model_config = ConfigDict(extra="allow", frozen=True, use_attribute_docstrings=True)

    name: str
    """A registered loss: sft, gift, pear, curiosft, ... or one of your own."""
    modules: list[ModuleName] = []
    """Python files or importable modules that register losses, imported before the name is looked up."""
    fused: Literal["auto", "on", "off"] = "auto"
    """Output layer and loss together, logits existing for a chunk of tokens at a time. auto: where a
    micro-batch has more logits than one chunk. Same numbers, up to rounding."""

    @property
    def options(self) -> dict[str, object]:
        """The loss's own options, as written."""
        return dict(self.model_extra or {})


class ReferenceSection(Section):
    """A second model of the policy's shape and layout, without gradients."""

    kind: Literal["frozen", "moving_average"]
    """frozen: the weights that training starts from (GIFT). moving_average: follows the policy (CurioSFT)."""
    placement: Literal["resident", "offload"] = "resident"
    """offload keeps the weights in CPU memory and brings them in for the reference's forward."""
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


class TrainSection(Section):
    """How long, and with what memory."""

    steps: int | None = Field(default=None, ge=1)
    """Steps in all: optimizer steps of `sftrl sft`; of `sftrl grpo` rollouts, each with its updates."""
    epochs: int | None = Field(default=None, ge=1)
    """Passes over the data, instead of steps; an incomplete last batch of the run is left out."""
    recompute: Literal["none", "full"] = "none"
    """full: keep only each block's input and recompute the block in the backward."""
    eval_every: int = Field(default=0, ge=0)
    """Steps between evaluations on data.valid; 0: only at the end."""
    max_nonfinite_steps: int = Field(default=3, ge=1)
    """Consecutive steps with a non-finite gradient that end the run; each of them is skipped and counted."""
    hang_minutes: float = Field(default=30.0, ge=0)
    """Minutes in which nothing is finished on any rank (a micro-batch, a token, a reward, a file of a
    checkpoint) until every rank shows its stacks on standard error and ends, for torchrun to restart them; 0:
    never. A phase may take as long as it wants while it moves. Collectives of torch and vLLM wait half a
    minute longer; outside of the steps, while models are built and loaded, that is the only limit."""

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


class GateSection(Section):
    """A limit on one number of a step."""

    metric: str
    """Name in metrics.jsonl."""
    below: float | None = None
    """The gate is crossed below this."""
    above: float | None = None
    """The gate is crossed above this."""
    steps: int = Field(default=1, ge=1)
    """Consecutive steps that it takes."""
    action: Literal["warn", "stop"] = "warn"
    """Print a warning, or end the run with a checkpoint."""

    @model_validator(mode="after")
    def _one_limit(self) -> GateSection:
        if (self.below is None) == (self.above is None):
            raise UserError(f"gate on {self.metric}: give exactly one of below and above")
        return self


class LogSection(Section):
    """Where the numbers go; metrics.jsonl is always written."""

    wandb: Literal["off", "offline", "online"] = "offline"
    """Weights & Biases; offline writes into the run directory and needs no account."""
    wandb_project: str = "megatron_sftrl"
    """Project name there."""
    tensorboard: bool = False
    """Write TensorBoard events into the run directory."""
    progress: bool = True
    """Progress bar on rank 0."""


class TrainingConfig(Section):
    """What every training run says, whatever its data are."""

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
    optim: OptimSection
    train: TrainSection
    checkpoint: CheckpointSection = CheckpointSection()
    log: LogSection = LogSection()
    gates: list[GateSection] = Field(default=[])
    """Limits on what a step measured, such as {metric: entropy, below: 0.05, action: stop}. Some losses have
    gates of their own, which warn; one written here on the same metric takes their place."""

    @property
    def max_length(self) -> int:
        """Longest sequence that a step may hold, in tokens."""
        raise AssertionError("a kind of run knows its data")

    @property
    def length_keys(self) -> str:
        """The settings that max_length is the sum of, for messages."""
        raise AssertionError("a kind of run knows its data")

    @property
    def has_validation(self) -> bool:
        """There is held-out data."""
        raise AssertionError("a kind of run knows its data")


class RunConfig(TrainingConfig):
    """One run of `sftrl sft`."""

    data: DataSection

    @property
    def max_length(self) -> int:
        """As in the base class."""
        return self.data.max_length

    @property
    def length_keys(self) -> str:
        """As in the base class."""
        return "data.max_length"

    @property
    def has_validation(self) -> bool:
        """As in the base class."""
        return bool(self.data.valid)
