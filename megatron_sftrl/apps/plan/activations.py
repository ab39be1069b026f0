"""Bytes that one micro-batch leaves behind for its backward, block by block and at the loss.

Counted tensor by tensor as the layers save them. "torch" are the layers of engine/local_layers.py, held
against measured peaks on the CPU. "transformer_engine" are the terms of Korthikanti et al. (arXiv:2205.05198,
section 4: the tensors that each operation's backward reads, attention without its scores) for a fused SwiGLU,
grouped queries and no dropout; they were not measured.

    t   tokens of a micro-batch on this rank, T / cp
    u   tokens of the residual stream, t / tp under sequence parallelism, else t
    e   bytes of an activation
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from megatron_sftrl.apps.plan.model_state import Adapted, Grid, adapted_by, element_bytes, num_adapted
from megatron_sftrl.config.checks import recomputed_modules
from megatron_sftrl.config.schema import LossSection, TrainingConfig
from megatron_sftrl.models.architecture import (
    DELTA_CHUNK,
    Architecture,
    DeltaNet,
    Latent,
    padded_vocab_size,
)
from megatron_sftrl.vocab_parallel.arithmetic import CPU_CHUNK_BYTES, CUDA_CHUNK_BYTES
from megatron_sftrl.vocab_parallel.output_layer import logits_bytes

Kernels = Literal["torch", "transformer_engine"]
_FP32, _INT64 = 4, 8
# On the CPU and on a GPU: a loss's buffers for one chunk of tokens.
_LOGIT_CHUNK = {"torch": CPU_CHUNK_BYTES, "transformer_engine": CUDA_CHUNK_BYTES}
_DEVICE = {"torch": "cpu", "transformer_engine": "cuda"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Microbatch:
    """One micro-batch as a rank sees it.

    Args:
        tokens, residual_tokens, element: t, u and e.
        longest: tokens of its longest sequence, before context parallelism.
        kernels: whose layers.
        prompt: of those `longest` tokens, how many stand once in front of `group` responses; 0 where every
            sequence has its own.
    """

    tokens: int
    residual_tokens: int
    longest: int
    element: int
    kernels: Kernels
    prompt: int = 0
    group: int = 1

    @property
    def prompts_read(self) -> float:
        """Tokens of prompts that attention copies for each response, for a token of the micro-batch."""
        return self.group * self.prompt / (self.prompt + self.group * (self.longest - self.prompt))


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockBytes:
    """One transformer block, of a hybrid the mean of its kinds.

    Args:
        input: the residual stream before it, all that full recomputation keeps.
        saved: kept for its backward, what selective recomputation frees left out.
        again: of what is freed, most that is there at a time in its backward.
        forward: most that its forward holds beyond `saved` and its input.
        backward: most that its backward adds to `saved`.
    """

    input: int
    saved: int
    again: int
    forward: int
    backward: int


@dataclass(frozen=True, slots=True, kw_only=True)
class HeadBytes:
    """The final norm, the output layer and the loss, on the last stage.

    Args:
        saved: kept for the backward, without logits.
        logits: [t, V/tp] of one model, or the chunk of them that exists at a time.
        is_fused: logits live for a chunk, not for a micro-batch.
        forward: most that the loss adds to the logits of policy and reference.
        backward: most that the backward of loss and output layer adds to them.
    """

    saved: int
    logits: int
    is_fused: bool
    forward: int
    backward: int


def block_bytes(
    architecture: Architecture, grid: Grid, batch: Microbatch, modules: tuple[str, ...] = ()
) -> BlockBytes:
    """What one block holds for one micro-batch, when these of its modules are recomputed."""
    stream = batch.residual_tokens * architecture.hidden_size * batch.element
    gathered = batch.tokens * architecture.hidden_size * batch.element
    mlp = _expert_bytes if architecture.mixture else _mlp_bytes
    mixer, larger = _mixer_bytes(architecture, grid, batch)
    saved = mixer + mlp(architecture, grid, batch)
    freed = _freed_bytes(architecture, grid, batch, modules)
    # A product's gradient replaces what the backward has let go by then.
    work = _widest(architecture, grid, batch) + 2 * stream
    whole = unfused = gathered * grid.sequence_parallel
    if batch.kernels == "torch" and architecture.mixture is None:
        # Beside the product's gradient those of both halves of fc1's output, written in place, and the gate
        # behind its activation, which takes the room of what fc2 had read; the tokens of the other ranks are
        # gathered before or after that.
        unfused = max(whole, _FC1_OUTPUT * _widest(architecture, grid, batch))
    if architecture.mixture is not None:
        # Token visits are permuted, exchanged and sorted by expert: what a step reads, and what it writes.
        work += 2 * routed_tokens(architecture, grid, batch) * architecture.hidden_size * batch.element
    return BlockBytes(
        input=stream,
        saved=saved - sum(freed),
        again=max(freed),
        forward=work + larger + whole,
        backward=work + larger + unfused + _largest_gradient(architecture, grid, batch),
    )


def forward_bytes(architecture: Architecture, grid: Grid, batch: Microbatch) -> int:
    """Most that one block's forward holds when no backward follows, its input included: in its MLP."""
    mlp = _expert_bytes if architecture.mixture else _mlp_bytes
    norm = _norm_bytes(architecture.hidden_size, batch)
    stream = batch.residual_tokens * architecture.hidden_size * batch.element
    gathered = batch.tokens * architecture.hidden_size * batch.element
    products = mlp(architecture, grid, batch) - norm
    if batch.kernels == "torch" and architecture.gate_limit is None:
        products += 2 * _widest(architecture, grid, batch)  # Megatron's own MLP runs there
    shared = _shared_bytes(architecture, grid, batch)
    return products + 4 * stream + gathered * grid.sequence_parallel + shared


def head_bytes(architecture: Architecture, grid: Grid, batch: Microbatch, loss: LossSection) -> HeadBytes:
    """What the last stage holds for one micro-batch behind its blocks."""
    columns = padded_vocab_size(architecture.vocab_size, grid.tp) // grid.tp
    logits = batch.tokens * columns * batch.element
    gathered = batch.tokens * architecture.hidden_size * batch.element
    weight = columns * architecture.hidden_size * batch.element
    chunk, saved = _LOGIT_CHUNK[batch.kernels], _norm_bytes(architecture.hidden_size, batch)
    at_a_time = loss.chunk_bytes or logits_bytes(columns * batch.element, _DEVICE[batch.kernels])
    if loss.fused == "on" or (loss.fused == "auto" and logits > at_a_time):
        # The gradient takes the place of the chunk's logits; what is left is that of the hidden states.
        states = (2 + grid.sequence_parallel) * gathered
        size = min(logits, at_a_time)
        # The policy's logits of the next chunk are made while the ranks reduce over this one.
        ahead = min(logits - size, size) if grid.tp > 1 else 0
        at_work = chunk + states + ahead
        return HeadBytes(saved=saved, logits=size, is_fused=True, forward=at_work, backward=at_work)
    return HeadBytes(
        saved=saved,
        logits=logits,
        is_fused=False,
        forward=chunk,
        backward=logits + max(chunk, weight + (1 + grid.sequence_parallel) * gathered),
    )


def _norm_bytes(width: int, batch: Microbatch, tokens: int | None = None, out: bool = True) -> int:
    """Input and output of an RMSNorm, and a factor for each token."""
    tokens = batch.residual_tokens if tokens is None else tokens
    return tokens * (width * batch.element * (1 + out) + _FP32)


def _mixer_bytes(a: Architecture, grid: Grid, batch: Microbatch) -> tuple[int, int]:
    """Of attention or a gated delta net: the mean over the blocks, and how much more the larger one keeps."""
    attention = _attention_bytes(a, grid, batch)
    if a.delta_net is None:
        return attention, 0
    other = _delta_net_bytes(a, a.delta_net, grid, batch)
    mean = round(a.share_attending * attention + (1 - a.share_attending) * other)
    return mean, max(attention, other) - mean


def _delta_net_bytes(a: Architecture, net: DeltaNet, grid: Grid, batch: Microbatch) -> int:
    """Norm, projections, convolution and the rule, whose vectors, chunks and matrices are fp32."""
    t, e, heads = batch.tokens, batch.element, net.num_value_heads // grid.tp
    convolved = 3 * net.num_key_heads // grid.tp * net.channels_each * e
    vectors = 9 * net.key_dim + 7 * net.value_dim
    chunks = 5 * DELTA_CHUNK + net.key_dim * net.value_dim // DELTA_CHUNK
    ruled = heads * (_FP32 * (vectors + chunks) + 2 * net.value_dim * e)
    return _norm_bytes(a.hidden_size, batch) + t * (convolved + ruled)


def _attention_bytes(a: Architecture, grid: Grid, batch: Microbatch) -> int:
    """Norm, q/k/v, rotation, attention, output projection."""
    t, e = batch.tokens, batch.element
    heads = t * (a.num_attention_heads // grid.tp) * e
    query, output = heads * a.head_dim, heads * a.value_dim
    keys = t * (a.num_query_groups // grid.tp) * a.head_dim * e
    values = t * (a.num_query_groups // grid.tp) * a.value_dim * e
    total = _num_norms(a) * _norm_bytes(a.hidden_size, batch)
    if a.latent is not None:
        total += _latent_bytes(a, a.latent, grid, batch)
    if a.qk_norm and a.qk_norm_spans_heads:
        width = (a.num_attention_heads + a.num_query_groups) // grid.tp * a.head_dim
        total += 2 * t * width * _FP32  # SpanningNorm keeps what it reads and what it divided
    elif a.qk_norm:
        for heads in (a.num_attention_heads, a.num_query_groups):
            total += _norm_bytes(a.head_dim, batch, tokens=t * (heads // grid.tp), out=False)
    total += t * (a.num_attention_heads // grid.tp) * _FP32  # log-sum-exp
    if a.has_output_gate:  # its sigmoid, and what it is multiplied into
        total += t * (a.num_attention_heads // grid.tp) * a.head_dim * (_FP32 + e)
    if batch.kernels == "transformer_engine":
        return total + query + keys + values + output  # the last is read by the projection as well
    if a.qkv_bias and grid.sequence_parallel:  # BiasedColumnParallelLinear keeps the gathered input
        total += (t - batch.residual_tokens) * a.hidden_size * e
    total += t * (3 * _INT64 + 1)  # rows of the packed tokens
    # Reading the packed sequences out copies q, k and v, the prompt's for each response; putting them back
    # copies the output.
    copied = round(grid.cp * (1 + batch.prompts_read) * (keys + values))
    return total + query + copied + output + output


def _shared_bytes(a: Architecture, grid: Grid, batch: Microbatch) -> int:
    """What blocks share: of each rope cosines and sines, of each kind of window a mask by positions."""
    if batch.kernels == "transformer_engine":
        return 0
    num_ropes = 1 if a.window_rope is None else 2
    tables = num_ropes * 2 * batch.tokens * a.rope.turning(a.rope_head_dim) * batch.element
    if grid.cp == 1 and not batch.prompt:
        return tables
    num_kinds = 1 + (0 < len(a.window_layers) < a.num_layers)
    return tables + num_kinds * batch.tokens * batch.longest * batch.element


def _latent_bytes(a: Architecture, latent: Latent, grid: Grid, batch: Microbatch) -> int:
    """The small vectors behind their norms, which both projections of each keep, gathered over tp."""
    total, gathered = 0, batch.tokens - batch.residual_tokens
    for width in (latent.query_rank or 0, latent.rank):
        total += _norm_bytes(width, batch) * bool(width) + gathered * width * batch.element
    return total


# Times [tokens, F] of fc1's output, which has both halves.
_FC1_OUTPUT = 2


def _kept_products(a: Architecture, batch: Microbatch, *, routed: bool, shared: bool = False) -> int:
    """Times [tokens, F] that a SwiGLU keeps for its backward: fc1's output and the product that fc2 reads.

    Unfused, as the CPU runs it, with routed experts also the product before the router weights it. Megatron's
    own unfused one, that of shared experts and of clamped gates, also silu and the shifted linear half.
    """
    if batch.kernels == "transformer_engine":
        return 3
    return 3 + routed + 2 * (shared or a.gate_limit is not None)


def _mlp_bytes(a: Architecture, grid: Grid, batch: Microbatch) -> int:
    """Norm, fc1 and SwiGLU."""
    norms = _num_norms(a) * _norm_bytes(a.hidden_size, batch)
    return norms + _kept_products(a, batch, routed=False) * _widest(a, grid, batch)


def _num_norms(a: Architecture) -> int:
    """Of attention, and of the MLP."""
    return 2 if a.norms == "both" else 1


def _expert_bytes(a: Architecture, grid: Grid, batch: Microbatch) -> int:
    """Norm, router, dispatched tokens, and as many products as the tokens visit experts, evenly spread."""
    assert a.mixture is not None
    tokens = routed_tokens(a, grid, batch)
    router = batch.residual_tokens * (
        a.mixture.experts_per_token * (2 * _INT64 + _FP32) + a.mixture.num_experts * (1 + batch.element)
    )
    swiglu = _kept_products(a, batch, routed=True) * _widest(a, grid, batch)
    shared = batch.tokens * (a.mixture.shared_width // grid.tp) * batch.element
    swiglu += _kept_products(a, batch, routed=False, shared=True) * shared
    norms = _num_norms(a) * _norm_bytes(a.hidden_size, batch)
    return norms + router + tokens * a.hidden_size * batch.element + swiglu


def _freed_bytes(a: Architecture, grid: Grid, batch: Microbatch, modules: tuple[str, ...]) -> tuple[int, int]:
    """What recomputing `modules` does not keep of attention and of the MLP, each with its norm."""
    norm = _norm_bytes(a.hidden_size, batch)
    stream = batch.residual_tokens * a.hidden_size * batch.element
    attention = mlp = 0
    if "layernorm" in modules and a.norms != "behind":  # only its input is left
        is_alone = batch.kernels == "torch"
        attention += (norm - stream) * is_alone
        mlp += norm - stream
    if "mlp" in modules:
        mlp += _mlp_bytes(a, grid, batch) - norm
        if batch.kernels == "transformer_engine":  # whose fc1 has the norm in it
            mlp += norm - stream
    if "moe" in modules:
        mlp += _expert_bytes(a, grid, batch) - norm
    if "mlp_act" in modules or "moe_act" in modules:
        kept = _kept_products(a, batch, routed=a.mixture is not None)
        mlp += (kept - _FC1_OUTPUT) * _widest(a, grid, batch)
    return attention, mlp


def routed_tokens(a: Architecture, grid: Grid, batch: Microbatch) -> int:
    """Token visits that a rank's experts see, when the router spreads them evenly.

    The tensor-parallel ranks of an expert gather each other's tokens.
    """
    assert a.mixture is not None
    return batch.residual_tokens * a.mixture.experts_per_token * grid.etp


def _widest(a: Architecture, grid: Grid, batch: Microbatch) -> int:
    """[tokens, F] of one product in the MLP."""
    if a.mixture is not None:
        return routed_tokens(a, grid, batch) * (a.ffn_hidden_size // grid.etp) * batch.element
    return batch.tokens * (a.ffn_hidden_size // grid.tp) * batch.element


def _largest_gradient(a: Architecture, grid: Grid, batch: Microbatch) -> int:
    """Of a weight, before it is added to the fp32 buffer."""
    cuts = grid.etp if a.mixture else grid.tp
    return 2 * a.ffn_hidden_size // cuts * a.hidden_size * batch.element


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPeak:
    """Bytes at the fullest moment of a step's forward and backward on one rank, beyond the model's state.

    Args:
        blocks: kept for the backward of all micro-batches in flight, and the block at work.
        logits: of policy and reference, their gradient, the loss's buffers; 0 before the last stage.
        reference_states: last hidden states of the reference, for every micro-batch of the step.
        reference_forward: the most that the reference's own forward holds, which is over by then.
    """

    blocks: int
    logits: int
    reference_states: int
    reference_forward: int

    @property
    def training(self) -> int:
        """While the policy runs."""
        return self.blocks + self.logits + self.reference_states


def microbatch_of(config: TrainingConfig, grid: Grid, kernels: Kernels) -> Microbatch:
    """The largest micro-batch that the batch section allows."""
    multiple = 2 * grid.cp if grid.cp > 1 else 1
    whole = config.batch.max_tokens or config.batch.micro_size * _round_up(config.longest_trained, multiple)
    tokens = _round_up(whole, multiple * grid.tp) // grid.cp
    grpo = config.grpo
    return Microbatch(
        tokens=tokens,
        residual_tokens=tokens // grid.tp if grid.sequence_parallel else tokens,
        longest=config.longest_trained,
        element=element_bytes(config),
        kernels=kernels,
        prompt=grpo.data.max_prompt_length - 1 if grpo and grpo.rollout.share_prompts else 0,
        group=grpo.rollout.group_size if grpo else 1,
    )


def step_peak(
    architecture: Architecture,
    config: TrainingConfig,
    grid: Grid,
    batch: Microbatch,
    *,
    stage: int,
    num_microbatches: int,
) -> StepPeak:
    """What a stage's rank holds at the fullest moment, by its largest micro-batch."""
    block = block_bytes(architecture, grid, batch, modules_of(architecture, config, batch.kernels))
    if (adapted := adapted_by(config)) is not None:
        has_dropout = config.lora is not None and config.lora.dropout > 0
        block = _with_adapters(block, architecture, grid, batch, adapted, has_dropout=has_dropout)
    has_reference = config.reference is not None
    per_chunk = grid.chunk_layers(architecture, stage=stage)
    num_full = recomputed_blocks(config, per_chunk)
    in_flight = chunks_in_flight(grid, stage=stage, num_microbatches=num_microbatches)
    blocks = in_flight * (num_full * block.input + (per_chunk - num_full) * block.saved)
    blocks += in_flight * _shared_bytes(architecture, grid, batch)
    # What the stages exchange is kept until its backward, and an output on its way.
    exchanged = (in_flight + 1) * block.input if grid.pp > 1 else 0
    # The block at work: recomputed, and the gradients in it. Blocks that kept all have let go by then.
    at_work = (block.saved if num_full == per_chunk else block.again) + block.backward
    if stage < grid.pp - 1:
        return StepPeak(
            blocks=blocks + exchanged + at_work,
            logits=0,
            reference_states=0,
            reference_forward=(2 * block.input + block.forward) * has_reference,
        )
    head = head_bytes(architecture, grid, batch, config.loss)
    num_models = 1 + has_reference
    # The graph of the micro-batch before is let go after this one's forward, and its logits with it; and what
    # its blocks shared, where one that is recomputed has kept it.
    held = num_models * head.logits
    earlier = 0
    if num_microbatches > 1:
        earlier = held * (not head.is_fused) + _shared_bytes(architecture, grid, batch) * (num_full > 0)
    at_head = max(earlier + head.forward, head.backward)
    states = num_microbatches * block.input * has_reference
    return StepPeak(
        blocks=blocks + exchanged + head.saved + max(0, at_work - at_head),
        logits=held + at_head,
        reference_states=states,
        reference_forward=(states + 2 * block.input + block.forward) * has_reference,
    )


def _with_adapters(
    block: BlockBytes,
    a: Architecture,
    grid: Grid,
    batch: Microbatch,
    adapted: Adapted,
    *,
    has_dropout: bool,
) -> BlockBytes:
    """What is kept for A and B, [t, r] of each matrix, and what is added to the widest layer's output; with
    dropout the inputs of the layers once more, and a byte for each of their entries.

    A frozen matrix has no gradient and keeps no input of its own, but the adapter beside it does.
    """
    rank, names, _ = adapted
    attending = a.share_attending
    num = attending * num_adapted(a, names, attends=True)
    attended = attending * a.num_attention_heads * a.head_dim
    if (net := a.delta_net) is not None:
        num += (1 - attending) * num_adapted(a, names, attends=False)
        attended += (1 - attending) * net.num_value_heads * net.value_dim
    inner = round(batch.tokens * rank * num * batch.element)
    if has_dropout:
        attended = round(batch.tokens * attended / grid.tp * batch.element)
        streams = 2 * batch.residual_tokens * a.hidden_size * batch.element
        inner += (streams + attended + _widest(a, grid, batch)) * (batch.element + 1) // batch.element
    wide = 2 * _FC1_OUTPUT * _widest(a, grid, batch)  # B A x as it is made, and scaled
    return replace(
        block,
        saved=block.saved + inner,
        forward=block.forward + wide,
        backward=block.backward + wide - _largest_gradient(a, grid, batch),
    )


def modules_of(architecture: Architecture, config: TrainingConfig, kernels: Kernels) -> tuple[str, ...]:
    """What selective recomputation makes again in each block."""
    is_mixture, with_te = architecture.mixture is not None, kernels == "transformer_engine"
    return recomputed_modules(config.train, is_mixture=is_mixture, with_te=with_te)


def recomputed_blocks(config: TrainingConfig, num_layers: int) -> int:
    """Blocks of a chunk of num_layers that are recomputed whole."""
    if config.train.recompute != "full":
        return 0
    return min(config.train.recompute_layers or num_layers, num_layers)


def chunks_in_flight(grid: Grid, *, stage: int, num_microbatches: int) -> int:
    """Forwards of a chunk whose backward is still to come, at most (1F1B, interleaved where vp > 1)."""
    if grid.pp == 1:
        return 1
    behind = grid.pp - stage - 1
    warm_up = behind if grid.vp == 1 else 2 * behind + (grid.vp - 1) * grid.pp
    return min(num_microbatches * grid.vp, warm_up + 1)


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
