"""Every tensor of a checkpoint, named and placed in coordinates that no layout changes.

    policy.<name>                weights, dtype of the model
    optimizer.exp_avg.<name>     and exp_avg_sq, momentum_buffer: fp32, shaped like the weight
    optimizer.main_param.<name>  fp32 weights behind bf16 ones
    reference.<name>             a moving-average reference, fp32
    rng.<generator>              [world_size, bytes] uint8, one row a rank

Names and coordinates come from Megatron's sharded_state_dict, where layers are counted over the whole
model and the gated MLP's halves are apart. Megatron's own formats tie optimizer state to the kind of
optimizer; here both kinds store the same tensors, so that the state of a distributed optimizer loads
into a plain one and the other way round. A rank stores and reads the part it owns, nothing is gathered.

The tensors are views of the live ones: reading a checkpoint fills them in place.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.tensor_parallel.random import CudaRNGStatesTracker
from torch import Tensor

from megatron_sftrl.engine.checkpoint.boxes import boxes_of_range
from megatron_sftrl.engine.checkpoint.optimizer import OptimizerShare
from megatron_sftrl.engine.model import LanguageModel
from megatron_sftrl.engine.parallel import ParallelContext


@dataclass(frozen=True, slots=True, kw_only=True)
class _Piece:
    """A contiguous part of a parameter that has coordinates of its own in the checkpoint."""

    parameter: Tensor
    start: int
    place: ShardedTensor

    @property
    def stop(self) -> int:
        assert self.place.data is not None
        return self.start + self.place.data.numel()


def model_tensors(
    chunks: Sequence[LanguageModel], *, prefix: str, instead: Mapping[int, Tensor] | None = None
) -> list[ShardedTensor]:
    """Weights of this rank's chunks as `<prefix>.<name>`.

    Args:
        chunks: without DDP.
        prefix: of every name.
        instead: by the id() of a weight, a tensor of its shape that takes its place.
    """
    values = instead or {}
    return [
        tensor
        for piece in _pieces(chunks)
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
    """This rank's share of the optimizer's tensors as `optimizer.<kind>.<name>`.

    Args:
        chunks: the policy's chunks, without DDP.
        shares: from optimizer_shares().
    """
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
    for name, state in _tracker().get_states().items():
        states[f"tracker.{name}"] = state
    return {name: state.detach().cpu().clone() for name, state in states.items()}


def restore_rng_states(states: dict[str, Tensor], parallel: ParallelContext) -> None:
    """Set the generators as rng_states() found them, on the same layout and kind of device."""
    torch.set_rng_state(states["cpu"])
    if parallel.device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"])
    tracker = _tracker()
    tracker.set_states({name: states[f"tracker.{name}"] for name in tracker.get_states()})


def rng_tensors(states: dict[str, Tensor], parallel: ParallelContext) -> list[ShardedTensor]:
    """This rank's row of `rng.<generator>` for each state."""
    return [
        ShardedTensor.from_rank_offsets(f"rng.{name}", state[None], (0, parallel.rank, parallel.world_size))
        for name, state in states.items()
    ]


def _tracker() -> CudaRNGStatesTracker:
    tracker = get_cuda_rng_tracker()
    assert tracker is not None
    return tracker


def _pieces(chunks: Sequence[LanguageModel]) -> Iterator[_Piece]:
    """Parameters and persistent buffers of the chunks, to be read or written.

    Transformer Engine's extra state (scales of fp8 casts) is the only other thing that Megatron lists;
    this package trains in bf16 and fp32, where it is empty.
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
        piece: gives shape and coordinates.
        flat: any shape; its elements are elements [flat_start, flat_start + numel) of the parameter.
        flat_start: element of the parameter that flat's first element belongs to.
    """
    place = piece.place
    flat = flat.detach().view(-1)
    start = max(piece.start, flat_start) - piece.start
    stop = min(piece.stop, flat_start + flat.numel()) - piece.start
    leading = (1,) * place.prepend_axis_num
    for box in boxes_of_range((*leading, *place.local_shape), start, max(start, stop)):
        first = piece.start + box.start - flat_start
        size = 1
        for length in box.shape:
            size *= length
        yield ShardedTensor(
            key=key,
            data=flat[first : first + size].view(box.shape),
            dtype=flat.dtype,
            local_shape=box.shape,
            global_shape=place.global_shape,
            global_offset=tuple(a + b for a, b in zip(place.global_offset, box.offset, strict=True)),
            # None: not one cell of a regular grid.
            axis_fragmentations=None,
            replica_id=place.replica_id,
            # Rows of vocabulary padding: their number depends on tp.
            allow_shape_mismatch=place.allow_shape_mismatch,
        )
