"""A new token's gated MLP rounds where the layers' own kernel does; whole generations test the rest."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F


@pytest.mark.parametrize("is_fused", [False, True])
def test_a_fused_swiglu_is_rounded_once(is_fused: bool) -> None:
    from megatron_sftrl.engine.decode_step import _mlp

    generator = torch.Generator().manual_seed(0)
    x, fc1 = (torch.randn(size, generator=generator).bfloat16() for size in ((64, 32), (96, 32)))
    # The product behind it gives the numbers back as they are.
    fc2 = torch.eye(48).bfloat16()
    config = SimpleNamespace(bias_activation_fusion=is_fused, activation_func=F.silu)
    mlp: Any = SimpleNamespace(config=config)
    mlp.linear_fc1, mlp.linear_fc2 = SimpleNamespace(weight=fc1), SimpleNamespace(weight=fc2)
    alone: Any = SimpleNamespace(size=lambda: 1)
    gate, up = F.linear(x, fc1).chunk(2, dim=-1)
    once, twice = (F.silu(gate.float()) * up).bfloat16(), F.silu(gate) * up
    assert (once != twice).float().mean() > 0.1
    assert torch.equal(_mlp(mlp, x, alone), once if is_fused else twice)
