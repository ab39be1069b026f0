"""Every question to a TokenDistribution, against dense float64 autograd, for each split of the vocabulary."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
import torch

from megatron_sftrl.vocab_parallel import TokenDistribution
from megatron_sftrl.vocab_parallel.statistics import Expectation, LogSumExp, Pick, Total, about
from tests.ranks import run_ranks
from tests.unit.vocab_parallel.dense import (
    LABELS,
    PRIMITIVES,
    TAU,
    T,
    V,
    distribution,
    logits,
    shard,
)

WEIGHTS = torch.linspace(-1.0, 2.0, T, dtype=torch.float64)  # an upstream gradient that differs per token
EXACT = 1e-12  # float64 sums of 101 terms of size 10: some 1e-14


def max_or_nan(errors: Sequence[float]) -> float:
    """The largest; NaN when any is (Python's max would pass over it)."""
    return torch.tensor(errors, dtype=torch.float64).max().item()


def is_below(bound: float, errors: Sequence[float]) -> bool:
    """Every error is a number below the bound."""
    return all(error < bound for error in errors)


def on_ranks(tp: int, function, *args):
    """Results of every rank; tp = 0 runs here, without any group."""
    return run_ranks(tp, function, *args) if tp else [function(*args)]


def primitive_errors(padding: float | None) -> dict[str, tuple[float, float]]:
    """Largest error of value and of gradient of each primitive on this rank."""
    found = {}
    for name, (through_shards, through_dense) in PRIMITIVES.items():
        z, u = logits(1).requires_grad_(), logits(2)
        truth = through_dense(z, u)
        (truth * WEIGHTS).sum().backward()
        local, columns = shard(z.detach(), padding=padding)
        local.requires_grad_()
        before = local.detach().clone()
        value = through_shards(distribution(local), distribution(shard(u, padding=padding)[0]))
        (value * WEIGHTS).sum().backward()
        assert local.grad is not None
        assert z.grad is not None
        num_real = columns.stop - columns.start
        assert torch.equal(local.detach().nan_to_num(7.0), before.nan_to_num(7.0)), f"{name} changed logits"
        assert (local.grad[:, num_real:] == 0).all(), f"{name} gives padding a gradient"
        found[name] = (
            (value - truth).abs().max().item(),
            (local.grad[:, :num_real] - z.grad[:, columns]).abs().max().item(),
        )
    return found


@pytest.mark.parametrize("padding", [1e30, -torch.inf, torch.nan, None])
@pytest.mark.parametrize("tp", [0, 2, 3])
def test_every_primitive_equals_dense_autograd_whatever_the_padding_holds(tp: int, padding: float | None):
    for rank, found in enumerate(on_ranks(tp, primitive_errors, padding)):
        wrong = {name: errors for name, errors in found.items() if not is_below(EXACT, errors)}
        assert not wrong, f"rank {rank}: {wrong}"


QUESTIONS = {
    "logprobs": lambda p, q: p.logprobs(LABELS),
    "entropy": lambda p, q: p.entropy(),
    "mean_logprob": lambda p, q: p.mean_logprob(),
    "cross_entropy": lambda p, q: p.cross_entropy(q),
    "kl_to": lambda p, q: p.kl_to(q),
}


def answers_in_every_order() -> list[float]:
    """Largest difference from the first order's values and gradient, for each order of asking."""
    first: dict[str, torch.Tensor] = {}
    differences = []
    for order in itertools.permutations(QUESTIONS):
        local = shard(logits(1))[0].requires_grad_()
        p, q = distribution(local), distribution(shard(logits(2))[0])
        values = {name: QUESTIONS[name](p, q) for name in order}
        torch.stack([values[name] for name in sorted(values)]).sum().backward()
        assert local.grad is not None
        values["gradient"] = local.grad
        first = first or values
        differences.append(max_or_nan([(values[name] - first[name]).abs().max().item() for name in values]))
    return differences


def test_the_order_of_questions_changes_no_answer_and_no_gradient():
    for differences in run_ranks(2, answers_in_every_order):
        assert len(differences) == 120
        assert is_below(EXACT, differences)


def test_top_k_is_that_of_the_whole_vocabulary_and_brings_the_entropy():
    expected = logits(2).topk(40, dim=1).values
    for values, entropy in run_ranks(3, _top_k, 40):
        torch.testing.assert_close(values, expected, rtol=0, atol=0)  # the same numbers, only moved
        torch.testing.assert_close(
            entropy, PRIMITIVES["entropy"][1](logits(2), logits(2)), rtol=0, atol=EXACT
        )


def _top_k(k: int) -> tuple[torch.Tensor, torch.Tensor]:
    q = distribution(shard(logits(2))[0])
    return q.top_k(k).values.sort(dim=1, descending=True).values, q.entropy()


def _top_k_of_tempered(k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids, values and mass, in the order of the values."""
    top = distribution(shard(logits(2))[0]).tempered(TAU).top_k(k, with_ids=True)
    assert top.ids is not None
    order = top.values.argsort(dim=1, descending=True)
    return top.ids.gather(1, order), top.values.gather(1, order), top.mass()


@pytest.mark.parametrize("tp", [0, 2, 3])
def test_top_k_says_whose_the_logits_are_and_what_mass_they_have(tp: int):
    scaled = logits(2) / TAU[:, None]
    expected = scaled.topk(7, dim=1)
    for ids, values, mass in on_ranks(tp, _top_k_of_tempered, 7):
        assert torch.equal(ids, expected.indices)
        torch.testing.assert_close(values, expected.values, rtol=EXACT, atol=0)
        torch.testing.assert_close(mass, scaled.softmax(1).topk(7, dim=1).values.sum(1), rtol=EXACT, atol=0)


def test_top_k_larger_than_the_vocabulary_is_the_vocabulary():
    for values, _ in run_ranks(2, _top_k, 500):
        torch.testing.assert_close(values, logits(2).sort(dim=1, descending=True).values, rtol=0, atol=0)


@pytest.mark.parametrize("tp", [0, 2])
def test_logits_of_ten_thousand_keep_the_digits_that_float32_logits_have(tp: int):
    for error in on_ranks(tp, _shifted_error):
        assert (
            error < 2e-6
        )  # differences of the logits are exact in float32; sums of 101 terms cost a few ulp


def _shifted_error() -> float:
    """Logits that are multiples of 1/8, so that adding +-1e4 is exact in float32, against float64."""
    worst = 0.0
    for shift in (1e4, -1e4):
        z, u = (logits(1) * 8).round() / 8 + shift, (logits(2) * 8).round() / 8 - shift
        for name, (through_shards, through_dense) in PRIMITIVES.items():
            if "tempered" in name or "together" in name:  # z / tau is not exact in the dense float64 either
                continue
            p, q = (distribution(shard(x)[0].float()) for x in (z, u))
            truth = through_dense(z, u)
            error = (through_shards(p, q) - truth).abs() / truth.abs().clamp(min=1)
            worst = max_or_nan([worst, error.max().item()])
    return worst


def test_a_spread_of_twenty_thousand_is_exact():
    z = torch.full((2, 5), -1e4)
    z[0, 1], z[1, 4] = 1e4, 1e4
    z.requires_grad_()
    p = TokenDistribution.from_logits(z, vocab_size=5)
    logprobs = p.logprobs(torch.tensor([1, 0]))
    assert logprobs.tolist() == [0.0, -2e4]
    assert p.entropy().tolist() == [0.0, 0.0]
    (logprobs + p.entropy()).sum().backward()
    assert z.grad is not None
    assert torch.equal(z.grad[1], torch.tensor([1.0, 0.0, 0.0, 0.0, -1.0]))


@pytest.mark.parametrize("tp", [0, 2, 3])
def test_real_columns_of_minus_infinity_have_probability_zero_and_make_no_nan(tp: int):
    for found in on_ranks(tp, _minus_infinity):
        for name, (value_error, gradient_error) in found.items():
            assert is_below(EXACT, (value_error, gradient_error)), name


def _minus_infinity() -> dict[str, tuple[float, float]]:
    """All columns but the last 21 are -inf, whole shards with them; dense autograd sees the rest only."""
    z, u = logits(1), logits(2)
    dead = torch.ones(V, dtype=torch.bool)
    dead[-21:] = False  # what is left lives on the last shard only
    label = torch.full((T,), int(LABELS[-1]))
    zd, ud = z[:, ~dead].requires_grad_(), u[:, ~dead]
    logp, logq = zd.log_softmax(1), ud.log_softmax(1)
    truth = {
        "logprobs": logp[:, -1],
        "entropy": -(logp.exp() * logp).sum(1),
        "cross_entropy": -(logq.exp() * logp).sum(1),
        "kl_to": (logp.exp() * (logp - logq)).sum(1),
    }
    found = {}
    for name, expected in truth.items():
        local, columns = shard(z.masked_fill(dead, -torch.inf))
        p = distribution(local.requires_grad_())
        q = distribution(shard(u.masked_fill(dead, -torch.inf))[0])
        value = p.logprobs(label) if name == "logprobs" else QUESTIONS[name](p, q)
        value.sum().backward()
        gradient = torch.zeros(T, V, dtype=torch.float64)
        gradient[:, ~dead] = torch.autograd.grad(expected.sum(), zd, retain_graph=True)[0]
        assert local.grad is not None
        here = local.grad[:, : columns.stop - columns.start]
        found[name] = (
            (value - expected).abs().max().item(),
            (here - gradient[:, columns]).abs().max().item(),
        )
    return found


def test_mass_on_an_impossible_column_costs_infinitely_much():
    z = torch.tensor([[0.0, -torch.inf, 1.0]])
    p = TokenDistribution.from_logits(z, vocab_size=3)
    q = TokenDistribution.from_logits(torch.zeros(1, 3), vocab_size=3)
    assert p.cross_entropy(q).item() == torch.inf
    assert q.kl_to(p).item() == torch.inf
    assert p.mean_logprob().item() == -torch.inf


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_reduced_in_float32(dtype: torch.dtype):
    z, u = logits(1).to(dtype).requires_grad_(), logits(2).to(dtype)
    p, q = (TokenDistribution.from_logits(x, vocab_size=V) for x in (z, u))
    value = p.cross_entropy(q.tilted(LABELS, 3.0)) + p.entropy()
    value.sum().backward()
    exact = z.detach().double().requires_grad_()
    truth = PRIMITIVES["tilted"][1](exact, u.double()) + PRIMITIVES["entropy"][1](exact, u.double())
    truth.sum().backward()
    assert z.grad is not None
    assert exact.grad is not None
    assert value.dtype == torch.float32
    assert z.grad.dtype == dtype
    torch.testing.assert_close(value.double(), truth, rtol=1e-6, atol=1e-6)  # float32 sums of 101 terms
    # the gradient is float32 rounded once to its dtype: half an ulp, plus float32 noise near zero
    torch.testing.assert_close(z.grad.double(), exact.grad, rtol=torch.finfo(dtype).eps, atol=1e-6)


def test_gradients_agree_with_finite_differences():
    u = logits(2)[:3, :7]
    ids = torch.tensor([0, 3, 6])

    def everything(z: torch.Tensor) -> torch.Tensor:
        p, q = (TokenDistribution.from_logits(x, vocab_size=7) for x in (z, u))
        tilted = p.cross_entropy(q.tilted(ids, 1.0, 0.1, 1e-3))
        return tilted * p.entropy() + p.kl_to(q.tempered(1.3)) * p.logprobs(ids) + p.mean_logprob()

    assert torch.autograd.gradcheck(everything, (logits(1)[:3, :7].clone().requires_grad_(),))


def test_a_target_gets_no_gradient_and_no_token_is_no_problem():
    z, u = logits(1).requires_grad_(), logits(2).requires_grad_()
    p, q = (TokenDistribution.from_logits(x, vocab_size=V) for x in (z, u))
    (p.kl_from(q) + p.kl_to(q) + p.cross_entropy(q.tilted(LABELS, 1.0))).sum().backward()
    assert z.grad is not None
    assert u.grad is None
    empty = TokenDistribution.from_logits(torch.zeros(0, V, requires_grad=True), vocab_size=V)
    assert empty.entropy().shape == (0,)


def test_an_answer_remembered_without_gradient_is_not_given_where_one_is_needed():
    z = logits(1).requires_grad_()
    p = TokenDistribution.from_logits(z, vocab_size=V)
    with torch.no_grad():
        p.entropy()
    assert p.entropy().requires_grad
    ids = LABELS.clone()
    first = p.logprobs(ids)
    ids += 0  # touched in place: what was remembered about it counts no more
    ids[0] = 1
    assert p.logprobs(ids)[0] != first[0]


@pytest.mark.parametrize("tp", [0, 2])
def test_ids_are_remembered_by_identity_until_they_change_and_never_after_they_are_gone(tp: int):
    assert all(on_ranks(tp, memory_of_ids))


def memory_of_ids() -> bool:
    local, _ = shard(logits(1))
    p, ids = distribution(local.requires_grad_()), LABELS.clone()
    first = p.logprobs(ids).detach()
    constant = p.detach()
    assert constant.logprobs(ids).equal(first)
    ids[0] = 1 - ids[0].clamp(max=1)  # also through a copy that was made before
    assert constant.logprobs(ids)[0] != first[0]
    assert p.detach().logprobs(ids)[0] != first[0]
    assert constant.logprobs(LABELS).equal(first)
    for i in range(V):  # each tensor is freed, and the next one may take its address
        assert p.logprobs(torch.full_like(LABELS, i)).equal(p.tempered(1.0).logprobs(LABELS * 0 + i))
    return True


def test_statistics_are_equal_where_they_ask_the_same_of_the_same_logits():
    z, u = (TokenDistribution.from_logits(logits(i), vocab_size=V)._source for i in (1, 2))
    ids, copy = LABELS.clone(), LABELS.clone()
    before = Pick(z, ids)
    different = [LogSumExp(z), LogSumExp(u), Total(z), Expectation(z, z), Expectation(z, u), Pick(z, copy)]
    assert len({*different, before, Pick(u, ids)}) == 8
    assert {*different, before} == {LogSumExp(z), *different[1:], Pick(z, ids)}
    assert about(before, {z: u}) == Pick(u, ids)
    ids[0] = 1
    assert Pick(z, ids) != before
    assert about(before, {z: u}) != Pick(u, ids), "an old answer is not about the new ids"
