"""Attention over packed sequences equals attention over each sequence alone, on any context-parallel size.

With a sliding window too: a query sees that many positions, its own included.
"""

from __future__ import annotations

import pytest
import torch

from megatron_sftrl.types import Prefix
from tests.ranks import run_ranks

LENGTHS = [16, 48, 8, 24, 8, 32]  # multiples of 8, so that cp 4 can split them
# Of the first and the fourth not all is a prefix; the third and the fifth share a call.
PREFIXES = (None, Prefix(0, 13), Prefix(0, 13), None, Prefix(3, 9), Prefix(3, 9))
HEADS, GROUPS, HEAD_DIM = 4, 2, 8


def tensors(device: str = "cpu") -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    total = sum(LENGTHS)
    shapes = [(total, HEADS, HEAD_DIM), (total, GROUPS, HEAD_DIM), (total, GROUPS, HEAD_DIM)]
    upstream = torch.randn(total, HEADS * HEAD_DIM, generator=generator)
    return [x.to(device) for x in (*(torch.randn(shape, generator=generator) for shape in shapes), upstream)]


def sequence_by_sequence(window: int | None, prefixes: tuple[Prefix | None, ...] = ()) -> list[torch.Tensor]:
    """Output and the gradients of q, k, v, from one plain attention call per sequence."""
    query, key, value, upstream = tensors()
    leaves = [leaf.requires_grad_() for leaf in (query, key, value)]
    pieces = []
    queries, keys, values = (leaf.split(LENGTHS) for leaf in leaves)
    for q, k, v, prefix in zip(queries, keys, values, prefixes or [None] * len(LENGTHS), strict=True):
        if prefix is not None:
            k = torch.cat([keys[prefix.of][: prefix.length], k])
            v = torch.cat([values[prefix.of][: prefix.length], v])
        k, v = (x.repeat_interleave(HEADS // GROUPS, dim=1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) / HEAD_DIM**0.5
        positions = torch.arange(len(k))
        own = positions[len(k) - len(q) :, None]
        unseen = positions[None] > own  # [q, k]
        if window is not None:
            unseen |= positions[None] <= own - window
        pieces.append(torch.einsum("hqk,khd->qhd", scores.masked_fill(unseen, -torch.inf).softmax(-1), v))
    output = torch.cat(pieces).flatten(1)
    (output * upstream).sum().backward()
    return [output.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def packed(
    cp: int,
    window: int | None,
    layer_number: int = 2,
    device: str = "cpu",
    prefixes: tuple[Prefix | None, ...] = (),
) -> list[torch.Tensor]:
    """The same from PackedAttention, put back into whole order (other ranks' rows zero).

    Of two layers the second has the window; Megatron counts them from 1.
    """
    from megatron_sftrl.config.schema import ParallelSection
    from megatron_sftrl.engine.parallel import initialize_parallel

    context = initialize_parallel(ParallelSection(cp=cp))
    from megatron.core import parallel_state
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.core.transformer.enums import AttnMaskType
    from megatron.core.transformer.transformer_config import TransformerConfig

    from megatron_sftrl.engine.context_parallel import local_rows
    from megatron_sftrl.engine.local_layers import PackedAttention
    from megatron_sftrl.engine.packed_sequences import PackedSequences

    config = TransformerConfig(
        num_layers=2,
        hidden_size=HEADS * HEAD_DIM,
        num_attention_heads=HEADS,
        kv_channels=HEAD_DIM,
        window_size=None if window is None else (window - 1, 0),
        window_attn_skip_freq=[0, 1],
    )
    groups = ProcessGroupCollection.use_mpu_process_groups(["cp"])
    attention = PackedAttention(config, layer_number, AttnMaskType.causal, "self", pg_collection=groups)
    rows = local_rows(LENGTHS, cp_rank=context.cp_rank, cp_size=cp).to(device)
    query, key, value, upstream = tensors(device)
    leaves = [leaf[rows].requires_grad_() for leaf in (query, key, value)]
    params = PackedSequences.of(LENGTHS, device=context.device, prefixes=prefixes)
    output = attention(*leaves, None, attn_mask_type=AttnMaskType.causal, packed_seq_params=params)
    (output * upstream[rows]).sum().backward()
    results = [output.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]
    parallel_state.destroy_model_parallel()
    return [
        result.new_zeros(sum(LENGTHS), *result.shape[1:]).index_copy(0, rows, result).cpu()
        for result in results
    ]


def assert_equal(parts: list[list[torch.Tensor]], expected: list[torch.Tensor]) -> None:
    for index, name in enumerate(["output", "query gradient", "key gradient", "value gradient"]):
        whole = sum(part[index] for part in parts)
        # fp32 attention in another order of summation.
        torch.testing.assert_close(
            whole, expected[index], rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("cp", [1, 2, 4])
# A window of one position, of less than every sequence, of more than some, of as many as the longest has.
@pytest.mark.parametrize("window", [None, 1, 5, 17, 48])
def test_packed_attention_equals_each_sequence_alone_in_value_and_gradient(
    cp: int, window: int | None
) -> None:
    assert_equal(run_ranks(cp, packed, cp, window), sequence_by_sequence(window))


@pytest.mark.parametrize("cp", [1, 2])
def test_only_the_layers_of_the_list_have_the_window(cp: int) -> None:
    assert_equal(run_ranks(cp, packed, cp, 5, 1), sequence_by_sequence(None))


@pytest.mark.parametrize("cp", [1, 2, 4])
@pytest.mark.parametrize("window", [None, 1, 11, 40])
def test_sequences_behind_a_prefix_see_it_and_give_it_their_gradients(cp: int, window: int | None) -> None:
    parts = run_ranks(cp, packed, cp, window, 2, "cpu", PREFIXES)
    assert_equal(parts, sequence_by_sequence(window, PREFIXES))
