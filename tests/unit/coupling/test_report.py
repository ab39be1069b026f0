"""Signed changes between stages, paired; and a case in which RL lowers the loss of SFT."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from megatron_sftrl.apps.coupling.measure import Gradients
from megatron_sftrl.apps.coupling.report import KL, NLL, Coupling, Values, changes_of, tell
from megatron_sftrl.apps.coupling.rotation import Turn, pair_key
from megatron_sftrl.apps.coupling.stages import CouplingRequest, Stage
from megatron_sftrl.apps.evaluate.statistics import estimate
from megatron_sftrl.vocab_parallel import TokenDistribution

SFT, RL = (Stage(name=name, path=Path(name)) for name in ("sft", "rl"))
PAIR = pair_key(SFT, RL)


def policy(probs: torch.Tensor) -> TokenDistribution:
    return TokenDistribution.from_logits(probs.log()[None], vocab_size=2)


def test_off_the_optimum_of_sft_rl_lowers_its_loss_and_the_report_says_so(tmp_path: Path) -> None:
    """p_SFT = (.5, .5), p_D = (.9, .1), r = (1, 0), KL weight 1: the theorem's sign is the other one."""
    start, reward = torch.tensor([0.5, 0.5], dtype=torch.float64), torch.tensor([1.0, 0.0]).double()
    optimum = start * reward.exp()
    optimum /= optimum.sum()  # of E r - KL(p || p_SFT)
    before, after = policy(start), policy(optimum)
    shown = [0] * 9 + [1]
    first, then = (
        [float(-each.logprobs(torch.tensor([token]))) for token in shown] for each in (before, after)
    )
    rewards = [[float(probs @ reward)] for probs in (start, optimum)]
    numbers = {
        "sft": {NLL: Values.of_tokens([first]), "reward": Values.of(rewards[0])},
        "rl": {NLL: Values.of_tokens([then]), "reward": Values.of(rewards[1])},
    }
    divergence = [float(after.kl_from(before))] * 10
    changes = changes_of(numbers, [(SFT, RL)], {PAIR: [divergence]}, seed=0)[PAIR]
    e = math.e
    assert changes[NLL].value == pytest.approx(math.log((1 + e) / 2) - 0.9, abs=1e-14)  # -0.28
    assert round(changes[NLL].value, 2) == -0.28
    assert changes["reward"].value == pytest.approx(e / (1 + e) - 0.5, abs=1e-14)
    assert changes[KL].value == pytest.approx(math.log((1 + e) / 2) - 0.5, abs=1e-14)
    none = Gradients(sft=1.0, rl=0.0, cosine=None, num_responses=0)
    tell(
        tmp_path,
        Coupling(
            stages={"sft": "a", "rl": "b"},
            numbers=numbers,
            changes={PAIR: changes},
            gradients={"sft": none, "rl": none},
            turns={},
            seed=0,
        ),
    )
    told = json.loads((tmp_path / "coupling.json").read_text())
    assert told["changes"][PAIR][NLL]["value"] == changes[NLL].value < 0
    assert "-0.28" in (tmp_path / "report.html").read_text()


def test_at_the_optimum_of_sft_the_loss_rises_by_the_divergence() -> None:
    """Where p_SFT is the demonstrations' own distribution, the change is KL(before || after)."""
    start, moved = (torch.tensor(each, dtype=torch.float64) for each in ([0.9, 0.1], [0.7, 0.3]))
    before, after = policy(start), policy(moved)
    shown = [0] * 9 + [1]
    nll = [
        Values.of_tokens([[float(-each.logprobs(torch.tensor([token]))) for token in shown]])
        for each in (before, after)
    ]
    numbers = {"sft": {NLL: nll[0]}, "rl": {NLL: nll[1]}}
    divergences = {PAIR: [[float(after.kl_from(before))] * 10]}
    changes = changes_of(numbers, [(SFT, RL)], divergences, seed=0)[PAIR]
    assert changes[NLL].value == pytest.approx(changes[KL].value, abs=1e-14)


def test_changes_are_paired_and_leave_out_what_either_stage_lacks() -> None:
    generator = torch.Generator().manual_seed(0)
    hard = (10 * torch.rand(60, generator=generator)).tolist()  # prompts differ far more than stages do
    after = [value + 0.1 for value in hard]
    found = Values.of([None, *after, 5.0]).estimate(seed=3, less=Values.of([1.0, *hard, None]))
    assert found is not None
    assert found.num_prompts == 60
    assert found.value == pytest.approx(0.1)
    assert found.low == pytest.approx(0.1)
    assert found.high == pytest.approx(0.1)
    assert Values.of([None]).estimate(seed=0) is None


def test_a_change_per_token_counts_each_token_once() -> None:
    before, after = [[1.0], [2.0, 4.0, 6.0]], [[3.0], [1.0, 4.0, 6.0]]
    found = Values.of_tokens(after).estimate(seed=0, less=Values.of_tokens(before))
    expected = estimate([2.0, -1 / 3], seed=0, weights=[1, 3])
    assert found is not None
    assert found.value == pytest.approx((2.0 - 1.0) / 4)
    assert (found.low, found.high) == pytest.approx((expected.low, expected.high))


def test_each_stage_is_compared_with_the_one_before_and_with_the_first() -> None:
    a, b, c, d = (Stage(name=name, path=Path(name)) for name in "abcd")
    request = CouplingRequest(
        out=Path(),
        stages=(a, b, c, d),
        prompts=(),
        demonstrations=Path(),
        num_samples=2,
        ks=(1,),
        seed=0,
        rank=1,
    )
    assert request.pairs == ((a, b), (b, c), (c, d), (a, c), (a, d))


def test_the_page_has_every_matrix_that_turned(tmp_path: Path) -> None:
    numbers = {name: {NLL: Values.of_tokens([[1.0]])} for name in ("sft", "rl")}
    changes = changes_of(numbers, [(SFT, RL)], {PAIR: [[0.0]]}, seed=0)
    turn = Turn(left=[0.0, math.pi / 4], right=[0.0, 0.0], values=0.01, weights=0.5)
    gradients = Gradients(sft=1.0, rl=2.0, cosine=-0.25, num_responses=3)
    found = Coupling(
        stages={"sft": "a", "rl": "b"},
        numbers=numbers,
        changes=changes,
        gradients={"sft": gradients, "rl": gradients},
        turns={f"model.layers.{layer}.mlp.down_proj.weight": {PAIR: turn} for layer in (0, 1)},
        seed=0,
    )
    tell(tmp_path, found)
    told = json.loads((tmp_path / "coupling.json").read_text())
    assert told["gradients"]["rl"]["cosine"] == -0.25
    kinds, layers = (told["rotation"][PAIR][name] for name in ("kind", "layer"))
    assert kinds["layers.mlp.down_proj"]["num_matrices"] == 2
    assert kinds["layers.mlp.down_proj"]["left"] == pytest.approx(22.5)
    assert kinds["layers.mlp.down_proj"]["largest"] == pytest.approx(45.0)
    assert set(layers) == {"0", "1"}
