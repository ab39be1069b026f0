"""Evaluations that cannot be compared are refused, whatever happened to the files after the check."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from megatron_sftrl.apps.compare.plan import Stage
from megatron_sftrl.apps.compare.results import _check_same_evaluation
from megatron_sftrl.errors import UserError

SETTINGS: dict[str, Any] = {
    "weights": "left by SFT",
    "prompts": "p",
    "demonstrations": None,
    "tokenizer": "t",
    "rewards": [{"name": "math"}],
    "samples": 4,
    "rollout": {"engine": "vllm", "temperature": 1.0},
    "dtype": "bf16",
}


def evaluations(root: Path, **changed: Any) -> list[Stage]:
    """After SFT, of two arms; the second one's settings are changed, and RL began with what SFT has left."""
    stages = []
    for arm, settings in (("sft", SETTINGS), ("gift", SETTINGS | changed)):
        folder = root / arm / "seed-0"
        for name in ("eval_sft", "grpo"):
            (folder / name).mkdir(parents=True)
        (folder / "eval_sft" / "results.json").write_text(json.dumps({"settings": settings}))
        origins = {"model.init_checkpoint": {"weights": SETTINGS["weights"]}}
        (folder / "grpo" / "origins.json").write_text(json.dumps(origins))
        stages.append(
            Stage(
                name=f"{arm}/seed-0/eval_sft", arm=arm, seed=0, kind="eval_sft", words=(), text="",
                done=folder / "eval_sft" / "results.json", needs=(),
            )
        )  # fmt: skip
    return stages


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("prompts", "others"),
        ("samples", 8),
        ("rewards", [{"name": "math", "strict": False}]),
        ("rollout", {"engine": "vllm", "temperature": 0.6}),
    ],
)
def test_evaluations_of_something_else_are_not_compared(tmp_path: Path, key: str, value: object) -> None:
    with pytest.raises(
        UserError, match=rf"gift/seed-0/eval_sft was evaluated with {key} .*cannot be compared"
    ):
        _check_same_evaluation(evaluations(tmp_path, **{key: value}))


def test_an_evaluation_of_other_weights_than_those_of_rl_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="gift/seed-0/eval_sft is of other weights than those with which"):
        _check_same_evaluation(evaluations(tmp_path, weights="of a run that was made again"))


def test_another_machines_engine_is_no_other_evaluation(tmp_path: Path) -> None:
    other = {"engine": "in_process", "temperature": 1.0}
    _check_same_evaluation(evaluations(tmp_path, rollout=other))
