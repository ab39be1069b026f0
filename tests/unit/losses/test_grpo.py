"""GRPO against its equations written out per token and dense; layouts must not change it."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from megatron_sftrl import LossInputs, TokenBatch, TokenDistribution, build_loss
from tests.ranks import run_ranks
from tests.unit.losses.batches import batch_of, inputs_for

V = 23  # divides by neither 2 nor 3
LENGTHS = [8, 4, 12, 4]  # multiples of 2 * cp for cp = 2
TOTAL = sum(LENGTHS)
VARIANTS = [
    {},
    {"clip_low": 0.1, "clip_high": 0.4, "dual_clip": 1.5},
    {"temperature": 0.7, "kl_coefficient": 0.3, "entropy_coefficient": 0.05},
    {"ratio": "sequence", "clip_low": 0.05, "clip_high": 0.08, "temperature": 1.3},
    {"objective": "cispo", "clip_low": 1.0, "clip_high": 0.3, "correction": "tis"},
    {"objective": "cispo", "ratio": "sequence", "kl_coefficient": 0.1, "kl_estimator": "k1"},
    {"clip_low": 1.0, "clip_high": None},
    {"correction": "icepop", "correction_cap": 1.4, "kl_coefficient": 0.2, "kl_estimator": "k2"},
]
EXACT = 1e-12  # float64 sums of a dozen terms


def data() -> tuple[Tensor, Tensor, TokenBatch]:
    """Policy and reference logits [T, V], and a packed batch whose ratios reach both sides of every bound."""
    source = torch.Generator().manual_seed(5)
    z = torch.randn(TOTAL, V, dtype=torch.float64, generator=source)
    u = z + 0.5 * torch.randn(TOTAL, V, dtype=torch.float64, generator=source)
    labels = torch.randint(V, (TOTAL,), generator=source)
    mask = torch.rand(TOTAL, generator=source) < 0.7
    mask[8:12] = torch.tensor([False, False, True, False])
    mask[-4:] = False  # a sequence that trains nothing
    lp = z.log_softmax(1).gather(1, labels[:, None]).squeeze(1)
    old = lp + 0.4 * torch.randn(TOTAL, dtype=torch.float64, generator=source)
    rollout = old + 0.5 * torch.randn(TOTAL, dtype=torch.float64, generator=source)
    advantages = torch.tensor([1.2, -0.7, -1.5, 0.3], dtype=torch.float64)
    batch = dataclasses.replace(
        batch_of(labels, lengths=LENGTHS, mask=mask),
        old_logprobs=old,
        rollout_logprobs=rollout,
        advantages=advantages.repeat_interleave(torch.tensor(LENGTHS)),
    )
    return z, u, batch


def dense_loss(z: Tensor, u: Tensor, batch: TokenBatch, options: dict) -> Tensor:
    """[T] METHODS section 5 with dense softmax and loops; 0 where masked. GSPO in the form of its eq. 5."""
    heat = options.get("temperature", 1.0)
    all_logprobs = (z / heat).log_softmax(1)
    lp = all_logprobs.gather(1, batch.labels[:, None]).squeeze(1)
    ref = (u / heat).log_softmax(1).gather(1, batch.labels[:, None]).squeeze(1)
    assert batch.old_logprobs is not None
    assert batch.rollout_logprobs is not None
    assert batch.advantages is not None
    low, high = 1 - options.get("clip_low", 0.2), options.get("clip_high", 0.2)
    high = math.inf if high is None else 1 + high
    cap, loss = options.get("correction_cap", 2.0), torch.zeros_like(lp)
    for start, stop in zip(batch.cu_seqlens[:-1].tolist(), batch.cu_seqlens[1:].tolist(), strict=True):
        here = [t for t in range(start, stop) if batch.loss_mask[t]]
        for t in here:
            ratio = (lp[t] - batch.old_logprobs[t]).exp()
            if options.get("ratio") == "sequence":
                ratio = torch.stack([lp[j] - batch.old_logprobs[j] for j in here]).mean().exp()
            advantage, k = batch.advantages[t], (batch.old_logprobs[t] - batch.rollout_logprobs[t]).exp()
            value = -min(ratio * advantage, min(max(ratio, low), high) * advantage)
            if options.get("objective") == "cispo":
                value = -min(max(ratio.item(), low), high) * advantage * lp[t]
            elif "dual_clip" in options and advantage < 0:
                value = min(value, -options["dual_clip"] * advantage)
            if options.get("correction") == "tis":
                value = min(k, cap) * value
            elif options.get("correction") == "icepop":
                value = value * k * (1 / cap <= k <= cap)
            if "kl_coefficient" in options:
                d = ref[t] - lp[t]
                k1, k2, k3 = -d, d**2 / 2, d.exp() - d - 1
                chosen = {"k1": k1, "k2": k2, "k3": k3}[options.get("kl_estimator", "k3")]
                value = value + options["kl_coefficient"] * (
                    chosen.item() + -d.item() * (lp[t] - lp[t].item())
                )
            entropy = -(all_logprobs[t].exp() * all_logprobs[t]).sum()
            loss[t] = value - options.get("entropy_coefficient", 0.0) * entropy
    return loss


def weights(batch: TokenBatch) -> Tensor:
    """[T] another weight for each sequence, as sequence_mean gives, so that a mix-up would show."""
    per_sequence = torch.tensor([0.3, 1.0, 0.1, 0.7], dtype=torch.float64)
    return per_sequence.repeat_interleave(torch.tensor(LENGTHS)) * batch.loss_mask


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_value_and_gradient_equal_the_equations_written_out(options: dict):
    z, u, batch = data()
    z.requires_grad_()
    output = build_loss("grpo", options)(inputs_for(z, u, batch))
    truth = dense_loss(z, u, batch, options)
    mask, weight = batch.loss_mask, weights(batch)
    torch.testing.assert_close(output.token_loss[mask], truth[mask], rtol=EXACT, atol=EXACT)
    (gradient,) = torch.autograd.grad((output.token_loss * weight).sum(), z)
    (expected,) = torch.autograd.grad((truth * weight).sum(), z)
    torch.testing.assert_close(gradient, expected, rtol=EXACT, atol=EXACT)
    assert all(value.isfinite().all() for value in output.metrics.values())


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_packed_sequences_equal_each_sequence_alone(options: dict):
    z, u, batch = data()
    packed = build_loss("grpo", options)(inputs_for(z, u, batch))
    for start, stop in zip(batch.cu_seqlens[:-1].tolist(), batch.cu_seqlens[1:].tolist(), strict=True):
        offsets = torch.tensor([0, stop - start], dtype=torch.int32)
        alone = batch.map(lambda value, a=start, b=stop: value[a:b], cu_seqlens=offsets)
        output = build_loss("grpo", options)(inputs_for(z[start:stop], u[start:stop], alone))
        mask = alone.loss_mask
        torch.testing.assert_close(
            output.token_loss[mask], packed.token_loss[start:stop][mask], rtol=EXACT, atol=EXACT
        )


def tensor_parallel_part(options: dict) -> tuple[Tensor, Tensor]:
    """Token losses and this rank's columns of the gradient, with huge padding columns."""
    z, u, batch = data()
    size, rank = dist.get_world_size(), dist.get_rank()
    width = -(-V // size)
    start, stop = rank * width, min((rank + 1) * width, V)

    def shard(logits: Tensor) -> Tensor:
        return torch.nn.functional.pad(logits[:, start:stop], (0, width - (stop - start)), value=1e30)

    group = dist.group.WORLD
    local = shard(z).requires_grad_()
    before = local.detach().clone()
    inputs = LossInputs(
        policy=TokenDistribution.from_logits(local, vocab_size=V, group=group),
        batch=batch,
        reference=TokenDistribution.from_logits(shard(u), vocab_size=V, group=group),
    )
    output = build_loss("grpo", options)(inputs)
    (output.token_loss * weights(batch)).sum().backward()
    assert local.grad is not None
    assert torch.equal(local.detach(), before), "the logits were modified"
    return output.token_loss.detach(), local.grad[:, : stop - start]


@pytest.mark.parametrize("tp", [1, 2, 3])
@pytest.mark.parametrize("options", [VARIANTS[1], VARIANTS[2], VARIANTS[3]], ids=str)
def test_every_split_of_the_vocabulary_gives_the_same_value_and_gradient(options: dict, tp: int):
    z, u, batch = data()
    z.requires_grad_()
    truth = dense_loss(z, u, batch, options)
    (expected,) = torch.autograd.grad((truth * weights(batch)).sum(), z)
    results = run_ranks(tp, tensor_parallel_part, options)
    for loss, _ in results:
        torch.testing.assert_close(
            loss[batch.loss_mask], truth.detach()[batch.loss_mask], rtol=EXACT, atol=EXACT
        )
    gradient = torch.cat([columns for _, columns in results], dim=1)
    torch.testing.assert_close(gradient, expected, rtol=EXACT, atol=EXACT)


def zigzag(cp: int, rank: int) -> Tensor:
    """Places in the whole pack of the tokens that a context-parallel rank holds."""
    places, start = [], 0
    for length in LENGTHS:
        chunks = torch.arange(start, start + length).chunk(2 * cp)
        places += [chunks[rank], chunks[2 * cp - 1 - rank]]
        start += length
    return torch.cat(places)


def context_parallel_part(options: dict) -> tuple[Tensor, Tensor, Tensor, dict[str, Tensor]]:
    """Places, token losses, gradient and metrics of this context-parallel rank."""
    z, u, whole = data()
    here = zigzag(dist.get_world_size(), dist.get_rank())
    batch = whole.map(lambda value: value[here], cu_seqlens=whole.cu_seqlens // dist.get_world_size())
    local = z[here].requires_grad_()
    inputs = LossInputs(
        policy=TokenDistribution.from_logits(local, vocab_size=V),
        reference=TokenDistribution.from_logits(u[here], vocab_size=V),
        batch=batch,
        cp_group=dist.group.WORLD,
    )
    output = build_loss("grpo", options)(inputs)
    (output.token_loss * weights(whole)[here]).sum().backward()
    assert local.grad is not None
    return here, output.token_loss.detach(), local.grad, output.metrics


@pytest.mark.parametrize("options", [VARIANTS[0], VARIANTS[3], VARIANTS[5]], ids=str)
def test_context_parallel_parts_equal_the_whole_in_value_gradient_and_metrics(options: dict):
    z, u, batch = data()
    output = build_loss("grpo", options)(inputs_for(z.requires_grad_(), u, batch))
    (gradient,) = torch.autograd.grad((output.token_loss * weights(batch)).sum(), z)
    seen = torch.zeros(TOTAL, dtype=torch.bool)
    for here, loss, part_gradient, metrics in run_ranks(2, context_parallel_part, options):
        mask = batch.loss_mask[here]
        seen[here] = True
        torch.testing.assert_close(loss[mask], output.token_loss.detach()[here][mask], rtol=EXACT, atol=EXACT)
        torch.testing.assert_close(part_gradient, gradient[here], rtol=EXACT, atol=EXACT)
        for name, value in metrics.items():
            whole = output.metrics[name][here][mask]
            torch.testing.assert_close(value[mask], whole, rtol=EXACT, atol=EXACT, msg=name)
    assert seen.all()


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_anything_may_stand_at_masked_positions(options: dict):
    z, u, batch = data()
    z.requires_grad_()
    clean = build_loss("grpo", options)(inputs_for(z, u, batch))
    (expected,) = torch.autograd.grad((clean.token_loss * weights(batch)).sum(), z)
    bad = torch.where(torch.arange(TOTAL) % 2 == 0, torch.inf, torch.nan)

    def spoiled(value: Tensor | None) -> Tensor:
        assert value is not None
        return torch.where(batch.loss_mask, value, bad)

    dirty = dataclasses.replace(
        batch,
        old_logprobs=spoiled(batch.old_logprobs),
        rollout_logprobs=spoiled(batch.rollout_logprobs),
        advantages=spoiled(batch.advantages),
    )
    output = build_loss("grpo", options)(inputs_for(z, u, dirty))
    assert output.token_loss.isfinite().all()
    assert all(value.isfinite().all() for value in output.metrics.values())
    (gradient,) = torch.autograd.grad((output.token_loss * weights(batch)).sum(), z)
    assert torch.equal(gradient, expected)  # the same operations on the same numbers


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_a_masked_label_that_the_policy_rules_out_spoils_nothing(options: dict):
    z, u, batch = data()
    z[~batch.loss_mask, batch.labels[~batch.loss_mask]] = -torch.inf
    z.requires_grad_()
    output = build_loss("grpo", options)(inputs_for(z, u, batch))
    assert output.token_loss.isfinite().all()
    assert all(value.isfinite().all() for value in output.metrics.values())
    (gradient,) = torch.autograd.grad((output.token_loss * weights(batch)).sum(), z)
    assert (gradient[~batch.loss_mask] == 0).all()


@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize("options", [{}, {"dual_clip": 3.0}, {"objective": "cispo"}, {"ratio": "sequence"}])
@pytest.mark.parametrize("old", [-1e4, -torch.inf, 1e4])
def test_a_ratio_beyond_any_number_leaves_loss_and_gradient_finite_in_fp32(
    options: dict, advantage: float, old: float
):
    z = torch.randn(6, V, generator=torch.Generator().manual_seed(1)).requires_grad_()
    batch = dataclasses.replace(
        batch_of(torch.arange(6)),
        old_logprobs=torch.full((6,), old),
        rollout_logprobs=torch.full((6,), -2.0),
        advantages=torch.full((6,), advantage),
    )
    output = build_loss("grpo", {**options, "correction": "tis"})(inputs_for(z, batch=batch))
    (gradient,) = torch.autograd.grad(output.token_loss.sum(), z)
    assert output.token_loss.isfinite().all()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_entropy_and_nll_are_those_of_what_is_sampled_from(temperature: float):
    z, _, batch = data()
    metrics = build_loss("grpo", {"temperature": temperature})(inputs_for(z, batch=batch)).metrics
    logprobs = (z / temperature).log_softmax(1)
    mask, nll = batch.loss_mask, -logprobs.gather(1, batch.labels[:, None]).squeeze(1)
    entropy = -(logprobs.exp() * logprobs).sum(1)
    torch.testing.assert_close(metrics["entropy"][mask], entropy[mask], rtol=EXACT, atol=EXACT)
    torch.testing.assert_close(metrics["nll"][mask], nll[mask], rtol=EXACT, atol=EXACT)


def small_batch(ratios: list[float], advantages: list[float], rollout: list[float]) -> LossInputs:
    """Uniform policy over V tokens; exp(old - rollout) as given."""
    z = torch.zeros(len(ratios), V, dtype=torch.float64)
    old = -math.log(V) - torch.tensor(ratios, dtype=torch.float64).log()
    batch = dataclasses.replace(
        batch_of(torch.zeros(len(ratios), dtype=torch.int64)),
        old_logprobs=old,
        rollout_logprobs=old - torch.tensor(rollout, dtype=torch.float64).log(),
        advantages=torch.tensor(advantages, dtype=torch.float64),
    )
    return inputs_for(z, batch=batch)


def test_clip_metrics_count_a_bound_only_where_it_acts():
    inputs = small_batch([0.5, 0.5, 1.0, 1.5, 1.5, 4.0], [1.0, -1.0, 1.0, 1.0, -1.0, -1.0], [1.0] * 6)
    metrics = build_loss("grpo", {"dual_clip": 3.0})(inputs).metrics
    assert metrics["grpo/clip_low"].tolist() == [0, 1, 0, 0, 0, 0]
    assert metrics["grpo/clip_high"].tolist() == [0, 0, 0, 1, 0, 0]
    assert metrics["grpo/clip_dual"].tolist() == [0, 0, 0, 0, 0, 1]
    torch.testing.assert_close(metrics["grpo/ratio"][3].item(), 1.5, rtol=1e-12, atol=0)
    either = build_loss("grpo", {"objective": "cispo"})(inputs).metrics
    assert either["grpo/clip_low"].tolist() == [1, 1, 0, 0, 0, 0]
    assert either["grpo/clip_high"].tolist() == [0, 0, 0, 1, 1, 1]


def test_without_bounds_the_loss_is_the_ratio_times_the_advantage() -> None:
    z, _, batch = data()
    policy = TokenDistribution.from_logits(z, vocab_size=V)
    output = build_loss("grpo", {"clip_low": 1.0, "clip_high": None})(LossInputs(policy=policy, batch=batch))
    lp = z.log_softmax(1).gather(1, batch.labels[:, None]).squeeze(1)
    assert batch.old_logprobs is not None
    assert batch.advantages is not None
    expected = -(lp - batch.old_logprobs).exp() * batch.advantages
    mask = batch.loss_mask
    torch.testing.assert_close(output.token_loss[mask], expected[mask], rtol=0, atol=EXACT)
    assert not output.metrics["grpo/clip_high"].any()


def test_dual_clip_bounds_the_loss_of_a_negative_advantage_and_no_other():
    inputs = small_batch([10.0, 10.0, 0.5], [-2.0, 1.0, -2.0], [1.0] * 3)
    loss = build_loss("grpo", {"dual_clip": 3.0})(inputs).token_loss
    # c |A| = 6; clipped at 1.2; pessimistic bound at 0.8, below c
    torch.testing.assert_close(
        loss, torch.tensor([6.0, -1.2, 1.6], dtype=torch.float64), rtol=1e-12, atol=0
    )  # float64 rounding of exp(log)


def test_tis_truncates_and_icepop_drops_and_both_say_where():
    k = [0.3, 0.8, 1.5, 5.0]
    inputs = small_batch([1.0] * 4, [1.0] * 4, k)
    tis = build_loss("grpo", {"correction": "tis"})(inputs).metrics
    icepop = build_loss("grpo", {"correction": "icepop"})(inputs).metrics
    none = build_loss("grpo")(inputs).metrics
    rounding = {"rtol": 1e-12, "atol": 0.0}  # exp(log) in float64
    for metrics, expected in ((tis, [0.3, 0.8, 1.5, 2.0]), (icepop, [0.0, 0.8, 1.5, 0.0]), (none, [1.0] * 4)):
        truth = torch.tensor(expected, dtype=torch.float64)
        torch.testing.assert_close(metrics["grpo/correction_weight"], truth, **rounding)
    assert tis["grpo/correction_limited"].tolist() == [0, 0, 0, 1]
    assert icepop["grpo/correction_limited"].tolist() == [1, 0, 0, 1]
    apart = torch.tensor(k, dtype=torch.float64).log().abs()
    torch.testing.assert_close(none["grpo/rollout_difference"], apart, **rounding)


@pytest.mark.parametrize(("correction", "capped"), [("tis", 2.0), ("icepop", 0.0)])
def test_probability_zero_is_a_weight_and_never_nan(correction: str, capped: float):
    """A token impossible for the trainer, for the engine, for both; then one that is possible for both."""
    inputs = small_batch([1.0] * 4, [1.0] * 4, [1.0] * 4)
    nothing, logprob = -torch.inf, -math.log(V)
    batch = dataclasses.replace(
        inputs.batch,
        old_logprobs=torch.tensor([nothing, logprob, nothing, logprob], dtype=torch.float64),
        rollout_logprobs=torch.tensor([logprob, nothing, nothing, logprob], dtype=torch.float64),
    )
    inputs = dataclasses.replace(inputs, batch=batch)
    output = build_loss("grpo", {"correction": correction})(inputs)
    torch.testing.assert_close(
        output.metrics["grpo/correction_weight"].tolist(), [0.0, capped, 0.0, 1.0], rtol=1e-12, atol=0
    )  # exp(log 2) in float64
    assert output.metrics["grpo/rollout_difference"].tolist() == [torch.inf] * 3 + [0.0]
    assert output.token_loss.isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dual_clip": 3.0, "objective": "cispo"}, "dual_clip belongs to objective clip, got cispo"),
        ({"kl_estimator": "k1"}, "kl_estimator has no effect while kl_coefficient is 0"),
        ({"correction_cap": 3.0}, "correction_cap has no effect while correction is none"),
        ({"dual_clip": 1.0}, "dual_clip: Input should be greater than 1"),
        ({"temperature": 0.0}, "temperature: Input should be greater than 0"),
        ({"clip_hihg": 0.3}, r"unknown option 'clip_hihg' \(did you mean 'clip_high'\?\)"),
    ],
)
def test_an_option_that_could_do_nothing_or_harm_is_refused(options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        build_loss("grpo", options)


def test_the_reference_and_the_engines_logprobs_are_needed_only_where_they_are_used():
    assert build_loss("grpo").needs == ("advantages", "old_logprobs")
    assert build_loss("grpo", {"kl_coefficient": 0.1}).needs[2:] == ("reference",)
    assert build_loss("grpo", {"correction": "tis"}).needs[2:] == ("rollout_logprobs",)
    z, _, batch = data()
    with pytest.raises(ValueError, match="'grpo' needs reference, got none: add a `reference` section"):
        build_loss("grpo", {"kl_coefficient": 0.1})(inputs_for(z, batch=batch))
    with pytest.raises(ValueError, match="'grpo' needs advantages, got none: it is filled by the rollout"):
        build_loss("grpo")(inputs_for(z))
