"""Output layer and loss fused, in every layout, against one process that has all logits in memory."""

from __future__ import annotations

import pytest

from megatron_sftrl.vocab_parallel import output_layer
from tests.distributed.test_layouts import (
    LAYOUTS,
    VOCAB_SIZE,
    Curve,
    assert_same_curve,
    one_process,
    train,
)
from tests.grid import often
from tests.ranks import run_ranks

TIED = {"tie_embeddings": True}
RUNS: list[tuple[str, str, dict]] = [
    # one pass with a reference, everywhere
    *((layout, "gift", {}) for layout in often(LAYOUTS, rarely=["tp2", "dp2", "tp2_pp2"])),
    # two passes: weights of whole sequences
    *((layout, "pear", {}) for layout in ("sp", "dp2_distributed_optimizer", "tp2_pp2")),
    # a gather inside each chunk
    ("tp2", "curiosft", {}),
    # the weight's gradient comes from the embedding, too: on the same rank, or over the pipeline
    ("dp2_distributed_optimizer", "sft", TIED),
    ("dp2_distributed_optimizer", "pear", TIED),
    ("tp2_pp2", "sft", TIED),
]


@pytest.mark.parametrize(("layout", "loss_name", "model"), RUNS)
def test_a_fused_loss_follows_the_run_with_all_logits(layout: str, loss_name: str, model: dict) -> None:
    world_size, parallel, num_microbatches = LAYOUTS[layout]
    expected = one_process(loss_name, **model)
    for curve in run_ranks(world_size, train_fused, parallel, loss_name, num_microbatches, model):
        assert_same_curve(curve, expected)


def train_fused(parallel: dict, loss_name: str, num_microbatches: int, model: dict) -> Curve:
    """`train` with chunks of a few tokens, so that every micro-batch has several."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(output_layer, "CPU_LOGITS_BYTES", 7 * 4 * VOCAB_SIZE)
        return train(parallel, loss_name, num_microbatches, model, fused="on")
