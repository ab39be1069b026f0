"""The contract between the table of names and Megatron: both mean the same tensors, in every layout.

Loading Hugging Face weights, exporting and resharding trust the table; checkpoints are written by Megatron's
own sharded_state_dict. Here both describe the same models.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from megatron_sftrl.models.architecture import Architecture, from_section, padded_vocab_size
from megatron_sftrl.models.tensors import MegatronTensor, megatron_tensors
from tests.distributed.test_layouts import VOCAB_SIZE, make_config
from tests.ranks import run_ranks

MIXTURE = {"num_experts": 4, "experts_per_token": 2}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "mistral": {},
    "qwen2": {"tie_embeddings": True},
    "qwen3": {"head_dim": 12},
    "mixtral": MIXTURE,
    "qwen3_moe": {**MIXTURE, "tie_embeddings": True, "head_dim": 12},
}
DENSE_LAYOUTS = {
    "one process": (1, {}),
    "tp2": (2, {"tp": 2}),
    "pp2": (2, {"pp": 2}),
    "vp2": (2, {"pp": 2, "vp": 2}),
    "3 + 1 layers": (2, {"pp": 2, "last_stage_layers": 1}),
    "dp2": (2, {}),
    "tp2 pp2": (4, {"tp": 2, "pp": 2}),
}
SPLIT = {"tp": 2, "sequence_parallel": True}
MIXTURE_LAYOUTS = {
    "one process": (1, {}),
    "ep2": (2, {"ep": 2}),
    "cp2 ep2": (2, {"cp": 2, "ep": 2}),
    "tp2 etp2": (2, SPLIT),
    "tp2 etp1": (2, {**SPLIT, "etp": 1}),
    "tp2 etp1 ep2": (2, {**SPLIT, "etp": 1, "ep": 2}),
    "vp2": (2, {"pp": 2, "vp": 2}),
    "tp2 etp2 ep2": (4, {**SPLIT, "ep": 2}),
    "ep2 pp2": (4, {"ep": 2, "pp": 2}),
    "tp2 etp1 ep2 pp2": (4, {**SPLIT, "etp": 1, "ep": 2, "pp": 2}),
}


@dataclass(frozen=True, kw_only=True)
class Shard:
    """What one rank holds of one tensor, as Megatron says it."""

    key: str
    index: tuple[int, ...]
    stack: tuple[int, ...]
    whole: tuple[int, ...]
    box: tuple[tuple[int, int], ...]
    is_main: bool


def held_shards(parallel: dict, families: dict[str, dict[str, Any]]) -> dict[str, list[Shard]]:
    """Every shard of this rank, by family."""
    from megatron.core import parallel_state

    from megatron_sftrl.engine.megatron_config import transformer_config
    from megatron_sftrl.engine.model import build_model_chunks
    from megatron_sftrl.engine.parallel import initialize_parallel

    shards: dict[str, list[Shard]] = {}
    context = initialize_parallel(make_config(parallel).parallel)
    for family, sizes in families.items():
        run = make_config(parallel, family=family, **sizes)
        architecture = architecture_of(family, sizes)
        config = transformer_config(architecture, run.model, run.parallel, run.train, is_cuda=False)
        shards[family] = [
            shard
            for chunk in build_model_chunks(architecture, config, context)
            for value in chunk.sharded_state_dict().values()
            for shard in _described(value)
        ]
    parallel_state.destroy_model_parallel()
    return shards


def _described(value: Any) -> list[Shard]:
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory

    if isinstance(value, ShardedTensorFactory):
        return [shard for part in value.build() for shard in _described(part)]
    if not isinstance(value, ShardedTensor):
        return []  # Transformer Engine's extra state: no tensor
    stacked = value.prepend_axis_num
    assert value.data is not None
    assert tuple(value.data.shape) == value.local_shape
    offset = value.global_offset[stacked:]
    return [
        Shard(
            key=value.key,
            index=value.global_offset[:stacked],
            stack=value.global_shape[:stacked],
            whole=value.global_shape[stacked:],
            box=tuple((a, a + b) for a, b in zip(offset, value.local_shape, strict=True)),
            is_main=value.replica_id in (0, (0, 0, 0)),
        )
    ]


def architecture_of(family: str, sizes: dict[str, Any]) -> Architecture:
    section = make_config({}, family=family, **sizes).model.architecture
    assert section is not None
    return from_section(section)


def assert_covered_once(tensor: MegatronTensor, shards: list[Shard], tp: int) -> None:
    """The main copies tile the tensor, every other copy repeats one of them."""
    rows = padded_vocab_size(VOCAB_SIZE, tp) if tensor.has_padding else tensor.shape[0]
    whole = (rows, *tensor.shape[1:])
    assert {shard.stack for shard in shards} == {tensor.stack}
    assert {shard.whole for shard in shards} == {whole}
    times_held = torch.zeros(whole, dtype=torch.int64)
    for shard in shards:
        if shard.is_main:
            times_held[tuple(slice(*bounds) for bounds in shard.box)] += 1
    assert (times_held == 1).all(), f"{tensor.key} {tensor.index}: held {times_held.unique().tolist()} times"
    assert {shard.box for shard in shards} == {shard.box for shard in shards if shard.is_main}


@pytest.mark.parametrize("layout", ["dense " + name for name in DENSE_LAYOUTS] + [*MIXTURE_LAYOUTS])
def test_the_table_names_exactly_the_tensors_of_the_model_and_ranks_cover_each_element_once(
    layout: str,
) -> None:
    is_dense = layout.startswith("dense ")
    world_size, parallel = DENSE_LAYOUTS[layout[6:]] if is_dense else MIXTURE_LAYOUTS[layout]
    families = {name: sizes for name, sizes in FAMILIES.items() if ("num_experts" in sizes) != is_dense}
    ranks = run_ranks(world_size, held_shards, parallel, families)
    for family, sizes in families.items():
        held: dict[tuple, list[Shard]] = {}
        for shard in itertools.chain.from_iterable(rank[family] for rank in ranks):
            held.setdefault((shard.key, shard.index), []).append(shard)
        table = {(t.key, t.index): t for t in megatron_tensors(architecture_of(family, sizes))}
        assert held.keys() == table.keys()
        for name, tensor in table.items():
            assert_covered_once(tensor, held[name], parallel.get("tp", 1))


@pytest.mark.parametrize("layout", ["tp2 etp2", "tp2 etp1", "tp2 etp2 ep2"])
def test_each_rank_holds_the_part_that_the_table_s_shard_rule_says(layout: str) -> None:
    world_size, parallel = MIXTURE_LAYOUTS[layout]
    ranks = run_ranks(world_size, held_shards, parallel, {"mixtral": FAMILIES["mixtral"]})
    table = {(t.key, t.index): t for t in megatron_tensors(architecture_of("mixtral", MIXTURE))}
    tp, etp = parallel["tp"], parallel.get("etp", parallel["tp"])
    for shard in itertools.chain.from_iterable(rank["mixtral"] for rank in ranks):
        tensor = table[shard.key, shard.index]
        parts = etp if tensor.is_expert else tp
        cut = {"rows": 0, "columns": 1, None: None}[tensor.shard]
        for dim, (size, (start, stop)) in enumerate(zip(shard.whole, shard.box, strict=True)):
            num_pieces = (parts * tensor.num_parts if dim == 0 else parts) if dim == cut else 1
            halves = tensor.num_parts if dim == 0 else 1
            assert stop - start == size // max(num_pieces, halves)
