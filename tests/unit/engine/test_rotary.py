"""Queries and keys turn bit by bit as in Megatron, forward and backward."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from megatron_sftrl.engine import cpu_backend
from megatron_sftrl.engine.packed_sequences import PackedSequences
from megatron_sftrl.models.rope import Rope, inverse_frequencies
from megatron_sftrl.types import Prefix

HEAD_DIM, LENGTHS = 24, (8, 4, 12, 4)
PLAIN = Rope(kind="default", theta=1e4)
ROPES = {
    "halves": PLAIN,
    "neighbours": replace(PLAIN, interleaved=True),
    "a part of a head": replace(PLAIN, fraction=0.5),
    "a part, neighbours": replace(PLAIN, fraction=0.5, interleaved=True),
    "longer": replace(PLAIN, kind="yarn", factor=4.0, original_length=16, attention_factor=1.138629436111989),
}


class Rank:
    """Of a context-parallel group, as far as rotations ask."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = lambda: rank, lambda: size


def megatrons(rope: Rope, x: Tensor, lengths: tuple[int, ...], group: Any) -> Tensor:
    cpu_backend.import_megatron()
    from megatron.core.models.common.embeddings.rope_utils import apply_rotary_pos_emb

    frequencies = inverse_frequencies(rope, HEAD_DIM)
    angles = torch.outer(torch.arange(max(lengths)).float(), frequencies)
    both = angles.repeat_interleave(2, dim=-1) if rope.interleaved else torch.cat((angles, angles), dim=-1)
    config: Any = SimpleNamespace(
        apply_rope_fusion=False, rotary_interleaved=rope.interleaved, multi_latent_attention=False
    )
    offsets = torch.tensor([0, *lengths]).cumsum(0).int()
    return apply_rotary_pos_emb(
        x, both[:, None, None], config, cu_seqlens=offsets, mscale=rope.attention_factor, cp_group=group
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("cp", [(0, 1), (1, 2)])
@pytest.mark.parametrize("name", ROPES)
def test_values_and_gradients_are_megatrons(name: str, cp: tuple[int, int], dtype: torch.dtype) -> None:
    rope, group = ROPES[name], Rank(*cp)
    torch.manual_seed(0)
    # A part of a wider tensor, as queries are a part of q, k and v.
    mixed = torch.randn(sum(LENGTHS) // cp[1], 5, HEAD_DIM, dtype=dtype)
    weight = torch.randn(len(mixed), 3, HEAD_DIM, dtype=dtype)
    packed = PackedSequences.of(LENGTHS, device=torch.device("cpu"))
    turn = packed.turn(rope, inverse_frequencies(rope, HEAD_DIM), group, dtype)  # type: ignore[arg-type]
    found = []
    for turned in (turn, lambda x: megatrons(rope, x, LENGTHS, group)):
        leaf = mixed.clone().requires_grad_()
        output = turned(leaf[:, 1:4])
        (output * weight).sum().backward()
        found.append((output.detach(), leaf.grad))
    (ours, our_grad), (theirs, their_grad) = found
    assert ours.dtype == dtype
    assert torch.equal(ours, theirs)
    assert torch.equal(our_grad, their_grad)
    with torch.no_grad():
        assert torch.equal(turn(mixed[:, 1:4]), theirs)


def test_tables_are_made_once_a_micro_batch_and_rope() -> None:
    packed, group = PackedSequences.of(LENGTHS, device=torch.device("cpu")), Rank(0, 1)
    other = replace(PLAIN, theta=5e5)
    plain, again, longer, small = (
        packed.turn(rope, inverse_frequencies(rope, HEAD_DIM), group, dtype)  # type: ignore[arg-type]
        for rope, dtype in (
            (PLAIN, torch.float32),
            (replace(PLAIN), torch.float32),
            (other, torch.float32),
            (PLAIN, torch.bfloat16),
        )
    )
    assert again is plain
    assert not torch.equal(longer.cos, plain.cos)
    assert small.cos.dtype == torch.bfloat16


def test_a_branch_stands_behind_its_prompt() -> None:
    whole = PackedSequences.of([7], device=torch.device("cpu"))
    parts = PackedSequences.of([3, 4], prefixes=(None, Prefix(of=0, length=3)), device=torch.device("cpu"))
    x, frequencies = torch.randn(7, 1, HEAD_DIM), inverse_frequencies(PLAIN, HEAD_DIM)
    one, two = (
        each.turn(PLAIN, frequencies, Rank(0, 1), torch.float32)(x)  # type: ignore[arg-type]
        for each in (whole, parts)
    )
    assert torch.equal(one, two)
