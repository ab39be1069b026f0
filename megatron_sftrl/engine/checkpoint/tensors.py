"""Every tensor of a checkpoint, named and placed in coordinates that no layout changes.

    policy.<name>                weights, dtype of the model; with LoRA what it trains alone: adapters,
                                 policy.lora.<name>, and weights of lora.modules_to_save
    optimizer.exp_avg.<name>     and exp_avg_sq, momentum_buffer: fp32 unless optim says bf16, shaped like it
    optimizer.main_param.<name>  fp32 weights behind bf16 ones
    reference.<name>             a moving-average reference, fp32; with LoRA of the same alone
    rng.<generator>              [world_size, bytes] uint8, one row a rank

Names and coordinates come from Megatron's sharded_state_dict, where layers are counted over the whole
model and the gated MLP's halves are apart. Megatron's own formats tie optimizer state to the kind of
optimizer; here both kinds store the same tensors, so that the state of a distributed optimizer loads
into a plain one and the other way round. A rank stores and reads the part it owns, nothing is gathered.

The tensors are views of the live ones: reading a checkpoint fills them in place.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.cpu_offloading import HybridDeviceOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params, FP32Optimizer
from torch import Tensor

from megatron_sftrl.engine.lora import PREFIX, adapter_parameters
from megatron_sftrl.engine.model import LanguageModel
from megatron_sftrl.engine.optimizer import inner_optimizers, leaves
from megatron_sftrl.engine.parallel import ParallelContext, rng_tracker
from megatron_sftrl.models.tensors import Region

# Megatron's optimizers seen as one thing: for each parameter, the elements whose state this rank holds.
#
# The plain optimizers hold whole parameters, the distributed one a range of elements of some. Megatron's own
# loading of a distributed optimizer's state over torch's Adam fails before the first step (no "step" yet,
# 0.16.1); here missing state is created as zeros, as Adam and SGD start, and the step count set explicitly.


@dataclass(frozen=True, slots=True, kw_only=True)
class OptimizerShare:
    """What this rank's optimizer holds of one parameter.

    Args:
        start: element of the parameter at which the share begins.
        tensors: by kind (exp_avg, exp_avg_sq, momentum_buffer, main_param), each with as many elements as the
            share, the optimizer's own memory; fp32, moments as optim.exp_avg_dtype and exp_avg_sq_dtype say.
        is_exclusive: no other data-parallel rank holds these elements.
    """

    parameter: Tensor
    start: int
    tensors: Mapping[str, Tensor]
    is_exclusive: bool


def optimizer_shares(optimizer: MegatronOptimizer) -> list[OptimizerShare]:
    """All that the optimizer keeps between steps, except its step count; absent state is made, as zeros."""
    shares = []
    for leaf in leaves(optimizer):
        kinds = _kinds(leaf)
        owners = _owners(leaf)
        for parameter, held, start in _held(leaf):
            main = _moved(leaf, held)
            state = _state(owners[main], main, kinds)
            tensors = {kind: state[kind] for kind in kinds}
            if parameter.dtype != torch.float32:
                # Transformer Engine's Adam keeps it beside moments that have a dtype of their own.
                tensors["main_param"] = state.get("master_param", main)
            shares.append(
                OptimizerShare(
                    parameter=parameter,
                    start=start,
                    tensors=tensors,
                    is_exclusive=isinstance(leaf, DistributedOptimizer),
                )
            )
    return shares


def optimizer_step(optimizer: MegatronOptimizer) -> int:
    """Updates that this rank's optimizer has applied (Adam's t); 0 for SGD, which does not count."""
    steps = set()
    for inner in (each for leaf in leaves(optimizer) for each in inner_optimizers(leaf)):
        if _counts_per_parameter(inner):
            steps |= {int(state["step"]) for state in inner.state.values() if "step" in state}
        else:
            # Groups without parameters are counted by some (Transformer Engine 2.20), not by others.
            steps |= {
                int(group["step"]) for group in inner.param_groups if group["params"] and "step" in group
            }
    assert len(steps) <= 1, f"parameters disagree on the number of updates: {sorted(steps)}"
    return steps.pop() if steps else 0


def set_optimizer_step(optimizer: MegatronOptimizer, step: int) -> None:
    """Make the optimizer believe that it has applied `step` updates; call after optimizer_shares()."""
    for leaf in leaves(optimizer):
        if leaf.config.optimizer != "adam":
            continue
        for inner in inner_optimizers(leaf):
            if _counts_per_parameter(inner):
                for state in inner.state.values():
                    state["step"].fill_(float(step))
            else:
                # Transformer Engine and Apex count per group.
                for group in inner.param_groups:
                    group["step"] = step


def _kinds(leaf: MegatronOptimizer) -> tuple[str, ...]:
    if leaf.config.optimizer == "adam":
        return ("exp_avg", "exp_avg_sq")
    return ("momentum_buffer",) if leaf.config.sgd_momentum else ()


def _counts_per_parameter(inner: torch.optim.Optimizer) -> bool:
    """torch's Adam counts for each parameter, the fused ones for each group, SGD not at all."""
    return isinstance(inner, torch.optim.Adam)


def _owners(leaf: MegatronOptimizer) -> dict[Tensor, torch.optim.Optimizer]:
    """By tensor, the inner optimizer that moves it."""
    return {
        tensor: inner
        for inner in inner_optimizers(leaf)
        for group in inner.param_groups
        for tensor in group["params"]
    }


def _moved(leaf: MegatronOptimizer, held: Tensor) -> Tensor:
    """What is moved for a tensor that the leaf holds: with optim.cpu_offload an fp32 copy, here or there."""
    inner = leaf.optimizer
    return inner.param_to_inner_param[held] if isinstance(inner, HybridDeviceOptimizer) else held


def _state(inner: Any, main: Tensor, kinds: tuple[str, ...]) -> dict[str, Tensor]:
    """The optimizer's own state of `main`; what is absent is made, as zeros."""
    state = inner.state[main]
    if not state and getattr(inner, "master_weights", False):
        # Transformer Engine's Adam, with dtypes of its own and fp32 weights that begin as the model's.
        inner.initialize_state(main, False)
    for kind in kinds:
        if state.get(kind) is None:
            state[kind] = torch.zeros_like(main.detach(), dtype=torch.float32)
    if _counts_per_parameter(inner) and "step" not in state:
        is_fused = any(group.get("fused") for group in inner.param_groups)
        state["step"] = torch.zeros((), device=main.device if is_fused else "cpu")
    return state


def _held(leaf: MegatronOptimizer) -> Iterator[tuple[Tensor, Tensor, int]]:
    """(parameter, the tensor that the inner optimizer updates for it, first element of the share)."""
    if isinstance(leaf, DistributedOptimizer):
        for parameter, (group, index) in leaf.model_param_group_index_map.items():
            buffer, dtype, bucket = leaf.model_param_gbuf_map[parameter]
            owned = leaf.gbuf_ranges[buffer][dtype][bucket]["param_map"][parameter]["param"]
            yield parameter, leaf.optimizer.param_groups[group]["params"][index], owned.start
    elif isinstance(leaf, Float16OptimizerWithFloat16Params):
        for parameters, mains in zip(leaf.float16_groups, leaf.fp32_from_float16_groups, strict=True):
            for parameter, main in zip(parameters, mains, strict=True):
                yield parameter, main, 0
        for parameters in leaf.fp32_from_fp32_groups:
            for parameter in parameters:
                yield parameter, parameter, 0
    else:
        assert isinstance(leaf, FP32Optimizer), f"no checkpoint format for {type(leaf).__name__}"
        for group in leaf.optimizer.param_groups:
            for parameter in group["params"]:
                yield parameter, parameter, 0


# A run of consecutive elements of a tensor, as the few regions that a sharded checkpoint can name.
#
# The distributed optimizer owns flat ranges that respect no row. Cut into regions, such a range is stored
# under the parameter's own coordinates, and any other layout can read its share of it.


def regions_of_range(shape: tuple[int, ...], start: int, stop: int) -> Iterator[Region]:
    """Cut elements [start, stop) of a contiguous tensor into regions, in order; at most 2 ndim - 1 of them.

    For a matrix: the end of a row, whole rows, the beginning of a row. The elements of each are consecutive.

    Args:
        shape: at least one dimension.
        start, stop: in the flattened tensor, 0 <= start <= stop <= numel.
    """
    assert shape and 0 <= start <= stop <= math.prod(shape)
    if start == stop:
        return
    if len(shape) == 1:
        yield Region((start,), (stop,))
        return
    inner = math.prod(shape[1:])
    first_whole, last_whole = -(-start // inner), stop // inner
    if first_whole > last_whole:
        # The range lies inside one row.
        yield from _in_row(shape, last_whole, start, stop)
        return
    yield from _in_row(shape, first_whole - 1, start, first_whole * inner)
    if first_whole < last_whole:
        yield Region.of(shape).along(0, first_whole, last_whole)
    yield from _in_row(shape, last_whole, last_whole * inner, stop)


def _in_row(shape: tuple[int, ...], row: int, start: int, stop: int) -> Iterator[Region]:
    if start < stop:
        origin = row * math.prod(shape[1:])
        for region in regions_of_range(shape[1:], start - origin, stop - origin):
            yield Region((row, *region.start), (row + 1, *region.stop))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Piece:
    """A contiguous part of a parameter that has coordinates of its own in the checkpoint."""

    parameter: Tensor
    start: int
    place: ShardedTensor

    @property
    def is_adapter(self) -> bool:
        return self.place.key.startswith(PREFIX)

    @property
    def stop(self) -> int:
        assert self.place.data is not None
        return self.start + self.place.data.numel()


def model_tensors(
    chunks: Sequence[LanguageModel],
    *,
    prefix: str,
    instead: Mapping[int, Tensor] | None = None,
    adapters: bool = False,
) -> list[ShardedTensor]:
    """Weights of this rank's chunks as `<prefix>.<name>`.

    Args:
        instead: by the id() of a weight, a tensor of its shape that takes its place.
        adapters: what LoRA trains, in place of the model's own weights.
    """
    values = instead or {}
    return [
        tensor
        for piece in _pieces(chunks)
        if (piece.parameter.requires_grad if adapters else not piece.is_adapter)
        for tensor in _placed(
            piece,
            values.get(id(piece.parameter), piece.parameter),
            0,
            key=f"{prefix}.{piece.place.key}",
        )
    ]


def optimizer_tensors(
    chunks: Sequence[LanguageModel], shares: Sequence[OptimizerShare]
) -> list[ShardedTensor]:
    """This rank's share of the optimizer's tensors as `optimizer.<kind>.<name>`."""
    pieces: dict[int, list[_Piece]] = {}
    for piece in _pieces(chunks):
        pieces.setdefault(id(piece.parameter), []).append(piece)
    tensors = []
    for share in shares:
        for piece in pieces[id(share.parameter)]:
            if share.is_exclusive:
                # No other data-parallel rank holds these elements.
                place = dataclasses.replace(piece.place, replica_id=(*piece.place.replica_id[:2], 0))  # type: ignore[index]
                piece = dataclasses.replace(piece, place=place)
            for kind, flat in share.tensors.items():
                key = f"optimizer.{kind}.{piece.place.key}"
                tensors += _placed(piece, flat, share.start, key=key)
    return tensors


def rng_states(parallel: ParallelContext) -> dict[str, Tensor]:
    """State of every random generator of this rank that torch or Megatron draws from, uint8 on the CPU.

    Python's and numpy's generators are not used by this package.
    """
    states = {"cpu": torch.get_rng_state()}
    if parallel.device.type == "cuda":
        states["cuda"] = torch.cuda.get_rng_state()
    for name, state in rng_tracker().get_states().items():
        states[f"tracker.{name}"] = state
    return {name: state.detach().cpu().clone() for name, state in states.items()}


def restore_rng_states(states: dict[str, Tensor], parallel: ParallelContext) -> None:
    """Set the generators as rng_states() found them, on the same layout and kind of device."""
    torch.set_rng_state(states["cpu"])
    if parallel.device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"])
    tracker = rng_tracker()
    tracker.set_states({name: states[f"tracker.{name}"] for name in tracker.get_states()})


def rng_tensors(states: dict[str, Tensor], parallel: ParallelContext) -> list[ShardedTensor]:
    """This rank's row of `rng.<generator>` for each state."""
    return [
        ShardedTensor.from_rank_offsets(f"rng.{name}", state[None], (0, parallel.rank, parallel.world_size))
        for name, state in states.items()
    ]


def _pieces(chunks: Sequence[LanguageModel]) -> Iterator[_Piece]:
    """Parameters and persistent buffers of the chunks, to be read or written.

    Transformer Engine's extra state is the only other thing that Megatron lists: scales of fp8 casts with a
    history, which none of the recipes of train.fp8 has.
    """
    for chunk in chunks:
        chunk.wait_for_weights()
        for value in chunk.sharded_state_dict().values():
            if isinstance(value, ShardedTensor):
                assert value.data is not None
                yield _Piece(parameter=value.data, start=0, place=value)
            elif isinstance(value, ShardedTensorFactory):
                for place in value.build():
                    # Megatron cuts the parameter into views.
                    assert isinstance(place, ShardedTensor) and place.data is not None
                    start = int(place.data.storage_offset() - value.data.storage_offset())
                    assert place.data.is_contiguous()
                    yield _Piece(parameter=value.data, start=start, place=place)


def _placed(piece: _Piece, flat: Tensor, flat_start: int, *, key: str) -> Iterator[ShardedTensor]:
    """The part of a parameter-shaped quantity that this rank holds of `piece`, as views into `flat`.

    Args:
        flat: any shape; its elements are elements [flat_start, flat_start + numel) of the parameter.
    """
    place = piece.place
    flat = flat.detach().view(-1)
    start = max(piece.start, flat_start) - piece.start
    stop = min(piece.stop, flat_start + flat.numel()) - piece.start
    leading = (1,) * place.prepend_axis_num
    first = piece.start + start - flat_start
    for region in regions_of_range((*leading, *place.local_shape), start, max(start, stop)):
        yield ShardedTensor(
            key=key,
            data=flat[first : first + region.numel].view(region.shape),
            dtype=flat.dtype,
            local_shape=region.shape,
            global_shape=place.global_shape,
            global_offset=tuple(a + b for a, b in zip(place.global_offset, region.start, strict=True)),
            # None: not one cell of a regular grid.
            axis_fragmentations=None,
            replica_id=place.replica_id,
            # Rows of vocabulary padding: their number depends on tp.
            allow_shape_mismatch=place.allow_shape_mismatch,
        )
        first += region.numel


# What data-parallel ranks hold alike is read by the first of them alone, and sent to the others over the
# network: a shared disk would be asked for the whole model once for each.


def first_replicas(tensors: Sequence[ShardedTensor]) -> list[ShardedTensor]:
    """Those that this rank reads for its group: no rank of a lower number holds the same for the same place.

    Megatron's last replica number is the rank over dp x cp, of experts over edp.
    """
    return [tensor for tensor in tensors if tensor.replica_id[-1] == 0]  # type: ignore[index]


def weights_of(
    chunks: Sequence[LanguageModel],
    instead: Mapping[int, Tensor] | None = None,
    *,
    adapters: bool = False,
) -> list[tuple[Tensor, Tensor]]:
    """Each parameter of model_tensors and what is read for it: itself, or what stands in its place."""
    values, theirs = instead or {}, {id(parameter) for parameter in adapter_parameters(chunks)}
    return [
        (parameter, values.get(id(parameter), parameter))
        for chunk in chunks
        for parameter in chunk.parameters()
        if (parameter.requires_grad if adapters else id(parameter) not in theirs)
    ]


def replicated_shares(shares: Sequence[OptimizerShare]) -> list[tuple[Tensor, Tensor]]:
    """The optimizer's tensors that other data-parallel ranks hold, too, each with its parameter."""
    return [
        (share.parameter, tensor)
        for share in shares
        if not share.is_exclusive
        for _, tensor in sorted(share.tensors.items())
    ]


@torch.no_grad()
def send_to_replicas(held: Sequence[tuple[Tensor, Tensor]], parallel: ParallelContext) -> None:
    """Make every tensor, bit for bit, that of the rank that reads it; every rank calls it.

    Args:
        held: (parameter, contiguous tensor that belongs to it), in one order on all ranks that hold the same.
    """
    for parameter, tensor in held:
        is_expert = not getattr(parameter, "allreduce", True)
        group = parallel.edp_group if is_expert else parallel.dp_cp_group
        if group.size() == 1:
            continue
        flat = tensor.detach().view(-1)
        # An offloaded reference is in host memory, which NCCL does not send.
        sent = flat.to(parallel.device)
        dist.broadcast(sent.view(torch.uint8), group=group, group_src=0)
        if sent.device != flat.device:
            flat.copy_(sent)
