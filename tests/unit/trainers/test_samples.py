"""rollouts.jsonl holds the first groups of a step, as many as asked for."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from megatron_sftrl.data.prompts import PromptRow
from megatron_sftrl.rl.rewards import Part, Scored
from megatron_sftrl.trainers.experience import Response
from megatron_sftrl.trainers.rollouts import SampleLog
from megatron_sftrl.types import Rollout


def response(group: int) -> Response:
    return Response(
        group=group,
        row=PromptRow(tokens=(1,), values={}, source="rows.jsonl:1"),
        rollout=Rollout(prompt_tokens=(1,), response_tokens=(2,), logprobs=(-1.0,), is_finished=True),
        scored=Scored(reward=0.0, lenient=0.0, parts=()),
    )


@pytest.mark.parametrize(("num_groups", "written"), [(0, []), (1, [7, 7]), (2, [7, 7, 9]), (5, [7, 7, 9, 3])])
def test_whole_groups_are_written_and_not_more_than_asked_for(
    num_groups: int, written: list[int], tmp_path: Path
) -> None:
    tokenizer: Any = cast(Any, SimpleNamespace(decode=str))
    log = SampleLog(tmp_path / "rollouts.jsonl", tokenizer, num_groups=num_groups, resume_step=0)
    log.write(1, [response(group) for group in (7, 9, 7, 3)])
    lines = (tmp_path / "rollouts.jsonl").read_text().splitlines()
    assert [json.loads(line)["group"] for line in lines] == written


def test_the_file_says_what_became_of_each_verification(tmp_path: Path) -> None:
    tokenizer: Any = cast(Any, SimpleNamespace(decode=str))
    log = SampleLog(tmp_path / "rollouts.jsonl", tokenizer, num_groups=1, resume_step=0)
    parts = (Part(name="math", outcome="ok", reward=1.0), Part(name="judge", outcome="timeout"))
    log.write(1, [replace(response(7), scored=Scored(reward=None, lenient=None, parts=parts))])
    row = json.loads((tmp_path / "rollouts.jsonl").read_text())
    assert (row["reward"], row["rewards"]) == (None, {"math": 1.0, "judge": None})
    assert row["outcomes"] == {"math": "ok", "judge": "timeout"}
