"""The projection with biases, of Qwen2: its gradients in the layouts that gather or copy its input."""

from __future__ import annotations

import pytest

from tests.distributed.test_layouts import assert_same_curve, one_process, train
from tests.ranks import run_ranks


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_a_model_with_biases_trains_the_same_under_tensor_and_sequence_parallelism(
    sequence_parallel: bool,
) -> None:
    parallel = {"tp": 2, "sequence_parallel": sequence_parallel}
    curves = run_ranks(2, train, parallel, "sft", 2, {"family": "qwen2"})
    for curve in curves:
        assert_same_curve(curve, one_process("sft", family="qwen2"))
