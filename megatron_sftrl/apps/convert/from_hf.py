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
from megatron_sftrl.models.hf_output import read_assets
from megatron_sftrl.models.hf_weights import HfWeights, fill_part, open_weights
from megatron_sftrl.models.tensors import MegatronTensor, Region, megatron_tensors
from megatron_sftrl.models.tokenizer_files import has_tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """The layout that is expected to load the checkpoint; any other one loads it, too.

    Tensors are stored in the regions that its ranks hold (experts are cut by tp), and processes write those
    of whole ranks where their numbers allow it, so that a rank reads few files and nothing twice.
    """

    tp: int = 1
    pp: int = 1
    ep: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class _OwnedRegion:
    """The region of a tensor that one rank of the layout holds; its owner orders the regions by rank."""

    tensor: MegatronTensor
    region: Region
    owner: tuple[int, int, int]


def convert_from_hf(
    hf: Path,
    out: Path,
    *,
    layout: Layout,
    dtype: torch.dtype | None,
    allow_pickle: bool,
    text_only: bool = False,
    on_bytes: Callable[[int, int], None],
) -> Path:
    """Write the checkpoint `out`, which has its name only when it is complete; every rank calls it.

    Memory: one part and the Hugging Face rows it is made of, at most two of the largest tensors.

    Args:
        hf: directory with config.json and safetensors files; a tokenizer that it has is carried along.
        layout: its ranks' regions are what tensors are stored in.
        dtype: of the stored weights; None keeps the dtype of each tensor.
        allow_pickle: read pickled .bin files, with torch's weights_only loading.
        text_only: of a multimodal model the language model alone.
        on_bytes: told (bytes written by this process so far, bytes it will write).
    Raises:
        UserError: on every rank: a config.json, weights or a layout that cannot be used, an output that
            exists, a disk that is full.
    """
    architecture, notes = read_hf_config(hf, text_only=text_only)
    check_layout(layout, architecture)
    with open_weights(hf, allow_pickle=allow_pickle) as weights:
        weights.check_model(architecture)
        if dist.get_rank() == 0:
            for note in (*notes, *weights.notes):
                print(f"note: {note}", file=sys.stderr)
        stored_dtypes = _dtypes(architecture, weights, dtype)
        owned = sorted(_regions(architecture, layout), key=lambda each: each.owner)
        owned = _share(owned, rank=dist.get_rank(), world_size=dist.get_world_size())
        parts = [_part(each, stored_dtypes[each.tensor.key], weights) for each in owned]
        return save_converted(
            out,
            _counted(parts, on_bytes),
            architecture=architecture,
            assets=read_assets(model=hf, tokenizer=hf if has_tokenizer(hf) else None, chat_template=None),
        )


def check_layout(layout: Layout, architecture: Architecture) -> None:
    """Raise UserError for a layout that no model of this architecture can have: all that does not divide."""
    problems = []
    counts = [
        ("tp", layout.tp, "query groups (key/value heads)", architecture.num_query_groups),
        ("tp", layout.tp, "MLP columns (ffn_hidden_size)", architecture.ffn_hidden_size),
        ("pp", layout.pp, "layers", architecture.num_layers),
    ]
    if (net := architecture.delta_net) is not None:
        counts.append(("tp", layout.tp, "key heads of gated delta nets", net.num_key_heads))
    if architecture.mixture is not None:
        counts.append(("ep", layout.ep, "experts", architecture.mixture.num_experts))
    elif layout.ep > 1:
        problems.append(f"--ep {layout.ep}: the model is no mixture of experts; leave it out")
    for option, size, what, count in counts:
        if size < 1 or count % size:
            problems.append(f"--{option} {size}: the model's {count} {what} do not divide by it")
    if problems:
        raise UserError("\n  ".join(["the layout does not fit the model:", *problems]))


def _regions(architecture: Architecture, layout: Layout) -> Iterator[_OwnedRegion]:
    last_stage, layers_per_stage = layout.pp - 1, architecture.num_layers // layout.pp
    for tensor in megatron_tensors(architecture):
        stage = 0 if tensor.layer is None else tensor.layer // layers_per_stage
        if tensor.layer is None and not tensor.key.startswith("embedding"):
            stage = last_stage
        expert_rank = 0
        if tensor.expert is not None:
            expert_rank = tensor.expert * layout.ep // tensor.stack[-1]
        for rank, region in _cuts(tensor, layout.tp):
            yield _OwnedRegion(tensor=tensor, region=region, owner=(stage, expert_rank, rank))


def _cuts(tensor: MegatronTensor, tp: int) -> Iterator[tuple[int, Region]]:
    """(tp rank, region) of all that ranks hold of a tensor."""
    whole, ranks = Region.of(tensor.shape), range(tp)
    if tensor.shard is None:
        yield 0, whole
    elif tensor.shard == "columns":
        width = tensor.shape[1] // tp
        yield from ((rank, whole.along(1, rank * width, (rank + 1) * width)) for rank in ranks)
    else:
        part_rows = tensor.shape[0] // tensor.num_parts
        step = padded_vocab_size(part_rows, tp) // tp if tensor.has_padding else part_rows // tp
        for first in range(0, tensor.shape[0], part_rows):
            for rank in ranks:
                region = whole.along(0, first + rank * step, first + (rank + 1) * step)
                if region.numel:
                    yield rank, region


def _share(owned: list[_OwnedRegion], *, rank: int, world_size: int) -> list[_OwnedRegion]:
    """A consecutive run of the regions for each process, of about equal size."""
    total, before, mine = sum(each.region.numel for each in owned), 0, []
    for each in owned:
        size = each.region.numel
        if (before + size // 2) * world_size // total == rank:
            mine.append(each)
        before += size
    return mine


def _dtypes(
    architecture: Architecture, weights: HfWeights, dtype: torch.dtype | None
) -> dict[str, torch.dtype]:
    """Dtype of each checkpoint tensor by key; UserError where a stacked tensor would keep several."""
    found: dict[str, set[torch.dtype]] = {}
    for tensor in megatron_tensors(architecture):
        found.setdefault(tensor.key, set()).update(weights.dtypes[run.name] for run in tensor.rows)
    always = {tensor.key: torch.float32 for tensor in megatron_tensors(architecture) if tensor.is_fp32}
    if dtype is not None:
        return {**dict.fromkeys(found, dtype), **always}
    if mixed := sorted(key for key, dtypes in found.items() if len(dtypes) > 1):
        raise UserError(
            f"{', '.join(mixed)}: layers or joined tensors have different dtypes in the Hugging Face files, "
            "and a checkpoint stores them as one tensor; choose one with --dtype"
        )
    return {**{key: next(iter(dtypes)) for key, dtypes in found.items()}, **always}


def _part(owned: _OwnedRegion, dtype: torch.dtype, weights: HfWeights) -> StoredPart:
    tensor, region = owned.tensor, owned.region

    def fill(part: Tensor) -> None:
        fill_part(part.view(region.shape), tensor, region.start, weights)

    return StoredPart(
        key=tensor.key,
        region=Region.of((*(1 for _ in tensor.index), *region.shape), (*tensor.index, *region.start)),
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
