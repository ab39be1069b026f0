"""A Hugging Face directory becomes a checkpoint: part by part, each process its share, no model in memory."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_sftrl.engine.checkpoint import StoredPart, save_converted
from megatron_sftrl.errors import UserError
from megatron_sftrl.models.architecture import Architecture, padded_vocab_size
from megatron_sftrl.models.hf_config import read_hf_config
from megatron_sftrl.models.hf_output import has_tokenizer, read_assets
from megatron_sftrl.models.hf_weights import HfWeights, fill_part, open_weights
from megatron_sftrl.models.tensors import MegatronTensor, hf_shapes, megatron_tensors


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """The layout that is expected to load the checkpoint; any other one loads it, too.

    Tensors are stored in the pieces that its ranks hold, and processes write the pieces of whole ranks
    where their numbers allow it, so that a rank reads few files and nothing twice.

    Args:
        tp, pp, ep: sizes of the axes; experts are cut by tp.
    """

    tp: int = 1
    pp: int = 1
    ep: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class _Piece:
    """The part of a tensor that one rank of the layout holds; its owner orders the pieces by rank."""

    tensor: MegatronTensor
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    owner: tuple[int, int, int]


def convert_from_hf(
    hf: Path,
    out: Path,
    *,
    layout: Layout,
    dtype: torch.dtype | None,
    allow_pickle: bool,
    on_bytes: Callable[[int, int], None],
) -> Path:
    """Write the checkpoint `out`; every rank calls it.

    Memory: one part and the Hugging Face rows it is made of, at most two of the largest tensors.

    Args:
        hf: directory with config.json and safetensors files; a tokenizer that it has is carried along.
        out: directory to make; it has its name only when it is complete.
        layout: the pieces that tensors are stored in.
        dtype: of the stored weights; None keeps the dtype of each tensor.
        allow_pickle: read pickled .bin files, with torch's weights_only loading.
        on_bytes: told (bytes written by this process so far, bytes it will write).
    Returns:
        `out`.
    Raises:
        UserError: on every rank: a config.json, weights or a layout that cannot be used, an output that
            exists, a disk that is full.
    """
    architecture, notes = read_hf_config(hf)
    check_layout(layout, architecture)
    with open_weights(hf, allow_pickle=allow_pickle) as weights:
        weights.check(hf_shapes(architecture), tied=architecture.tie_embeddings)
        if dist.get_rank() == 0:
            for note in (*notes, *weights.notes):
                print(f"note: {note}", file=sys.stderr)
        stored_dtypes = _dtypes(architecture, weights, dtype)
        pieces = sorted(_pieces(architecture, layout), key=lambda piece: piece.owner)
        pieces = _share(pieces, rank=dist.get_rank(), world_size=dist.get_world_size())
        parts = [_part(piece, stored_dtypes[piece.tensor.key], weights) for piece in pieces]
        return save_converted(
            out,
            _counted(parts, on_bytes),
            architecture=architecture,
            assets=read_assets(model=hf, tokenizer=hf if has_tokenizer(hf) else None, chat_template=None),
        )


def check_layout(layout: Layout, architecture: Architecture) -> None:
    """Refuse a layout that no model of this architecture can have.

    Raises:
        UserError: everything that does not divide.
    """
    problems = []
    counts = [
        ("tp", layout.tp, "query groups (key/value heads)", architecture.num_query_groups),
        ("tp", layout.tp, "MLP columns (ffn_hidden_size)", architecture.ffn_hidden_size),
        ("pp", layout.pp, "layers", architecture.num_layers),
    ]
    if architecture.mixture is not None:
        counts.append(("ep", layout.ep, "experts", architecture.mixture.num_experts))
    elif layout.ep > 1:
        problems.append(f"--ep {layout.ep}: the model is no mixture of experts; leave it out")
    for option, size, what, count in counts:
        if size < 1 or count % size:
            problems.append(f"--{option} {size}: the model's {count} {what} do not divide by it")
    if problems:
        raise UserError("\n  ".join(["the layout does not fit the model:", *problems]))


def _pieces(architecture: Architecture, layout: Layout) -> Iterator[_Piece]:
    last_stage, layers_per_stage = layout.pp - 1, architecture.num_layers // layout.pp
    for tensor in megatron_tensors(architecture):
        stage = tensor.index[0] // layers_per_stage if tensor.index else 0
        if not tensor.index and not tensor.key.startswith("embedding"):
            stage = last_stage
        expert_rank = 0
        if tensor.is_expert:
            expert_rank = tensor.index[1] * layout.ep // tensor.stack[1]
        for rank, offset, shape in _cuts(tensor, layout.tp):
            yield _Piece(tensor=tensor, offset=offset, shape=shape, owner=(stage, expert_rank, rank))


def _cuts(tensor: MegatronTensor, tp: int) -> Iterator[tuple[int, tuple[int, ...], tuple[int, ...]]]:
    """(tp rank, offset, shape) of each piece of a tensor."""
    rows, *columns = tensor.shape
    if tensor.shard is None:
        yield 0, (0,) * len(tensor.shape), tensor.shape
    elif tensor.shard == "columns":
        width = columns[0] // tp
        for rank in range(tp):
            yield rank, (0, rank * width), (rows, width)
    else:
        part_rows = rows // tensor.num_parts
        step = padded_vocab_size(part_rows, tp) // tp if tensor.has_padding else part_rows // tp
        for part in range(tensor.num_parts):
            for rank in range(tp):
                start, stop = rank * step, min((rank + 1) * step, part_rows)
                if start < stop:
                    offset = (part * part_rows + start, *(0 for _ in columns))
                    yield rank, offset, (stop - start, *columns)


def _share(pieces: list[_Piece], *, rank: int, world_size: int) -> list[_Piece]:
    """A consecutive run of the pieces for each process, of about equal size."""
    sizes = [torch.Size(piece.shape).numel() for piece in pieces]
    total, before, mine = sum(sizes), 0, []
    for piece, size in zip(pieces, sizes, strict=True):
        if (before + size // 2) * world_size // total == rank:
            mine.append(piece)
        before += size
    return mine


def _dtypes(
    architecture: Architecture, weights: HfWeights, dtype: torch.dtype | None
) -> dict[str, torch.dtype]:
    """Dtype of each checkpoint tensor, by key.

    Raises:
        UserError: dtypes are to be kept, and a stacked tensor would have several.
    """
    found: dict[str, set[torch.dtype]] = {}
    for tensor in megatron_tensors(architecture):
        found.setdefault(tensor.key, set()).update(weights.dtypes[run.name] for run in tensor.rows)
    if dtype is not None:
        return dict.fromkeys(found, dtype)
    if mixed := sorted(key for key, dtypes in found.items() if len(dtypes) > 1):
        raise UserError(
            f"{', '.join(mixed)}: layers or joined tensors have different dtypes in the Hugging Face files, "
            "and a checkpoint stores them as one tensor; choose one with --dtype"
        )
    return {key: next(iter(dtypes)) for key, dtypes in found.items()}


def _part(piece: _Piece, dtype: torch.dtype, weights: HfWeights) -> StoredPart:
    tensor = piece.tensor

    def fill(part: Tensor) -> None:
        fill_part(part.view(piece.shape), tensor, piece.offset, weights)

    return StoredPart(
        key=tensor.key,
        offset=(*tensor.index, *piece.offset),
        shape=(*(1 for _ in tensor.index), *piece.shape),
        global_shape=(*tensor.stack, *tensor.shape),
        dtype=dtype,
        fill=fill,
    )


def _counted(parts: list[StoredPart], on_bytes: Callable[[int, int], None]) -> list[StoredPart]:
    """The same parts, telling how far the writing is."""
    total, done = sum(part.num_bytes for part in parts), 0

    def counting(part: StoredPart) -> StoredPart:
        def fill(values: Tensor) -> None:
            nonlocal done
            part.fill(values)
            done += part.num_bytes
            on_bytes(done, total)

        return replace(part, fill=fill)

    return [counting(part) for part in parts]
