"""Products of two gradients and KL between two models, under every layout: transformers' in float64."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.distributed.coupling_runs import Key, advantage_of, key_of, measure, sequences_of
from tests.distributed.hf_models import save_model
from tests.distributed.test_layouts import step_batches
from tests.grid import is_full
from tests.ranks import run_ranks

SHARDED = {"distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True}
CASES: dict[str, tuple[str, dict[str, Any], int]] = {
    "tp2": ("qwen3", {"tp": 2}, 2),
    "tp2 sp, tied": ("llama_tied", {"tp": 2, "sequence_parallel": True}, 2),
    "pp2, tied": ("llama_tied", {"pp": 2}, 2),
    "dp2": ("qwen3", {}, 1),
    "dp2 sharded, tied": ("llama_tied", SHARDED, 2),
    "cp2": ("qwen3", {"cp": 2}, 2),
    "ep2 sharded": ("mixtral", {"ep": 2, **SHARDED}, 2),
    "mixture, tp2 etp1": ("mixtral", {"tp": 2, "sequence_parallel": True, "etp": 1}, 2),
}
MORE: dict[str, tuple[str, dict[str, Any], int]] = {
    "pp2 sharded, tied": ("llama_tied", {"pp": 2, "distributed_optimizer": True}, 2),
    "dp2 sharded": ("qwen3", SHARDED, 2),
    "cp2 sharded": ("qwen3", {"cp": 2, **SHARDED}, 2),
    "ep2": ("mixtral", {"ep": 2}, 2),
    "mixture, dp2": ("mixtral", {}, 2),
}
"""What the cases above ask one by one, or of another model."""


@dataclass(frozen=True, kw_only=True)
class Truth:
    aa: float
    ab: float
    bb: float
    kl: dict[Key, list[float]]
    old: dict[Key, list[float]]

    @property
    def cosine(self) -> float:
        return self.ab / (self.aa * self.bb) ** 0.5


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("coupling")


@functools.cache
def truth(name: str, root: Path) -> Truth:
    """Autograd through transformers' model in float64, each sequence alone; both models are saved here."""
    before = save_model(name, root / f"{name}-before", seed=1).double()
    after = save_model(name, root / name).double()
    for model in (before, after):
        model.set_experts_implementation("eager")  # the others have no float64
    (shown,) = step_batches(0, num_groups=1, group=0, multiple=4, num_microbatches=1)
    (drawn,) = step_batches(1, num_groups=1, group=0, multiple=4, num_microbatches=1)
    kl: dict[Key, list[float]] = {}
    old: dict[Key, list[float]] = {}

    def logprobs_of(model: Any, tokens: Tensor) -> Tensor:
        return model(tokens[None]).logits[0].log_softmax(-1)

    losses = {"sft": torch.zeros((), dtype=torch.float64), "rl": torch.zeros((), dtype=torch.float64)}
    for which, batch in (("sft", shown), ("rl", drawn)):
        for span in sequences_of(batch):
            tokens, mask, key = batch.tokens[span], batch.loss_mask[span], key_of(batch.tokens[span])
            logprobs = logprobs_of(after, tokens)
            picked = logprobs.gather(1, batch.labels[span][:, None])[:, 0]
            weight = 1.0 if which == "sft" else advantage_of(key)
            losses[which] = losses[which] - weight * (picked * batch.token_weight[span]).sum()
            if which == "rl":
                old[key] = picked[mask].tolist()
                continue
            with torch.no_grad():
                first = logprobs_of(before, tokens)
                kl[key] = (first.exp() * (first - logprobs)).sum(-1)[mask].tolist()
    parameters = list(after.parameters())
    a, b = (torch.autograd.grad(loss, parameters) for loss in losses.values())
    products = [
        sum(float((x * y).sum()) for x, y in zip(*pair, strict=True)) for pair in ((a, a), (a, b), (b, b))
    ]
    aa, ab, bb = products
    return Truth(aa=aa, ab=ab, bb=bb, kl=kl, old=old)


@pytest.mark.parametrize("case", [*CASES, *(MORE if is_full() else ())])
def test_gradients_and_divergences_are_those_of_one_model_in_float64(case: str, root: Path) -> None:
    name, parallel, num_microbatches = (CASES | MORE)[case]
    expected = truth(name, root)
    assert abs(expected.cosine) > 1e-3, "two gradients at right angles would hide a wrong product"
    found = run_ranks(
        2, measure, root / name, root / f"{name}-before", parallel, expected.old, num_microbatches
    )
    for each in found:
        assert each.ab / (each.aa * each.bb) ** 0.5 == pytest.approx(expected.cosine, abs=1e-6)
        assert each.aa == pytest.approx(expected.aa, rel=1e-4)
        assert each.bb == pytest.approx(each.norm**2, rel=1e-5)
    divergences = {key: values for each in found for key, values in each.kl.items()}
    assert divergences.keys() == expected.kl.keys()
    for key, values in expected.kl.items():
        assert divergences[key] == pytest.approx(values, rel=1e-4, abs=1e-4)
