"""Bytes of parameters, gradients and optimizer state on one rank: what Megatron's DDP and optimizer allocate.

Without the distributed optimizer every tensor stands alone. With it, parameters and gradients lie in buffers
of buckets: a tensor starts at a multiple of 64 elements, a bucket ends at a multiple of lcm(dp, 128), and
each data-parallel rank keeps Adam's moments (and fp32 weights of a bf16 model) for its equal share of every
bucket (megatron-core 0.16.1, distributed/param_and_grad_buffer.py).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from megatron_sftrl.config.layout import stage_layers
from megatron_sftrl.config.schema import OptimSection, ParallelSection, TrainingConfig
from megatron_sftrl.models.architecture import Architecture, LayerKind, padded_vocab_size
from megatron_sftrl.models.tensor_rules import WHOLE_WEIGHTS
from megatron_sftrl.models.tensors import MegatronTensor, megatron_tensors, short_name


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """Sizes of the axes; tp * cp * dp * pp ranks in all, dealt out again for experts as etp * ep * edp * pp.

    Args:
        tp, pp, vp, cp, dp, first_stage_layers, last_stage_layers: as in the parallel section.
        ep, etp, edp: of the experts; edp is what is left over for copies of an expert.
        sequence_parallel: the residual stream is split over tp.
    """

    tp: int
    pp: int
    vp: int
    cp: int
    dp: int
    ep: int
    etp: int
    edp: int
    sequence_parallel: bool
    first_stage_layers: int | None = None
    last_stage_layers: int | None = None

    @property
    def world_size(self) -> int:
        """Ranks of the job."""
        return self.tp * self.cp * self.dp * self.pp

    def chunk_layers(self, architecture: Architecture, *, stage: int) -> int:
        """Blocks of each model chunk on a pipeline stage."""
        return stage_layers(self, architecture.num_layers)[stage] // self.vp

    def chunk_kinds(self, architecture: Architecture, *, stage: int, chunk: int) -> tuple[LayerKind, ...]:
        """What they are made of; the model's chunks go round the stages."""
        layers = [each // self.vp for each in stage_layers(self, architecture.num_layers)]
        first = chunk * sum(layers) + sum(layers[:stage])
        return tuple(map(architecture.kind, range(first, first + layers[stage])))

    def deepest_stage(self, architecture: Architecture) -> int:
        """The pipeline stage with most blocks, the first of equal ones."""
        layers = stage_layers(self, architecture.num_layers)
        return layers.index(max(layers))


def grid_of(parallel: ParallelSection, world_size: int) -> Grid:
    """The axes of a job that config.checks has accepted."""
    etp = parallel.etp or parallel.tp
    return Grid(
        tp=parallel.tp,
        pp=parallel.pp,
        vp=parallel.vp,
        cp=parallel.cp,
        dp=world_size // (parallel.tp * parallel.pp * parallel.cp),
        ep=parallel.ep,
        etp=etp,
        edp=world_size // (etp * parallel.ep * parallel.pp),
        sequence_parallel=parallel.sequence_parallel,
        first_stage_layers=parallel.first_stage_layers,
        last_stage_layers=parallel.last_stage_layers,
    )


# The order of torch.nn.Module.named_parameters in a block of engine/local_layers.py. Transformer Engine's
# blocks have norms elsewhere; that moves padding, of at most 63 elements a tensor.
_ORDER = (
    "linear_qkv.layer_norm_weight",
    "input_layernorm.weight",
    "A_log",
    "dt_bias",
    "conv_weight",
    "core_attention.softmax_offset",
    "linear_proj.weight",
    "linear_proj.bias",
    "in_proj.weight",
    "out_norm.weight",
    "linear_qkv.weight",
    "linear_qkv.bias",
    "linear_q_proj.weight",
    "linear_q_down_proj.weight",
    "linear_q_up_proj.weight",
    "linear_kv_down_proj.weight",
    "linear_kv_up_proj.weight",
    "q_layernorm.weight",
    "k_layernorm.weight",
    "kv_layernorm.weight",
    "linear_fc1.layer_norm_weight",
    "pre_mlp_layernorm.weight",
    "router.weight",
    "router.bias",
    "router.expert_bias",
    "shared_experts.gate_weight",
    "linear_fc1.weight",
    "linear_fc1.bias",
    "linear_fc2.weight",
    "linear_fc2.bias",
    "post_self_attn_layernorm.weight",
    "post_mlp_layernorm.weight",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    """One rank's part of one tensor of models/tensors.py.

    Args:
        is_expert: lives on the experts' grid.
        is_shared: the embedding of a tied model that the first and the last stage both hold.
        is_frozen: fp32, without gradient, outside Megatron's buffers.
    """

    key: str
    num_elements: int
    is_expert: bool = False
    is_shared: bool = False
    is_frozen: bool = False


@functools.lru_cache(maxsize=64)
def chunk_parameters(
    architecture: Architecture,
    grid: Grid,
    *,
    kinds: tuple[LayerKind, ...],
    has_embedding: bool,
    has_output: bool,
) -> tuple[Parameter, ...]:
    """The parameters of a model chunk of blocks of these kinds on one rank, as Megatron's DDP meets them.

    Only the first chunk of the first pipeline stage has the embedding, only the last of the last the output.
    """
    vocabulary = padded_vocab_size(architecture.vocab_size, grid.tp) // grid.tp * architecture.hidden_size
    is_shared = architecture.tie_embeddings and grid.pp > 1
    cuts = dict(tp=grid.tp, ep=grid.ep, etp=grid.etp)
    found = [each for kind in kinds for each in _block(architecture, kind, **cuts)]
    if has_embedding:
        key = "embedding.word_embeddings.weight"
        found.insert(0, Parameter(key=key, num_elements=vocabulary, is_shared=is_shared))
    if has_output:
        found.append(Parameter(key="decoder.final_layernorm.weight", num_elements=architecture.hidden_size))
    if has_output and (is_shared or not architecture.tie_embeddings):
        found.append(Parameter(key="output_layer.weight", num_elements=vocabulary, is_shared=is_shared))
    return tuple(found)


@functools.lru_cache(maxsize=256)
def _block(
    architecture: Architecture, kind: LayerKind, *, tp: int, ep: int, etp: int
) -> tuple[Parameter, ...]:
    """The parameters of one block on any rank."""
    mine = _block_tensors(architecture, kind, ep=ep)
    return tuple(
        Parameter(
            key=tensor.key,
            num_elements=math.prod(tensor.shape) // _cuts(tensor, tp=tp, etp=etp),
            is_expert=tensor.is_expert,
            is_frozen=tensor.is_fp32,
        )
        for tensor in sorted(mine, key=_place)
    )


def _block_tensors(architecture: Architecture, kind: LayerKind, *, ep: int) -> list[MegatronTensor]:
    """The whole tensors of one block, with the experts of one rank."""
    # One block tells for all: the table of a large mixture has tens of thousands of lines.
    mixture, net = architecture.mixture, architecture.delta_net
    one = replace(
        architecture,
        num_layers=1,
        sliding_window=None,
        window_layers=(),
        window_rope=None,
        no_rope_layers=(),
        mixture=mixture and replace(mixture, num_dense_layers=int(not kind.has_experts)),
        delta_net=net and replace(net, layers=() if kind.attends else (0,)),
    )
    tensors = [tensor for tensor in megatron_tensors(one) if tensor.layer is not None]
    num_experts = mixture.num_experts // ep if mixture else 0
    return [tensor for tensor in tensors if tensor.expert is None or tensor.expert < num_experts]


Adapted = tuple[int, tuple[str, ...], tuple[str, ...]]
"""Rank of the adapters, the matrices that may have one, and Megatron's keys of what is trained whole."""


def adapted_by(config: TrainingConfig) -> Adapted | None:
    """None for a run that trains all weights."""
    if (lora := config.lora) is None:
        return None
    return lora.rank, lora.names, tuple(WHOLE_WEIGHTS[name][1] for name in lora.modules_to_save)


def num_adapted(architecture: Architecture, names: tuple[str, ...], *, attends: bool) -> int:
    """Matrices with an adapter that a token goes through in a block with attention or a gated delta net."""
    mixture = architecture.mixture
    # Of one rank's experts: one.
    kind = LayerKind(has_experts=mixture is not None, attends=attends)
    tensors = _block_tensors(architecture, kind, ep=mixture.num_experts if mixture else 1)
    found = {
        run.name: mixture.experts_per_token if mixture and tensor.is_expert else 1
        for tensor in tensors
        for run in tensor.rows
        if len(tensor.shape) == 2 and short_name(run.name) in names
    }
    return sum(found.values())


@functools.lru_cache(maxsize=64)
def trained_parameters(
    architecture: Architecture,
    grid: Grid,
    adapted: Adapted | None,
    *,
    kinds: tuple[LayerKind, ...],
    has_embedding: bool,
    has_output: bool,
) -> tuple[Parameter, ...]:
    """Of a chunk's parameters those that have gradients: all, or with LoRA what is trained whole, and A and B
    of each adapter (engine/lora.py).
    """
    members = chunk_parameters(
        architecture, grid, kinds=kinds, has_embedding=has_embedding, has_output=has_output
    )
    if adapted is None:
        return tuple(each for each in members if not each.is_frozen)
    blocks = {kind: _block_adapters(architecture, grid, adapted, kind) for kind in set(kinds)}
    whole = (each for each in members if each.key in adapted[2])
    return (*whole, *(each for kind in kinds for each in blocks[kind]))


def _block_adapters(
    architecture: Architecture, grid: Grid, adapted: Adapted, kind: LayerKind
) -> list[Parameter]:
    rank, names, _ = adapted
    block = []
    for tensor in _block_tensors(architecture, kind, ep=grid.ep):
        cuts, sizes = _cuts(tensor, tp=grid.tp, etp=grid.etp), dict[str, int]()
        for run in tensor.rows if len(tensor.shape) == 2 else ():
            sizes[run.name] = sizes.get(run.name, 0) + run.num_rows
        for name, rows in sizes.items():
            if short_name(name) not in names:
                continue
            columns = tensor.shape[1]
            down, up = (columns // cuts, rows) if tensor.shard == "columns" else (columns, rows // cuts)
            block += [
                Parameter(key=tensor.key, num_elements=rank * side, is_expert=tensor.is_expert)
                for side in (down, up)
            ]
    return block


def has_own_reference(config: TrainingConfig) -> bool:
    """A reference that has weights of its own; with adapters it is the policy's, unless a file is named."""
    reference = config.reference
    return reference is not None and (config.lora is None or reference.checkpoint is not None)


def _cuts(tensor: MegatronTensor, *, tp: int, etp: int) -> int:
    if tensor.shard is None:
        return 1
    return etp if tensor.is_expert else tp


def _place(tensor: MegatronTensor) -> tuple[float, int]:
    """Experts follow each other, each with both of its matrices; then a shared one and norms behind."""
    within = next(place for place, name in enumerate(_ORDER) if tensor.key.endswith(name))
    if tensor.expert is not None:
        return len(_ORDER) + tensor.expert, within
    is_last = ".shared_experts." in tensor.key or ".post_" in tensor.key
    return (math.inf if is_last else within), within


_FP32 = 4
_MATRICES = ("linear_qkv.weight", "linear_proj.weight", "linear_fc1.weight", "linear_fc2.weight")
_PARAMETER_START, _BUCKET_END = 64, 128
_SMALLEST_BUCKET, _BUCKET_PER_RANK = 40_000_000, 1_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelState:
    """Bytes on one rank.

    Args:
        parameters: weights that the forward reads, padding included.
        frozen: of them those that are not trained: no gradient, no padding, and in no checkpoint.
        gradients: buffers of parallel.grad_reduce_dtype.
        fp32_gradients: of this rank's share, while the optimizer updates from bf16 ones.
        optimizer: moments, and fp32 weights where the model's are bf16; without step counters.
        optimizer_on_host: the same of what optim.cpu_offload keeps there, with a copy of its gradients.
        eight_bit: copies of the blocks' matrices that Transformer Engine keeps for train.fp8, each with its
            transpose, and of the reference's without.
        reference: weights of a reference model, which has no buffers and no padding; 0 without one. With LoRA
            a frozen one's copy of what is trained whole.
        reference_average: fp32 average behind the bf16 weights of a reference that follows the policy, or
            of its adapters.
        reference_ends: of them embedding and output layer, which are on the device while the policy runs even
            when the rest is offloaded.
    """

    parameters: int
    frozen: int
    gradients: int
    fp32_gradients: int
    optimizer: int
    optimizer_on_host: int
    eight_bit: int
    reference: int
    reference_average: int
    reference_ends: int

    @property
    def trained(self) -> int:
        """Everything but the reference."""
        return self.parameters + self.gradients + self.optimizer


@dataclass(frozen=True, slots=True, kw_only=True)
class Buffer:
    """One buffer, in elements, padding included, with (start, stop) of each tensor and of each bucket."""

    num_elements: int
    spans: tuple[tuple[int, int], ...]
    buckets: tuple[tuple[int, int], ...]


def model_state(
    architecture: Architecture,
    config: TrainingConfig,
    grid: Grid,
    *,
    stage: int,
    dp_cp_rank: int | None = None,
    edp_rank: int | None = None,
) -> ModelState:
    """What one rank holds between steps.

    Args:
        dp_cp_rank: place among the dp * cp ranks that share the optimizer; None for a bound of all shares, a
            few kilobytes of padding above the largest.
        edp_rank: the same among the copies of an expert.
    """
    element, per_gradient = element_bytes(config), gradient_bytes(config)
    per_weight = _moment_bytes(config.optim) + (_FP32 if element < _FP32 else 0)
    parts = [
        _chunk_elements(
            architecture,
            grid,
            kinds=grid.chunk_kinds(architecture, stage=stage, chunk=chunk),
            has_embedding=stage == 0 and chunk == 0,
            has_output=stage == grid.pp - 1 and chunk == grid.vp - 1,
            is_distributed=config.parallel.distributed_optimizer,
            is_bucketed=config.parallel.overlap_grad_reduce,
            adapted=adapted_by(config),
            ranks=(dp_cp_rank, edp_rank),
        )
        for chunk in range(grid.vp)
    ]
    owned, matrices = sum(part.owned for part in parts), sum(part.matrices for part in parts)
    biases = _FP32 * sum(part.biases for part in parts)
    away = round(owned * config.optim.cpu_offload)
    # Adam with moments of fewer bits reads gradients as they are; every other one is given fp32.
    is_copied = per_gradient < _FP32 and not config.optim.has_low_moments
    has_reference = has_own_reference(config)
    is_averaged = config.reference is not None and config.reference.kind == "moving_average"
    # Of weights in fp32 a reference of its own is the average itself.
    averaged = sum(part.trained for part in parts) * (element < _FP32 or not has_reference)
    whole = 0 if config.lora is None else sum(part.plain - part.frozen for part in parts)
    is_kept = config.reference is not None and not has_reference and not is_averaged
    return ModelState(
        parameters=element * sum(part.held + part.frozen for part in parts) + biases,
        frozen=element * sum(part.frozen for part in parts) + biases,
        gradients=per_gradient * sum(part.held for part in parts),
        fp32_gradients=_FP32 * (owned - away) * is_copied,
        optimizer=per_weight * (owned - away),
        optimizer_on_host=(per_weight + _FP32) * away,
        eight_bit=matrices * (2 + has_reference) * (config.train.fp8 is not None),
        reference=(element * sum(part.plain for part in parts) + biases) * has_reference
        + element * whole * is_kept,
        reference_average=_FP32 * averaged * is_averaged,
        reference_ends=element * sum(part.ends for part in parts) * has_reference,
    )


def _moment_bytes(optim: OptimSection) -> int:
    """Of the moments of one weight."""
    if optim.name == "sgd":
        return _FP32 * (optim.momentum > 0)
    return sum(2 if dtype == "bf16" else _FP32 for dtype in (optim.exp_avg_dtype, optim.exp_avg_sq_dtype))


def element_bytes(config: TrainingConfig) -> int:
    """Bytes of a weight or an activation."""
    return 2 if config.model.dtype == "bf16" else _FP32


def gradient_bytes(config: TrainingConfig) -> int:
    """Bytes of a gradient between the micro-batches of a step."""
    return element_bytes(config) if config.parallel.grad_reduce_dtype == "bf16" else _FP32


@dataclass(frozen=True, slots=True, kw_only=True)
class _Elements:
    """Of one chunk: all weights but adapters without padding, of them those that are not trained, those
    outside the blocks, the blocks' matrices (routers are none); what is trained without padding, in buffers,
    in this rank's optimizer; and fp32 biases of routers, which nothing trains, counted nowhere else.
    """

    plain: int
    frozen: int
    ends: int
    matrices: int
    trained: int
    held: int
    owned: int
    biases: int


@functools.lru_cache(maxsize=4096)
def _chunk_elements(
    architecture: Architecture,
    grid: Grid,
    *,
    kinds: tuple[LayerKind, ...],
    has_embedding: bool,
    has_output: bool,
    is_distributed: bool,
    is_bucketed: bool,
    adapted: Adapted | None,
    ranks: tuple[int | None, int | None],
) -> _Elements:
    all_members = chunk_parameters(
        architecture, grid, kinds=kinds, has_embedding=has_embedding, has_output=has_output
    )
    members = [each for each in all_members if not each.is_frozen]
    plain = sum(each.num_elements for each in members)
    ends = sum(each.num_elements for each in members if not each.key.startswith("decoder."))
    matrices = sum(each.num_elements for each in members if each.key.endswith(_MATRICES))
    trained = trained_parameters(
        architecture, grid, adapted, kinds=kinds, has_embedding=has_embedding, has_output=has_output
    )
    size = sum(each.num_elements for each in trained)
    whole = sum(each.num_elements for each in trained if adapted is not None and each.key in adapted[2])
    found = _Elements(
        plain=plain,
        frozen=0 if adapted is None else plain - whole,
        ends=ends,
        matrices=matrices,
        trained=size,
        held=size,
        owned=size,
        biases=sum(each.num_elements for each in all_members if each.is_frozen),
    )
    if not is_distributed:
        return found
    # Megatron cuts the first chunk of the first stage only, and that only to overlap its messages.
    bucket_size = max(_SMALLEST_BUCKET, _BUCKET_PER_RANK * grid.dp)
    held = owned = 0
    for is_expert, num_ranks, rank in ((False, grid.dp * grid.cp, ranks[0]), (True, grid.edp, ranks[1])):
        buffer = buffer_layout(
            [each for each in trained if each.is_expert == is_expert],
            num_ranks,
            bucket_size=bucket_size if is_bucketed and has_embedding else None,
        )
        held += buffer.num_elements
        owned += _owned(buffer, num_ranks, rank)
    return replace(found, held=held, owned=owned)


def buffer_layout(parameters: Sequence[Parameter], num_ranks: int, *, bucket_size: int | None) -> Buffer:
    """Where the distributed optimizer puts parameters and gradients, the last one first.

    Args:
        parameters: of one chunk and one kind, in the order of the module.
        num_ranks: that share the optimizer.
        bucket_size: elements at which a bucket is closed; None for one bucket.
    """
    multiple = math.lcm(num_ranks, _BUCKET_END)
    spans: list[tuple[int, int]] = []
    buckets: list[tuple[int, int]] = []
    bucket_start = end = 0
    is_open = False
    for each in reversed(parameters):
        start = _round_up(end, _PARAMETER_START)
        if each.is_shared and is_open:  # it has a bucket of its own
            buckets.append((bucket_start, _round_up(start, multiple)))
            start = bucket_start = buckets[-1][1]
        end = start + each.num_elements
        spans.append((start, end))
        is_open = True
        if each.is_shared or (bucket_size is not None and end - bucket_start >= bucket_size):
            buckets.append((bucket_start, _round_up(end, multiple)))
            bucket_start = end = buckets[-1][1]
            is_open = False
    if is_open:
        buckets.append((bucket_start, _round_up(end, multiple)))
    return Buffer(num_elements=buckets[-1][1] if buckets else 0, spans=tuple(spans), buckets=tuple(buckets))


def _owned(buffer: Buffer, num_ranks: int, rank: int | None) -> int:
    """Elements of parameters in a rank's share of every bucket; None: of a share, padding included."""
    total = 0
    for start, end in buffer.buckets:
        share = (end - start) // num_ranks
        if rank is None:
            total += share
            continue
        low, high = start + rank * share, start + (rank + 1) * share
        total += sum(max(0, min(high, b) - max(low, a)) for a, b in buffer.spans)
    return total


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple
