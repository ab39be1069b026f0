"""rollout.share_prompts: a prompt computed once for its responses, loss, gradients and log-probabilities are
those of transformers, which computes every sequence on its own."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_sftrl.config.schema import BatchSection, RunConfig
from megatron_sftrl.data.prompts import PromptRow
from megatron_sftrl.models.tensors import Region
from megatron_sftrl.rl.rewards import Scored
from megatron_sftrl.types import Rollout
from tests.distributed.engine_outputs import _hf_parts, _loaded_policy, engine_config
from tests.distributed.hf_models import VOCAB_SIZE, WINDOW, save_model, saved_gradients
from tests.distributed.test_families_against_transformers import largest_difference
from tests.grid import cases
from tests.ranks import run_ranks

# Of each group: tokens of the prompt, and of each response. Below and beyond a window, of one token alone;
# of similar length, so that attention to two of them is one call.
GROUPS = [(2 * WINDOW + 5, (40, 1, 7, 6)), (12, (20, 3, 21)), (1, (5, 4)), (WINDOW, (2, 3)), (8, (2,))]
MAX_TOKENS = 80  # the first group does not fit, and is cut
SEQUENCE = {"tp": 2, "sequence_parallel": True}
FULL = {"recompute": "full"}
RUNS: dict[str, tuple[str, int, dict[str, Any], dict[str, Any]]] = {
    "one process": ("qwen3", 1, {}, {}),
    "recomputed": ("qwen3", 1, {}, FULL),
    "sp2": ("qwen3", 2, SEQUENCE, {}),
    "pp2": ("qwen3", 2, {"pp": 2}, {}),
    "vp2 recomputed": ("smollm3", 2, {"pp": 2, "vp": 2}, FULL),
    "cp2": ("qwen3", 2, {"cp": 2}, {}),
    "dp2": ("qwen3", 2, {}, {}),
    "sp2 cp2": ("qwen3", 4, {**SEQUENCE, "cp": 2}, {}),
    "a window in all layers": ("mistral", 1, {}, {}),
    "windows, cp2": ("olmo3", 2, {"cp": 2}, {}),
    "windows with positions of their own": ("gemma3_text", 1, {}, {}),
    "norms over all heads, two ropes": ("olmo3", 2, SEQUENCE, {}),
    "layers without positions": ("smollm3", 1, {}, {}),
    "part of a head turns": ("glm4", 1, {}, {}),
    "queries that grow": ("ministral3", 1, {}, {}),
    "queries that grow, cp2": ("ministral3", 2, {"cp": 2}, {}),
    "latent attention": ("deepseek_v3", 1, {}, {}),
    "latent attention, sp2 cp2": ("mistral4", 4, {**SEQUENCE, "cp": 2}, {}),
    "a mixture, ep2": ("qwen3_moe", 2, {"ep": 2}, {}),
    "norms over all heads, a part of each turns": ("minimax_m2", 1, {}, {}),
    "sinks": ("gpt_oss", 1, {}, {}),
    "sinks, cp2": ("gpt_oss", 2, {"cp": 2}, {}),
}
SELDOM = (
    "recomputed", "pp2", "dp2", "sp2 cp2", "a window in all layers", "windows with positions of their own",
    "norms over all heads, two ropes", "part of a head turns", "queries that grow", "latent attention",
    "latent attention, sp2 cp2", "norms over all heads, a part of each turns", "sinks, cp2",
)  # fmt: skip


def sequences() -> list[tuple[int, tuple[int, ...], tuple[int, ...]]]:
    """Group, prompt and response of each."""
    generator = torch.Generator().manual_seed(3)

    def drawn(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(0, VOCAB_SIZE, (count,), generator=generator).tolist())

    prompts = [drawn(length) for length, _ in GROUPS]
    return [
        (group, prompts[group], drawn(length))
        for group, (_, lengths) in enumerate(GROUPS)
        for length in lengths
    ]


@dataclass(frozen=True, kw_only=True)
class Shared:
    """Of one rank: nats by place and learned token, and its parts of the gradients of the mean nll."""

    loss: float
    logprobs: dict[int, list[float]]
    gradients: dict[str, list[tuple[Region, Tensor]]]
    num_tokens: int


def step(config: RunConfig, is_shared: bool) -> Shared:
    from megatron.core import parallel_state

    from megatron_sftrl.losses.registry import build_loss
    from megatron_sftrl.models import architecture_of
    from megatron_sftrl.trainers.checked import batch_layout
    from megatron_sftrl.trainers.experience import ExperienceBatches, Response, score_responses

    architecture = architecture_of(config.model)
    context, policy = _loaded_policy(config, architecture, with_optimizer=True)
    responses = [
        Response(
            group=group,
            row=PromptRow(tokens=prompt, values={}, source="rows.jsonl:1"),
            rollout=Rollout(
                prompt_tokens=prompt,
                response_tokens=response,
                logprobs=(0.0,) * len(response),
                is_finished=True,
            ),
            scored=Scored(reward=0.0, lenient=0.0, parts=()),
            advantage=1.0,
        )
        for group, prompt, response in sequences()
    ]
    data = ExperienceBatches(
        batch=BatchSection(global_size=len(responses), packing=True, max_tokens=MAX_TOKENS),
        layout=batch_layout(config, dp_rank=context.dp_rank, dp_size=context.dp_size),
        max_length=64,
        pad_id=0,
        mask_truncated=False,
        shares_prompts=is_shared,
    ).lay_out(responses)
    assert data is not None
    logprobs = score_responses(policy, data)
    report = policy.forward_backward(data.batches, build_loss("sft", {}))
    grads = {
        id(p): p.main_grad  # type: ignore[attr-defined]
        for chunk in policy.chunks
        for p in chunk.parameters()
        if p.requires_grad
    }
    found = Shared(
        loss=report.loss,
        logprobs=logprobs,
        gradients=_hf_parts(policy, architecture, grads),
        num_tokens=data.num_tokens,
    )
    parallel_state.destroy_model_parallel()
    return found


class Truth:
    """A model of transformers, one sequence after the other."""

    def __init__(self, name: str, directory: Path) -> None:
        self.directory = directory
        model = save_model(name, directory)
        self.logprobs: list[list[float]] = []
        nats = []
        for _, prompt, response in sequences():
            whole = torch.tensor([*prompt, *response])
            logits = model(whole[None]).logits[0, len(prompt) - 1 : -1]
            found = -F.cross_entropy(logits.float(), whole[len(prompt) :], reduction="none")
            nats.append(found)
            self.logprobs.append(found.tolist())
        loss = -torch.cat(nats).mean()
        loss.backward()
        self.loss = float(loss)
        self.gradients = saved_gradients(model, directory / "gradients")


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("shared")


_TRUTHS: dict[str, Truth] = {}


def truth_of(name: str, root: Path) -> Truth:
    """Made when it is first asked for."""
    if name not in _TRUTHS:
        _TRUTHS[name] = Truth(name, root / name)
    return _TRUTHS[name]


def run(
    truth: Truth, world_size: int, parallel: dict[str, Any], train: dict[str, Any], *, is_shared: bool
) -> list[Shared]:
    config = engine_config(truth.directory, parallel, "fp32")
    config = config.model_copy(update={"train": config.train.model_copy(update=train)})
    return run_ranks(world_size, step, config, is_shared)


@pytest.mark.parametrize("name", cases(RUNS, rarely=SELDOM))
def test_responses_behind_one_copy_of_their_prompt_are_those_of_transformers(name: str, root: Path) -> None:
    family, world_size, parallel, train = RUNS[name]
    truth = truth_of(family, root)
    ranks = run(truth, world_size, parallel, train, is_shared=True)
    for rank in ranks:
        assert rank.loss == pytest.approx(truth.loss, rel=1e-6)
        for place, expected in enumerate(truth.logprobs):
            assert rank.logprobs[place] == pytest.approx(expected, abs=1e-5)
    difference = largest_difference([rank.gradients for rank in ranks], truth.gradients)
    print(f"{name}: gradients differ by {difference:.1e} of the largest")
    assert difference < 1e-5


def test_fewer_tokens_are_computed(root: Path) -> None:
    truth = truth_of("qwen3", root)
    shared, whole = (run(truth, 1, {}, {}, is_shared=is_shared)[0].num_tokens for is_shared in (True, False))
    assert whole == sum(len(prompt) + len(response) - 1 for _, prompt, response in sequences())
    first, *others = [((length - 1), len(responses)) for length, responses in GROUPS]
    # The first group's 36 + 54 tokens are in two parts, each with the prompt.
    assert shared == whole - first[0] * (first[1] - 2) - sum(each * (count - 1) for each, count in others)
