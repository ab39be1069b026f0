"""Objectives on the policy alone and on a reference, against their equations on dense float64 logits, and by
hand."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from megatron_sftrl import LossOutput, TokenBatch, build_loss
from tests.unit.losses.batches import batch_of, inputs_for
from tests.unit.losses.test_golden import Columns, V, fused, with_logits

LENGTHS = [6, 9, 1, 5]
TOTAL = sum(LENGTHS)
ALL = Columns(group=None, start=0, stop=V, width=V + 3)


@dataclass(frozen=True, kw_only=True)
class Dense:
    """Whole logits of policy and reference, and the batch."""

    z: Tensor
    u: Tensor
    batch: TokenBatch

    @property
    def lp(self) -> Tensor:
        """[T] log pi(y)."""
        return pick(self.z.log_softmax(1), self.batch.labels)

    @property
    def ref(self) -> Tensor:
        """[T] log q(y)."""
        return pick(self.u.log_softmax(1), self.batch.labels)

    def rows(self) -> Iterator[tuple[int, list[int]]]:
        """Each loss token, and the loss tokens of its sequence."""
        edges = self.batch.cu_seqlens.tolist()
        for start, stop in itertools.pairwise(edges):
            places = [t for t in range(start, stop) if self.batch.loss_mask[t]]
            yield from ((t, places) for t in places)


def pick(logp: Tensor, labels: Tensor) -> Tensor:
    return logp[torch.arange(len(labels)), labels]


def entropy_of(probs: Tensor) -> Tensor:
    return -(probs * probs.log()).sum(1)


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p / q).log()).sum(1)


def asft(d: Dense, kl_weight: float = 0.1) -> Tensor:
    return -d.lp.exp().detach() * d.lp + kl_weight * kl(d.u.softmax(1), d.z.softmax(1))


def kd(
    d: Dense, direction: str = "forward", temperature: float = 1.0, top_k: int = V, alpha: float = 0.0
) -> Tensor:
    columns = d.u.topk(top_k, dim=1).indices
    q = (d.u.gather(1, columns) / temperature).softmax(1)
    p = (d.z.gather(1, columns) / temperature).softmax(1)
    divergence = kl(q, p) if direction == "forward" else kl(p, q)
    return (1 - alpha) * temperature**2 * divergence + alpha * -d.lp


def psft(d: Dense, clip_high: float = 0.28) -> Tensor:
    rho = (d.lp - d.ref).exp()
    return -torch.minimum(rho, rho.clamp(0.8, 1 + clip_high))


def iw_sft(d: Dense, tau: float = 1.0, max_weight: float = 16.0) -> Tensor:
    ratio = (d.lp - d.ref).detach()
    loss = torch.zeros_like(d.lp)
    for t, places in d.rows():
        loss[t] = -(tau * ratio[places].mean()).exp().clamp(0.0, max_weight) * d.lp[t]
    return loss


def ts_opsd(d: Dense, tau: float, direction: str = "reverse") -> Tensor:
    q, p = (d.u / tau).softmax(1), d.z.softmax(1)
    return kl(p, q) if direction == "reverse" else kl(q, p)


def chord_phi(d: Dense) -> Tensor:
    p = d.lp.exp().detach()
    return -p * (1 - p) * d.lp


def idft(
    d: Dense, lam: float = 1.0, beta: float = 1.0, gamma_min: float = 0.1, gamma_max: float = 2.0
) -> Tensor:
    phi = d.lp + entropy_of(d.z.softmax(1))
    g = 1 + lam * ((-phi / beta).exp().clamp(gamma_min, gamma_max) - 1)
    return -(d.lp.exp() ** g).detach() * d.lp


def eaft(d: Dense, top_k: int = 20) -> Tensor:
    top = d.z.topk(top_k, dim=1).values.softmax(1)
    return -(entropy_of(top) / math.log(top_k)).detach() * d.lp


def sed(d: Dense, tau: float, lam: float = 1.0, top_k: int = 2) -> Tensor:
    is_open = d.z.softmax(1).topk(top_k, dim=1).values.sum(1) < tau
    return -d.lp + torch.where(is_open, lam * (d.lp.exp() - 0.5) ** 2, 0.0)


def trsft(d: Dense, alpha: float = 0.1) -> Tensor:
    pi = d.lp.exp()
    return -pi / pi.detach().clamp(min=alpha)


def gem(d: Dense, beta: float = 0.7) -> Tensor:
    q = (d.z / beta).softmax(1).detach()
    return -(q * (d.lp[:, None] - d.z.log_softmax(1))).sum(1)


def aesl(d: Dense, tau: float) -> Tensor:
    loss = torch.zeros_like(d.lp)
    for t, places in d.rows():
        temperature = -tau * torch.stack([d.lp[i] for i in places if i <= t]).mean()
        weight = 1 - (d.z[t] / temperature).softmax(0)[d.batch.labels[t]]
        loss[t] = -weight.detach() * d.lp[t]
    return loss


Equation = Callable[..., Tensor]
CASES: list[tuple[Equation, dict]] = [
    (asft, {}),
    (asft, {"kl_weight": 0.7}),
    (kd, {}),
    (kd, {"direction": "reverse", "temperature": 2.0}),
    (kd, {"top_k": 8, "temperature": 1.5, "alpha": 0.3}),
    (kd, {"top_k": 8, "direction": "reverse"}),
    (ts_opsd, {"tau": 1.5}),
    (ts_opsd, {"tau": 3.0, "direction": "forward"}),
    (chord_phi, {}),
    (psft, {}),
    (psft, {"clip_high": 0.05}),
    (iw_sft, {}),
    (iw_sft, {"tau": 2.0, "max_weight": 1.2}),
    (idft, {}),
    (idft, {"lam": 0.4, "beta": 3.0, "gamma_min": 0.3, "gamma_max": 1.5}),
    (eaft, {}),
    (eaft, {"top_k": 5}),
    (sed, {"tau": 0.8}),
    (sed, {"tau": 0.9, "lam": 3.0, "top_k": 3}),
    (trsft, {}),
    (trsft, {"alpha": 0.5}),
    (gem, {}),
    (gem, {"beta": 1.6}),
    (aesl, {"tau": 1.0}),
    (aesl, {"tau": 0.25}),
]


def drawn() -> Dense:
    """Labels likely and unlikely, a reference on both sides of the policy, a mask with holes."""
    draw = torch.Generator().manual_seed(5)
    z = 2 * torch.randn(TOTAL, V, generator=draw, dtype=torch.float64)
    u = z + 0.5 * torch.randn(TOTAL, V, generator=draw, dtype=torch.float64)
    labels = torch.randint(V, (TOTAL,), generator=draw)
    boost = 7 + 4 * torch.randn(TOTAL, generator=draw, dtype=torch.float64)
    places = torch.arange(TOTAL)
    z[places, labels] += boost
    u[places, labels] += boost + 0.3 * torch.randn(TOTAL, generator=draw, dtype=torch.float64)
    mask = torch.rand(TOTAL, generator=draw) < 0.8
    mask[[0, 6, 8]] = False
    return Dense(z=z, u=u, batch=batch_of(labels, lengths=LENGTHS, mask=mask))


def names(case: tuple[Equation, dict]) -> str:
    return f"{case[0].__name__} {case[1]}"


@pytest.mark.parametrize("case", CASES, ids=names)
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_every_objective_is_its_equation_in_value_and_gradient(
    case: tuple[Equation, dict], dtype: torch.dtype, bound: float
):
    """float32 is fused with the output layer, in two passes and in one; errors of losses below 1 in nats."""
    equation, options = case
    dense = drawn()
    mask, weight = dense.batch.loss_mask, dense.batch.token_weight.double()
    z = dense.z.clone().requires_grad_()
    truth = equation(Dense(z=z, u=dense.u, batch=dense.batch), **options)
    (gradient,) = torch.autograd.grad((truth * weight * mask).sum(), z)
    loss = build_loss(equation.__name__, options)
    ours = (dense.z.to(dtype), dense.u.to(dtype), dense.batch, ALL)
    if dtype == torch.float64:
        paths = [with_logits(loss, *ours)]
    else:
        paths = [fused(loss, *ours, in_one_pass=each) for each in {False, loss.is_token_local}]
    for found in paths:
        error = (found.token_loss.double() - truth).abs()[mask].max() / truth.abs()[mask].max().clamp(min=1.0)
        assert error <= bound
        assert (found.gradient.double() - gradient).abs().max() / gradient.abs().max() <= bound
        assert (found.gradient[~mask] == 0).all()


def test_the_drawn_case_is_on_both_sides_of_every_bound():
    dense = drawn()
    inputs = inputs_for(dense.z, dense.u, dense.batch)
    shares = {
        "psft/clipped_share": build_loss("psft")(inputs),
        "iw_sft/capped_share": build_loss("iw_sft", {"max_weight": 1.2, "tau": 2.0})(inputs),
        "sed/open_share": build_loss("sed", {"tau": 0.8})(inputs),
        "trsft/outside_share": build_loss("trsft")(inputs),
    }
    for name, output in shares.items():
        share = output.metrics[name][dense.batch.loss_mask]
        assert set(share.tolist()) == {0.0, 1.0}, name
    gamma = build_loss("idft")(inputs).metrics["idft/gamma"][dense.batch.loss_mask]
    assert (gamma == 2.0).any()
    assert ((gamma > 0.1) & (gamma < 2.0)).any()


# By hand: distributions of three tokens, one row a token.

POLICY = [[0.5, 0.25, 0.25], [0.05, 0.45, 0.5], [0.25, 0.25, 0.5]]
LABELS = [0, 0, 1]  # 0.5, 0.05, 0.25


def by_hand(
    name: str,
    *,
    policy: list[list[float]] = POLICY,
    reference: list[list[float]] | None = None,
    lengths: list[int] | None = None,
    **options: object,
) -> tuple[LossOutput, Tensor]:
    """The loss, and the gradient of its sum in the logits log(policy)."""
    z = torch.tensor(policy, dtype=torch.float64).log().requires_grad_()
    u = None if reference is None else torch.tensor(reference, dtype=torch.float64).log()
    batch = batch_of(torch.tensor(LABELS), lengths=lengths)
    output = build_loss(name, options)(inputs_for(z, u, batch))
    (gradient,) = torch.autograd.grad(output.token_loss.sum(), z)
    return output, gradient


def assert_is(found: Tensor, expected: list) -> None:
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=1e-12)


def of_sft() -> Tensor:
    """[3, 3] pi - onehot(y)."""
    return torch.tensor(POLICY, dtype=torch.float64) - torch.nn.functional.one_hot(torch.tensor(LABELS), 3)


def test_eaft_learns_all_where_the_policy_is_undecided_and_nothing_where_it_is_sure():
    third = 1 / 3
    policy = [[third] * 3, [0.0, 1.0, 0.0], [0.5, 0.5, 0.0]]
    z = torch.tensor(policy, dtype=torch.float64).log().clamp(min=-60)
    output = build_loss("eaft")(inputs_for(z, batch=batch_of(torch.tensor([0, 1, 0]))))
    assert_is(output.metrics["eaft/weight"], [1.0, 0.0, math.log(2) / math.log(3)])
    assert_is(output.token_loss, [math.log(3), 0.0, math.log(2) ** 2 / math.log(3)])


def test_trsft_has_sfts_gradient_above_the_bound_and_its_share_below():
    output, gradient = by_hand("trsft")
    assert_is(output.token_loss, [-1.0, -0.5, -1.0])
    assert_is(output.metrics["trsft/outside_share"], [0.0, 1.0, 0.0])
    torch.testing.assert_close(gradient, of_sft() * torch.tensor([[1.0], [0.5], [1.0]], dtype=torch.float64))


def test_idft_is_dft_where_the_label_is_as_likely_as_a_sample():
    uniform = [[1 / 3] * 3] * 3
    assert_is(by_hand("idft", policy=uniform)[0].metrics["idft/gamma"], [1.0] * 3)
    assert_is(by_hand("idft", policy=uniform)[0].metrics["idft/weight"], [1 / 3] * 3)
    assert_is(by_hand("idft", lam=0.0)[0].metrics["idft/weight"], [0.5, 0.05, 0.25])
    # label 0.5 in (1/2, 1/4, 1/4), of entropy 1.5 ln 2: phi = 0.5 ln 2, g = 1 / sqrt(2)
    assert_is(by_hand("idft")[0].metrics["idft/gamma"][:1], [0.5**0.5])


def test_gem_pulls_towards_the_label_from_the_sharpened_policy():
    _, gradient = by_hand("gem", beta=0.5)  # squares of the probabilities: 4 : 1 : 1 and 1 : 1 : 4
    assert_is(gradient[0], [2 / 3 - 1, 1 / 6, 1 / 6])
    assert_is(gradient[2], [1 / 6, 1 / 6 - 1, 2 / 3])
    torch.testing.assert_close(by_hand("gem", beta=1.0)[1], of_sft())


def test_sed_asks_for_a_half_where_the_top_two_leave_room():
    output, _ = by_hand("sed", tau=0.8)  # masses 0.75, 0.95, 0.75
    assert_is(output.metrics["sed/top_mass"], [0.75, 0.95, 0.75])
    assert_is(output.token_loss, [-math.log(0.5), -math.log(0.05), -math.log(0.25) + 0.0625])
    assert_is(output.metrics["sed/open_share"], [1.0, 0.0, 1.0])


def test_aesl_weighs_by_the_policy_at_the_prefixs_own_temperature():
    output, _ = by_hand("aesl", tau=1 / math.log(2), lengths=[1, 2])
    # nll: 1 | log2 20, 2 (in units of ln 2), and with that T = 1 | log2 20, (log2 20 + 2) / 2
    hot = (math.log2(20) + 2) / 2
    powers = [p ** (1 / hot) for p in POLICY[2]]
    assert_is(output.metrics["aesl/temperature"], [1.0, math.log2(20), hot])
    assert_is(output.metrics["aesl/weight"][[0, 2]], [0.5, 1 - powers[1] / sum(powers)])
    assert_is(output.token_loss[:1], [0.5 * math.log(2)])


def test_aesl_has_a_temperature_where_all_of_the_prefix_is_certain():
    z = torch.full((2, 3), -1e4)
    z[:, 1] = 1e4
    output = build_loss("aesl", {"tau": 1.0})(inputs_for(z, batch=batch_of(torch.tensor([1, 1]))))
    assert output.metrics["aesl/weight"].tolist() == [0.0, 0.0]
    assert output.token_loss.tolist() == [0.0, 0.0]


def test_asft_is_dft_at_its_anchor_and_is_pulled_back_elsewhere():
    at_anchor, gradient = by_hand("asft", reference=POLICY)
    assert_is(at_anchor.metrics["asft/kl"], [0.0] * 3)
    torch.testing.assert_close(at_anchor.token_loss, by_hand("dft")[0].token_loss)
    torch.testing.assert_close(gradient, by_hand("dft")[1])
    away, gradient = by_hand("asft", reference=[[0.25, 0.25, 0.5]] * 3, kl_weight=2.0)
    assert_is(away.metrics["asft/kl"][:1], [0.25 * math.log(0.5) + 0.5 * math.log(2)])
    assert_is((gradient - by_hand("dft")[1])[0], [2 * 0.25, 0.0, -2 * 0.25])


def test_kd_by_hand_in_both_directions_and_on_the_teachers_two():
    teacher = [[0.25, 0.25, 0.5]] * 3
    forward, gradient = by_hand("kd", reference=teacher)
    assert_is(forward.token_loss[:1], [0.25 * math.log(0.5) + 0.5 * math.log(2)])
    assert_is(gradient[0], [0.25, 0.0, -0.25])  # pi - q
    reverse, _ = by_hand("kd", reference=teacher, direction="reverse")
    assert_is(reverse.token_loss[:1], [0.5 * math.log(2) + 0.25 * math.log(0.5)])
    teacher = [[0.3, 0.1, 0.6]] * 3
    top, _ = by_hand("kd", reference=teacher, top_k=2)  # (1/3, 2/3) against (2/3, 1/3)
    assert_is(top.token_loss[:1], [math.log(2) / 3])
    assert_is(top.metrics["kd/teacher_mass"], [0.9] * 3)
    same, gradient = by_hand("kd", reference=POLICY, temperature=2.0)
    assert_is(same.token_loss, [0.0] * 3)
    assert gradient.abs().max() < 1e-12
    assert_is(
        by_hand("kd", reference=teacher, alpha=1.0)[0].token_loss, [-math.log(p) for p in (0.5, 0.05, 0.25)]
    )


def test_psft_pushes_a_label_until_it_is_so_much_likelier_than_it_was():
    old = [[0.25, 0.5, 0.25], [0.1, 0.4, 0.5], [0.25, 0.25, 0.5]]  # ratios 2, 1/2, 1
    output, gradient = by_hand("psft", reference=old)
    assert_is(output.token_loss, [-1.28, -0.5, -1.0])
    assert_is(output.metrics["psft/clipped_share"], [1.0, 0.0, 0.0])
    torch.testing.assert_close(gradient, of_sft() * torch.tensor([[0.0], [0.5], [1.0]], dtype=torch.float64))


def test_iw_sft_weighs_whole_sequences():
    reference = [[0.25, 0.5, 0.25], [0.1, 0.4, 0.5], [0.25, 0.25, 0.5]]  # ratios 2 | 1/2, 1
    output, gradient = by_hand("iw_sft", reference=reference, lengths=[1, 2])
    assert_is(output.metrics["iw_sft/weight"], [2.0, 0.5**0.5, 0.5**0.5])
    assert_is(output.token_loss[:1], [2 * math.log(2)])
    torch.testing.assert_close(
        gradient, of_sft() * torch.tensor([[2.0], [0.5**0.5], [0.5**0.5]], dtype=torch.float64)
    )
    capped, _ = by_hand("iw_sft", reference=reference, lengths=[1, 2], max_weight=1.25)
    assert_is(capped.metrics["iw_sft/weight"][:1], [1.25])
    assert_is(capped.metrics["iw_sft/capped_share"], [1.0, 0.0, 0.0])
    unlikely, _ = by_hand("iw_sft", reference=[[0.01, 0.5, 0.49], *reference[1:]], lengths=[1, 2])
    assert_is(unlikely.metrics["iw_sft/weight"][:1], [16.0])  # 50 otherwise


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("sed", {}, "loss 'sed': tau: Field required"),
        ("aesl", {}, "loss 'aesl': tau: Field required"),
        ("idft", {"gamma_min": 3.0}, "gamma_min 3.0 is above gamma_max 2.0"),
        ("kd", {"top_k": 1}, "top_k"),
        ("psft", {"clip_low": 0.2}, "unknown option 'clip_low'"),
    ],
)
def test_what_has_no_meaning_is_refused(name: str, options: dict, message: str):
    with pytest.raises(ValueError, match=message):
        build_loss(name, options)
