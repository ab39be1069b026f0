"""What the one pass promises beyond the golden values: which tokens it looks at, and where gradients go."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from megatron_sftrl import LossInputs, LossOutput, TokenBatch, TokenDistribution
from megatron_sftrl.losses.registry import Registry, build_loss, register_loss
from megatron_sftrl.vocab_parallel import OutputLayer
from megatron_sftrl.vocab_parallel.one_pass import TokenValues, one_pass

T, V, H = 11, 13, 5


def make_layer(seed: int = 0, **fields) -> OutputLayer:
    generator = torch.Generator().manual_seed(seed)
    hidden, weight = (
        torch.randn(n, H, generator=generator, dtype=torch.float64).requires_grad_() for n in (T, V)
    )
    # Three tokens at a time.
    return OutputLayer(hidden=hidden, weight=weight, chunk_bytes=3 * V * 8, **fields)


def make_batch(loss_mask: Tensor) -> TokenBatch:
    labels = torch.arange(T) % V
    return TokenBatch(
        tokens=labels,
        labels=labels,
        positions=torch.arange(T),
        loss_mask=loss_mask,
        cu_seqlens=torch.tensor([0, T], dtype=torch.int32),
        token_weight=loss_mask.double() / 7,
    )


def to_distribution(logits: Tensor) -> TokenDistribution:
    return TokenDistribution.from_logits(logits, vocab_size=V, is_scratch=True)


def several_questions(policy: TokenDistribution, reference: object, batch: TokenBatch):
    """Each evaluated on its own, the second at another temperature: two backwards read the same logits."""
    loss = policy.tempered(2.0).entropy() - policy.logprobs(batch.labels) * policy.mean_logprob()
    return loss, {"probability": policy.logprobs(batch.labels).detach().exp()}


def dense(layer: OutputLayer, batch: TokenBatch) -> Tensor:
    logps = (layer.hidden @ layer.weight.T).log_softmax(-1)
    hot = (layer.hidden @ layer.weight.T / 2.0).log_softmax(-1)
    picked = logps.gather(1, batch.labels[:, None]).squeeze(1)
    loss = -(hot.exp() * hot).sum(-1) - picked * logps.mean(-1)
    return (loss * batch.token_weight).sum()


def run(layer: OutputLayer, mask: Tensor, function=several_questions) -> TokenValues:
    return one_pass(function, layer, None, make_batch(mask), to_distribution)


def test_scratch_logits_are_right_for_a_loss_that_asks_several_times() -> None:
    mask = torch.arange(T) % 3 != 1
    ours, truth = make_layer(), make_layer()
    found, expected = run(ours, mask), dense(truth, make_batch(mask))
    found.total.backward()
    expected.backward()
    torch.testing.assert_close(found.total, expected)
    torch.testing.assert_close(ours.hidden.grad, truth.hidden.grad)
    torch.testing.assert_close(ours.weight.grad, truth.weight.grad)


def test_tokens_without_weight_never_meet_the_vocabulary() -> None:
    seen: list[Tensor] = []

    def loss(policy: TokenDistribution, reference: object, batch: TokenBatch):
        seen.append(batch.tokens)
        return -policy.logprobs(batch.labels), {"one": torch.ones_like(batch.token_weight)}

    mask = torch.arange(T) > 3
    layer = make_layer()
    found = run(layer, mask, loss)
    found.total.backward()
    assert torch.cat(seen).tolist() == [*range(4, T)]
    assert len(seen) == 3
    assert found.metrics["one"].tolist() == mask.double().tolist()
    assert layer.hidden.grad is not None
    assert (layer.hidden.grad[:4] == 0).all()
    assert (layer.hidden.grad[4:] != 0).all()


def test_a_microbatch_without_loss_tokens_gives_zeros_and_every_metric() -> None:
    layer = make_layer()
    found = run(layer, torch.zeros(T, dtype=torch.bool))
    found.total.backward()
    assert found.total == 0
    assert found.metrics["probability"].tolist() == [0.0] * T
    assert layer.hidden.grad is not None
    assert layer.weight.grad is not None
    assert not layer.hidden.grad.any()
    assert not layer.weight.grad.any()


def test_the_weights_gradient_is_added_to_megatrons_buffer() -> None:
    mask = torch.ones(T, dtype=torch.bool)
    truth = make_layer()
    run(truth, mask).total.backward()
    assert truth.weight.grad is not None
    buffer = torch.full((V, H), 2.0, dtype=torch.float64)
    layer = make_layer(main_grad=buffer)
    run(layer, mask).total.backward()
    torch.testing.assert_close(buffer - 2.0, truth.weight.grad)
    # What Megatron's hook wants to see: a gradient that it need not add, and that costs no memory.
    assert layer.weight.grad is not None
    assert layer.weight.grad.untyped_storage().nbytes() == 8
    assert layer.weight.grad_added_to_main_grad  # type: ignore[attr-defined]

    tied = make_layer(main_grad=buffer, is_shared=True)
    run(tied, mask).total.backward()
    assert tied.weight.grad is None, "the embedding's gradient is still to come"


def test_without_gradients_nothing_is_kept() -> None:
    layer = make_layer()
    with torch.no_grad():
        found = run(layer, torch.ones(T, dtype=torch.bool))
    assert not found.total.requires_grad
    torch.testing.assert_close(
        found.total, dense(layer, make_batch(torch.ones(T, dtype=torch.bool))).detach()
    )


def test_a_loss_that_is_no_token_local_one_is_told_so() -> None:
    registry = Registry()

    @register_loss("wrong", token_local=True, registry=registry)
    def wrong(inputs: LossInputs, config: object) -> LossOutput:
        return LossOutput(token_loss=inputs.sequences.mean(-inputs.policy.logprobs(inputs.batch.labels)))

    loss = build_loss("wrong", registry=registry)

    def of_tokens(policy: TokenDistribution, reference: object, batch: TokenBatch):
        return loss(LossInputs(policy=policy, batch=batch, is_part=True)).token_loss, {}

    with pytest.raises(ValueError, match=r"token_local=True asked for inputs\.sequences"):
        run(make_layer(), torch.ones(T, dtype=torch.bool), of_tokens)


@pytest.mark.parametrize(
    ("name", "options", "is_local"),
    [
        ("sft", {}, True),
        ("gift", {}, True),
        ("curiosft", {}, True),
        ("pear", {}, False),
        ("grpo", {}, True),
        ("grpo", {"ratio": "sequence"}, False),
    ],
)
def test_a_loss_says_whether_it_is_token_local(name: str, options: dict, is_local: bool) -> None:
    assert build_loss(name, options).is_token_local == is_local
