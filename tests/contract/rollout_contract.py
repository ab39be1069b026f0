"""What every rollout engine promises, checked on any engine, model and layout.

`observe` runs on every rank: it makes a policy, has an engine built for it, updates it twice with different
weights, generates in every way, and returns what it saw. `RolloutContract` holds the promises; a test class
of an engine inherits them and says, for each scenario, what was observed.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
import torch
from torch import Tensor

from megatron_sftrl.types import Prompt, Rollout, RolloutGroup, SamplingParams
from tests.contract.models import VOCAB_SIZE, Versions, greedy_tokens, scores
from tests.distributed.engine_outputs import engine_config

if TYPE_CHECKING:
    from megatron_sftrl.engine.policy import PolicyEngine
    from megatron_sftrl.rollout.api import RolloutEngine

MakeEngine = Callable[["PolicyEngine"], "RolloutEngine"]


def _prompts() -> tuple[Prompt, ...]:
    """Numbers far from 0, 1, 2; one prompt within a block of any cache, others over several blocks."""
    generator = torch.Generator().manual_seed(3)
    lengths = (40, 1, 23, 150, 7)
    return tuple(
        Prompt(
            id=10 + 7 * i, tokens=tuple(torch.randint(VOCAB_SIZE, (length,), generator=generator).tolist())
        )
        for i, length in enumerate(lengths)
    )


PROMPTS = _prompts()
MAX_LENGTH = 256  # of prompt and response, for every engine here
GREEDY = SamplingParams(temperature=0.0, max_new_tokens=8)
PLAIN = SamplingParams(max_new_tokens=8, num_samples=3, seed=5)
SAMPLINGS = {
    "greedy": GREEDY,
    "plain": PLAIN,
    "again": PLAIN,
    "other_seed": replace(PLAIN, seed=6),
    "hot": replace(PLAIN, temperature=1.4),
    "cold": replace(PLAIN, temperature=0.6),
    "top_p": replace(PLAIN, temperature=0.8, top_p=0.6),
    "top_k": replace(PLAIN, temperature=1.2, top_k=5),
    "top_k_and_p": replace(PLAIN, temperature=1.3, top_k=12, top_p=0.7),
    "stop": replace(PLAIN, stop_ids=frozenset(range(0, VOCAB_SIZE, 8)), max_new_tokens=10),
    "stop_text": replace(PLAIN, stop=("bb", "bcb", "a"), stop_ids=frozenset({8}), max_new_tokens=10),
}


def decode(ids: Sequence[int]) -> str:
    """A text in which stop texts are frequent, most of them over several tokens."""
    return "".join("a" if i % 16 == 0 else "b" if i % 3 else "c" for i in ids)


@dataclass(frozen=True)
class Observations:
    """Of one rank.

    Args:
        groups: of all PROMPTS, for each of SAMPLINGS; and of some of them in another order.
        told: of SAMPLINGS, what this rank was told of while others were generated: (id of the prompt, number,
            response), in that order.
        logits: of every group's responses, [response tokens, V] each, from the policy's own forward over
            prompt and response; empty before the last pipeline stage.
        refused: what was said about bad prompts.
        disturbed: what of the process had changed after the engine was used.
        diverged: what was said when the policy's weights were NaN.
    """

    groups: dict[str, list[RolloutGroup]]
    told: dict[str, list[tuple[int, int, Rollout]]]
    logits: dict[str, list[Tensor]]
    refused: dict[str, str]
    disturbed: list[str]
    diverged: str


def observe(make_engine: MakeEngine, directories: Sequence[Path], parallel: dict[str, Any]) -> Observations:
    """Build, update, generate; on every rank.

    Args:
        make_engine: engine for the policy; pickled by reference.
        directories: two versions of the weights.
        parallel: layout of the trainer.
    """
    from megatron.core import parallel_state

    from megatron_sftrl.engine.parallel import initialize_parallel
    from megatron_sftrl.engine.policy import PolicyEngine
    from megatron_sftrl.models import architecture_of

    config = engine_config(directories[0], parallel, "fp32")
    context = initialize_parallel(config.parallel)
    policy = PolicyEngine(architecture_of(config.model), config, context, with_optimizer=False)
    torch.manual_seed(17)
    before = _process()
    engine = make_engine(policy)
    refused = {}
    groups: dict[str, list[RolloutGroup]] = {}
    for version, directory in enumerate(directories):
        load(policy, directory)
        engine.update(policy, version=version)
        groups[f"greedy_{version}"] = engine.generate(PROMPTS, GREEDY)
        if version < len(directories) - 1:
            engine.sleep()
    told: dict[str, list[tuple[int, int, Rollout]]] = {name: [] for name in SAMPLINGS}
    for name, sampling in SAMPLINGS.items():
        groups[name] = engine.generate(
            PROMPTS,
            sampling,
            lambda prompt, number, rollout, name=name: told[name].append((prompt.id, number, rollout)),
        )
    groups["backwards"] = engine.generate(PROMPTS[::-1], PLAIN)
    groups["alone"] = engine.generate(PROMPTS[2:3], PLAIN)
    groups["none"] = engine.generate([], PLAIN)
    for name, prompt in BAD_PROMPTS.items():
        refused[name] = _refusal(engine, [PROMPTS[0], prompt])
    groups["after_refusals"] = engine.generate(PROMPTS, PLAIN)
    after = _process()
    logits = {name: _response_logits(policy, groups[name]) for name in (*SAMPLINGS, "greedy_1")}
    diverged = _diverged(engine, policy)
    engine.close()
    parallel_state.destroy_model_parallel()
    return Observations(
        groups=groups,
        told=told,
        logits=logits,
        refused=refused,
        disturbed=[name for name in before if before[name] != after[name]],
        diverged=diverged,
    )


BAD_PROMPTS = {
    "empty": Prompt(id=901, tokens=()),
    "too_long": Prompt(id=902, tokens=(3,) * (MAX_LENGTH - PLAIN.max_new_tokens + 1)),
    "foreign": Prompt(id=903, tokens=(3, VOCAB_SIZE)),
}


def load(policy: PolicyEngine, directory: Path) -> None:
    """Other weights for a policy, whatever its layout."""
    from megatron_sftrl.engine.live_weights import load_hf_weights
    from megatron_sftrl.models.hf_weights import open_weights

    with open_weights(directory) as weights:
        load_hf_weights(policy.chunks, weights, policy.architecture, policy.parallel)


def _refusal(engine: RolloutEngine, prompts: Sequence[Prompt]) -> str:
    try:
        engine.generate(prompts, PLAIN)
    except ValueError as error:
        return str(error)
    return ""


@torch.no_grad()
def _diverged(engine: RolloutEngine, policy: PolicyEngine) -> str:
    """What the rollouts' check says once every weight is NaN."""
    from megatron_sftrl.trainers.answers import check_groups

    for chunk in policy.chunks:
        for parameter in chunk.parameters():
            parameter.fill_(torch.nan)
    engine.update(policy, version=len(SAMPLINGS))
    try:
        check_groups(engine.generate(PROMPTS, PLAIN), PROMPTS, size=PLAIN.num_samples)
    except FloatingPointError as error:
        return str(error)
    return ""


def _process() -> dict[str, object]:
    """What the rest of a job relies on."""
    owners = (torch, torch.Tensor, torch.accelerator, torch.cuda, torch.distributed)
    return {
        "torch generator": torch.get_rng_state().tolist(),
        "numpy generator": str(np.random.get_state()),
        "random": random.getstate(),
        "threads": torch.get_num_threads(),
        "default dtype": torch.get_default_dtype(),
        "gradients": torch.is_grad_enabled(),
        "environment": dict(os.environ),
        **{f"{owner.__name__}.{name}": id(value) for owner in owners for name, value in vars(owner).items()},
    }


def _response_logits(policy: PolicyEngine, groups: Sequence[RolloutGroup]) -> list[Tensor]:
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    sequences = [[*rollout.prompt_tokens, *rollout.response_tokens] for rollout in rollouts]
    logits = whole_logits(policy, sequences)
    return [
        rows[len(rollout.prompt_tokens) - 1 : len(rollout.prompt_tokens) + len(rollout.response_tokens) - 1]
        for rows, rollout in zip(logits, rollouts, strict=bool(logits))
    ]


@torch.no_grad()
def whole_logits(policy: PolicyEngine, sequences: Sequence[list[int]]) -> list[Tensor]:
    """[T, V] fp32 of each sequence, from the forward that training runs; empty before the last stage."""
    import torch.distributed as dist

    from megatron_sftrl.engine.context_parallel import local_rows
    from megatron_sftrl.engine.schedule import LastStageInput, as_megatron_loss, run_schedule
    from megatron_sftrl.types import TokenBatch

    context = policy.parallel
    # What follows a token changes nothing before it; cp and sequence parallelism want multiples of 4.
    padded = [[*tokens, *[0] * (-len(tokens) % 4)] for tokens in sequences]
    lengths = [len(tokens) for tokens in padded]
    tokens = torch.tensor([token for each in padded for token in each])
    batch = TokenBatch(
        tokens=tokens,
        labels=tokens,
        positions=torch.cat([torch.arange(length) for length in lengths]),
        loss_mask=torch.ones(len(tokens), dtype=torch.bool),
        cu_seqlens=torch.tensor([0, *lengths]).cumsum(0).int(),
        token_weight=torch.ones(len(tokens)),
    )

    def gather(stage: LastStageInput) -> tuple[Tensor, Tensor, Tensor]:
        local = stage.model.logits(stage.hidden_states)  # [T/cp, V_padded/tp]
        columns = [torch.empty_like(local) for _ in range(context.tp_size)]
        dist.all_gather(columns, local.contiguous(), group=context.tp_group)
        rows = local_rows(stage.lengths, cp_rank=context.cp_rank, cp_size=context.cp_size)
        whole = torch.zeros(len(tokens), policy.architecture.vocab_size)
        whole[rows] = torch.cat(columns, dim=1)[:, : policy.architecture.vocab_size].float()
        dist.all_reduce(whole, group=context.cp_group)
        return as_megatron_loss(local.new_zeros(()), whole)

    with policy.evaluation():
        found = run_schedule(policy.wrapped, [batch] * context.pp_size, gather, context, forward_only=True)
    if not found:
        return []
    return [rows[: len(each)] for rows, each in zip(found[0].split(lengths), sequences, strict=True)]


@dataclass(frozen=True)
class Observed:
    """A scenario: the model, and what every rank saw."""

    versions: Versions
    ranks: list[Observations]

    @property
    def first(self) -> Observations:
        return self.ranks[0]

    def tokens(self, name: str) -> list[list[tuple[int, ...]]]:
        """Of each group's responses, by rank 0."""
        return [[rollout.response_tokens for rollout in group.rollouts] for group in self.first.groups[name]]

    def logprob_errors(self, name: str) -> Tensor:
        """|engine - trainer| of every response token, nats, at the temperature and before any cut."""
        temperature = SAMPLINGS[name].temperature or 1.0
        errors = []
        for rollout, logits in zip(self._rollouts(name), self.logits(name), strict=True):
            ids = torch.tensor(rollout.response_tokens)[:, None]
            expected = (logits.double() / temperature).log_softmax(dim=1).gather(1, ids)[:, 0]
            errors.append((torch.tensor(rollout.logprobs, dtype=torch.float64) - expected).abs())
        return torch.cat(errors)

    def fp32_error(self, name: str) -> float:
        """Largest |fp32 - float64| of transformers, for the same tokens at the same temperature, nats."""
        rollouts = self._rollouts(name)
        single, double = (
            scores(
                self.versions.directories[-1],
                [(*each.prompt_tokens, *each.response_tokens) for each in rollouts],
                temperature=SAMPLINGS[name].temperature or 1.0,
                dtype=dtype,
            )
            for dtype in (torch.float32, torch.float64)
        )
        return max(
            float((one - two)[len(each.prompt_tokens) - 1 :].abs().max())
            for one, two, each in zip(single, double, rollouts, strict=True)
        )

    def probabilities_before(self, name: str) -> Tensor:
        """For each response token: what the likelier tokens hold together, after temperature and top_k."""
        sampling = SAMPLINGS[name]
        found = []
        for rollout, logits in zip(self._rollouts(name), self.logits(name), strict=True):
            ids = torch.tensor(rollout.response_tokens)[:, None]
            ranked, order = (logits.double() / sampling.temperature).sort(dim=1, descending=True)
            if sampling.top_k:
                ranked[:, sampling.top_k :] = -torch.inf
            held = ranked.softmax(dim=1)
            before = torch.where(ranked.isfinite(), held.cumsum(dim=1) - held, torch.inf)
            found.append(before.gather(1, (order == ids).int().argmax(dim=1)[:, None])[:, 0])
        return torch.cat(found)

    def logits(self, name: str) -> list[Tensor]:
        return next(rank.logits[name] for rank in self.ranks if rank.logits[name])

    def _rollouts(self, name: str) -> list[Any]:
        return [rollout for group in self.first.groups[name] for rollout in group.rollouts]


class RolloutContract:
    """The promises. A subclass gives a fixture `observed` of each scenario, and its tolerance.

    Args:
        tolerance: nats, for logits near 1.
    """

    tolerance: float

    def test_one_rank_is_told_of_each_response_when_it_has_ended(self, observed: Observed) -> None:
        orders = []
        for name in SAMPLINGS:
            told = [each for rank in observed.ranks for each in rank.told[name]]
            assert sorted(told, key=lambda each: each[:2]) == [
                (group.prompt.id, number, rollout)
                for group in sorted(observed.first.groups[name], key=lambda group: group.prompt.id)
                for number, rollout in enumerate(group.rollouts)
            ]
            assert all(rank.told[name] for rank in observed.ranks), "a rank would have nothing to do"
            orders.append([each[:2] for each in told] == sorted(each[:2] for each in told))
        assert not all(orders), "all come at the end, in order"

    @pytest.mark.parametrize("version", [0, 1])
    def test_greedy_tokens_are_those_of_transformers(self, observed: Observed, version: int) -> None:
        """The second time after an update, with prompts that the engine has in its cache."""
        expected = greedy_tokens(
            observed.versions.directories[version],
            [prompt.tokens for prompt in PROMPTS],
            num_new=GREEDY.max_new_tokens,
        )
        assert observed.tokens(f"greedy_{version}") == [[tokens] for tokens in expected]

    def test_the_two_versions_of_the_weights_differ(self, observed: Observed) -> None:
        assert observed.tokens("greedy_0") != observed.tokens("greedy_1")
        assert {group.version for group in observed.first.groups["greedy_0"]} == {0}
        assert {group.version for group in observed.first.groups["plain"]} == {1}

    @pytest.mark.parametrize("name", SAMPLINGS)
    def test_reported_log_probabilities_are_the_trainers_before_any_cut(
        self, observed: Observed, name: str
    ) -> None:
        error = float(observed.logprob_errors(name).max())
        # Dividing logits by a temperature below 1 enlarges their rounding with them.
        allowed = self.tolerance / min(SAMPLINGS[name].temperature or 1.0, 1.0)
        if observed.versions.has_large_logits:
            # fp32 has no more to give: engine and trainer are each as good as transformers.
            allowed = max(allowed, 2 * observed.fp32_error(name))
        assert error <= allowed

    @pytest.mark.parametrize("name", ["top_p", "top_k", "top_k_and_p"])
    def test_no_token_outside_the_cut_is_drawn_and_some_at_its_edge_are(
        self, observed: Observed, name: str
    ) -> None:
        before = observed.probabilities_before(name)
        sampling = SAMPLINGS[name]
        # Whether a token at the very edge is kept is a question of rounding in fp32.
        assert before.max() <= sampling.top_p + 1e-5
        # Greedy or a cut that is too tight would never come near the edge.
        assert before.max() >= 0.5 * min(sampling.top_p, 0.6)

    def test_the_temperature_spreads_the_tokens(self, observed: Observed) -> None:
        """Mean log-probability at temperature 1 of what was drawn falls as the temperature rises."""
        means = []
        for name in ("cold", "plain", "hot"):
            pairs = zip(
                [tokens for group in observed.tokens(name) for tokens in group],
                observed.logits(name),
                strict=True,
            )
            means.append(
                torch.cat([x.log_softmax(1).gather(1, torch.tensor(t)[:, None]) for t, x in pairs]).mean()
            )
        assert means[0] > means[1] > means[2]

    def test_a_seed_repeats_its_samples_and_another_draws_others(self, observed: Observed) -> None:
        assert observed.tokens("plain") == observed.tokens("again") == observed.tokens("after_refusals")
        for one, other in zip(observed.tokens("plain"), observed.tokens("other_seed"), strict=True):
            assert not set(one) & set(other)

    def test_the_samples_of_a_prompt_differ(self, observed: Observed) -> None:
        for group in observed.tokens("plain"):
            assert len(set(group)) == len(group) == PLAIN.num_samples

    def test_neither_the_order_nor_the_number_of_prompts_changes_a_response(self, observed: Observed) -> None:
        assert observed.tokens("backwards")[::-1] == observed.tokens("plain")
        assert observed.tokens("alone") == observed.tokens("plain")[2:3]
        assert observed.tokens("none") == []

    def test_groups_come_in_the_order_of_the_prompts_on_every_rank(self, observed: Observed) -> None:
        for name, groups in observed.first.groups.items():
            assert all(rank.groups[name] == groups for rank in observed.ranks)
        asked = {name: PROMPTS for name in SAMPLINGS} | {"backwards": PROMPTS[::-1], "alone": PROMPTS[2:3]}
        for name, prompts in asked.items():
            groups = observed.first.groups[name]
            assert [group.prompt for group in groups] == list(prompts)
            for group in groups:
                assert {rollout.prompt_tokens for rollout in group.rollouts} == {group.prompt.tokens}

    def test_a_response_ends_with_the_first_stop_id_or_at_its_length(self, observed: Observed) -> None:
        sampling = SAMPLINGS["stop"]
        finished = 0
        for group in observed.first.groups["stop"]:
            for rollout in group.rollouts:
                *body, last = rollout.response_tokens
                assert not sampling.stop_ids & set(body)
                assert rollout.is_finished == (last in sampling.stop_ids)
                assert rollout.is_finished or len(rollout.response_tokens) == sampling.max_new_tokens
                assert len(rollout.logprobs) == len(rollout.response_tokens)
                finished += rollout.is_finished
        assert 0 < finished < len(PROMPTS) * sampling.num_samples
        assert not any(
            rollout.is_finished for group in observed.first.groups["plain"] for rollout in group.rollouts
        )

    def test_a_response_ends_with_the_token_that_completes_a_stop_text(self, observed: Observed) -> None:
        """The tokens are those of the same seed without ends, up to that one."""
        sampling, ends = SAMPLINGS["stop_text"], []
        for group, whole in zip(observed.first.groups["stop_text"], observed.tokens("plain"), strict=True):
            for rollout, tokens in zip(group.rollouts, whole, strict=True):
                found = rollout.response_tokens
                shared = min(len(found), len(tokens))
                assert found[:shared] == tokens[:shared]
                assert len(rollout.logprobs) == len(found)
                text, before = decode(found), decode(found[:-1])
                assert not any(each in before for each in sampling.stop)
                is_end = any(each in text for each in sampling.stop) or found[-1] in sampling.stop_ids
                assert rollout.is_finished == is_end
                assert is_end or len(found) == sampling.max_new_tokens
                ends.append(next((each for each in sampling.stop if each in text), ""))
        assert any(len(each) > 1 for each in ends)

    @pytest.mark.parametrize(
        ("name", "said"),
        [
            ("empty", "prompt 901 is empty"),
            ("too_long", f"prompt 902 has {MAX_LENGTH - PLAIN.max_new_tokens + 1} tokens and with"),
            ("foreign", f"prompt 903 has token ids from 3 to {VOCAB_SIZE}, the model has 0 to 100"),
        ],
    )
    def test_a_bad_prompt_is_refused_by_name_on_every_rank(
        self, observed: Observed, name: str, said: str
    ) -> None:
        assert all(said in rank.refused[name] for rank in observed.ranks)

    def test_a_policy_that_has_diverged_gives_no_responses_on_any_rank(self, observed: Observed) -> None:
        assert all("are NaN or infinite" in rank.diverged for rank in observed.ranks)

    def test_the_rest_of_the_process_does_not_notice(self, observed: Observed) -> None:
        assert [rank.disturbed for rank in observed.ranks] == [[] for _ in observed.ranks]
