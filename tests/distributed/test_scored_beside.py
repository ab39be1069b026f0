"""A response is judged while its engine still generates others; ranks share the work and know all rewards."""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from megatron_sftrl.config.rewards import RewardSection, RewardWorkersSection
from megatron_sftrl.data.prompts import PromptRow
from megatron_sftrl.observability.watch import Timers
from megatron_sftrl.types import Prompt, Rollout, RolloutGroup, SamplingParams
from tests.ranks import run_ranks

JUDGES = Path(__file__).parents[1] / "unit/rl/rewards/hostile.py"


def wait_for(file: Path) -> None:
    limit = time.monotonic() + 60
    while not file.exists():
        assert time.monotonic() < limit, "nothing is judged before it is asked for"
        time.sleep(0.01)


def answered(files: list[Path], is_ahead: bool) -> list[tuple[int, float | None, str]]:
    """On every rank: prompt, reward and outcome of the responses to a prompt of each rank, two each."""
    import torch.distributed as dist

    from megatron_sftrl.rl.rewards import RewardPool
    from megatron_sftrl.trainers.answers import Answers

    rank, world_size = dist.get_rank(), dist.get_world_size()

    def generate(prompts: list[Prompt], sampling: SamplingParams, on_response: Any) -> list[RolloutGroup]:
        groups = [
            RolloutGroup(
                prompt=prompt,
                rollouts=tuple(
                    Rollout(
                        prompt_tokens=prompt.tokens,
                        response_tokens=(prompt.id, number),
                        logprobs=(-1.0, -1.0),
                        is_finished=True,
                    )
                    for number in range(2)
                ),
                version=0,
            )
            for prompt in prompts
        ]
        mine = groups[rank]
        on_response(mine.prompt, 0, mine.rollouts[0])
        if not is_ahead:
            wait_for(files[rank])
        on_response(mine.prompt, 1, mine.rollouts[1])
        return groups

    section = RewardSection(name="tells_its_file", modules=[str(JUDGES)])
    rows = [PromptRow(tokens=(1,), values={"file": str(file)}, source="rows:1") for file in files]
    tokenizer: Any = SimpleNamespace(decode=lambda tokens: " ".join(map(str, tokens)))
    with RewardPool([section], RewardWorkersSection(num_workers=1)) as rewards:
        answers = Answers(
            SimpleNamespace(generate=generate),  # type: ignore[arg-type]
            tokenizer,
            SimpleNamespace(rank=rank, world_size=world_size),  # type: ignore[arg-type]
            rewards,
            SamplingParams(num_samples=2),
            "dr_grpo",
            Timers(),
        )
        with contextlib.closing(answers.ask(list(enumerate(rows)))) as asked:
            wait_for(files[rank])
            found = asked.responses()
            assert asked.responses() is found, "nothing is judged twice"
    return [(each.group, each.scored.reward, each.scored.outcome) for each in found]


@pytest.mark.parametrize("is_ahead", [False, True], ids=["while others end", "while something else is done"])
def test_ranks_judge_what_has_ended_while_they_wait_for_the_rest(is_ahead: bool, tmp_path: Path) -> None:
    files = [tmp_path / str(rank) for rank in range(2)]
    # Of the response "<prompt> <number>" the reward is 10 prompt + number.
    expected = [(0, 0.0, "ok"), (0, 1.0, "ok"), (1, 10.0, "ok"), (1, 11.0, "ok")]
    assert run_ranks(2, answered, files, is_ahead) == [expected] * 2
