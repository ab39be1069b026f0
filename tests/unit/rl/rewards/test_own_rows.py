"""Before a run its rewards are held against its own rows: what they cannot read is named."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_sftrl.config.rewards import RewardSection, RewardWorkersSection
from megatron_sftrl.rl.rewards import (
    OwnRow,
    RewardPool,
    build_rewards,
    check_own_rows,
    spread,
    unearned_marks,
)
from megatron_sftrl.rl.rewards.registry import Json

HOSTILE = str(Path(__file__).with_name("hostile.py"))
SUM = {"source_dataset": "chain_sum"}


def tried(rows: list[dict[str, Json]], *sections: dict) -> list[str]:
    """What the check notes of rewards on rows."""
    made = [RewardSection.model_validate(section) for section in sections]
    own = [OwnRow(source=f"rl.jsonl:{i}", prompt="3 + 4 =", values=row) for i, row in enumerate(rows, 1)]
    with RewardPool(made, RewardWorkersSection(num_workers=1, memory_gb=1)) as pool:
        return check_own_rows(pool, own)


def test_the_built_in_rewards_give_full_credit_to_answers_in_the_form_that_they_read() -> None:
    math_rows: list[dict[str, Json]] = [
        {"answer": value}
        for value in ("7 + 7 = 14\n#### 1,234", r"So $\boxed{\frac{1}{2}}$", "(1, 2)", "Monday", 18)
    ]
    assert tried(math_rows, {"name": "math"}) == []
    assert tried(math_rows, {"name": "math", "formats": ["hashes"]}) == []
    exact: list[dict[str, Json]] = [{"answer": "New York"}, {"answer": 7}, {"answer": ["a", "b"]}]
    assert tried(exact, {"name": "exact_match"}, {"name": "format"}) == []
    gym: list[dict[str, Json]] = [{"question": "3 + 4 =", "answer": "7", "metadata": {**SUM}}]
    assert tried(gym, {"name": "reasoning_gym"}, {"name": "length", "max_tokens": 9, "cache": 3}) == []


def test_a_row_that_its_verifier_can_never_find_right_is_named() -> None:
    rows: list[dict[str, Json]] = [{"answer": "4"}, {"answer": "a\nb"}]
    with pytest.raises(ValueError, match=r"^rl.jsonl:2: expected reward 'exact_match' to give 1 to"):
        tried(rows, {"name": "exact_match"})


def test_a_reward_that_fails_on_every_row_is_refused_with_its_first_error() -> None:
    rows: list[dict[str, Json]] = [{"answer": "1"}, {"answer": "2"}]
    with pytest.raises(
        ValueError,
        match=r"^rl.jsonl:1: reward 'hostile' failed on 'number': error: UserError: expected the reward to "
        r"return a RewardOutput, got float; it failed on all 1 rows",
    ):
        tried([{"answer": "number"}], {"name": "hostile", "modules": [HOSTILE]})
    with pytest.raises(ValueError, match=r"reward 'broken' failed on '1': error: ImportError"):
        tried(rows, {"name": "length", "max_tokens": 2, "cache": 1}, {"name": "broken", "modules": [HOSTILE]})


def test_a_reward_of_unknown_form_that_fails_on_some_rows_only_is_noted() -> None:
    rows: list[dict[str, Json]] = [{"answer": "1"}, {"answer": "nan"}, {"answer": None, "other": 1}]
    notes = tried(rows, {"name": "hostile", "modules": [HOSTILE]})
    assert [note.split(": ")[0] for note in notes] == ["rl.jsonl:2", "rl.jsonl:3"]
    assert "failed on '3 + 4 ='" in notes[1]


BAD: dict[str, tuple[str, dict[str, Json], str]] = {
    "metadata as text": (
        "reasoning_gym",
        {"answer": "7", "metadata": '{"source_dataset": "chain_sum"}'},
        "expected `metadata` to be an object, got str: .* parse it",
    ),
    "an unknown task": (
        "reasoning_gym",
        {"answer": "7", "metadata": {"source_dataset": "chain_sums"}},
        r"to name a task of reasoning_gym, got 'chain_sums' \(did you mean 'chain_sum'\?\)",
    ),
    "no task": ("reasoning_gym", {"answer": "7", "metadata": {}}, "to name a task .* got None"),
    "a whole number": (
        "reasoning_gym",
        {"answer": 7, "metadata": {**SUM}},
        "expected `answer` of task 'chain_sum' to be text, as the library writes it, got 7",
    ),
    "no answer": ("reasoning_gym", {"answer": None, "metadata": {**SUM}}, "to be text, .* got None"),
    "a truth value": ("exact_match", {"answer": True}, "a whole number or a list of them, got True"),
    "a fraction": ("exact_match", {"answer": 7.0}, "got 7.0; write it as the text"),
    "an object": ("exact_match", {"answer": {"value": "7"}}, "to be text, a whole number"),
    "an empty text": ("exact_match", {"answer": " . "}, "to hold a text"),
    "an empty list": ("exact_match", {"answer": []}, "to hold a text"),
    "a list": ("math", {"answer": ["1", "2"]}, "expected row.answer to be text or a number, got list"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_row_that_a_reward_cannot_read_is_refused_by_the_rewards_name(name: str) -> None:
    reward, row, message = BAD[name]
    (made,) = build_rewards([RewardSection(name=reward)])
    with pytest.raises(ValueError, match=f"reward '{reward}' cannot read the row: .*{message}"):
        made.check_row(row)


def test_rows_are_tried_evenly_over_the_data() -> None:
    assert spread(3, 8) == [0, 1, 2]
    assert spread(100, 4) == [0, 25, 50, 75]


def test_a_reward_that_pays_for_nothing_or_for_the_prompt_in_every_row_is_noted(tmp_path: Path) -> None:
    module = tmp_path / "holes.py"
    module.write_text(_HOLES)
    holes = [{"name": name, "modules": [str(module)]} for name in ("prefix", "copies")]
    sound = [{"name": "math"}, {"name": "exact_match"}, {"name": "length", "max_tokens": 9, "cache": 3}]
    sections = [RewardSection.model_validate(section) for section in (*holes, *sound)]
    rows: list[dict[str, Json]] = [{"answer": "4"}, {"answer": "3"}]
    own = [OwnRow(source="", prompt="4 or 3?", values=row) for row in rows]
    with RewardPool(sections, RewardWorkersSection(num_workers=1)) as pool:
        assert unearned_marks(pool, own) == [
            "reward 'prefix' gives 1 or more to the empty text in all 2 rows that were tried, and "
            "a policy may learn that in place of the answers",
            "reward 'copies' gives 2 or more to the prompt in all 2 rows that were tried, and "
            "a policy may learn that in place of the answers",
        ]
        zeros = [OwnRow(source="", prompt="what is left?", values={"answer": "0"})]
        assert len(unearned_marks(pool, zeros)) == 1
        assert unearned_marks(pool, [*own, OwnRow(source="", prompt="?", values={"answer": "x"})])[1:] == []


_HOLES = """
from megatron_sftrl import RewardOutput, register_reward


@register_reward("prefix")
def prefix(inputs, config):
    'Every text begins with the empty one.'
    return RewardOutput(reward=float(inputs.row["answer"].startswith(inputs.response)))


@register_reward("copies")
def copies(inputs, config):
    'The prompt names the answers to choose from.'
    return RewardOutput(reward=2.0 * (inputs.row["answer"] in inputs.response))
"""
