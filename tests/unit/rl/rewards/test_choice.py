r"""multiple_choice on what answers look like: strictly, a letter where a letter was asked for."""

from __future__ import annotations

import pytest

from megatron_sftrl.config.rewards import RewardSection
from megatron_sftrl.errors import UserError
from megatron_sftrl.rl.rewards import RewardOutput, build_rewards
from tests.unit.rl.rewards.samples import sample

OPTIONS = ["Paris", "Rome", "a cat", r"$\frac{1}{2}$"]


def judged(response: str, **row) -> RewardOutput:
    (reward,) = build_rewards([RewardSection(name="multiple_choice")])
    asked = sample(response, **row)
    reward.check_row(asked.row)
    return reward(asked)


@pytest.mark.parametrize(
    ("response", "strict", "lenient"),
    [
        (r"Rome is far, so \boxed{B}.", "B", "B"),
        (r"\boxed{\text{(B)}}", "B", "B"),
        (r"\boxed{b.}", "B", "B"),
        (r"\boxed{\mathbf{B}}", "B", "B"),
        (r"\boxed{B. Rome}", "B", "B"),
        (r"\boxed{B. Paris}", None, "B"),  # contradictory: strictly no answer
        ("Answer: B", "B", "B"),
        ("**Answer:** (B)", "B", "B"),
        ("Final answer: **B**.", "B", "B"),
        ("Answer: $B$", "B", "B"),
        (r"Answer: \boxed{B}", "B", "B"),
        ("Answer: C\nNo, wait.\nAnswer: B", "B", "B"),
        ("Answer: C\nNo, wait. " + r"\boxed{B}", "B", "B"),
        (r"\boxed{C}, no." + "\nAnswer: B", "B", "B"),
        (r"\boxed{A, B}", None, "B"),
        (r"\boxed{A} or \boxed{B}", None, "B"),
        (r"\boxed{Rome}", None, "B"),
        (r"\boxed{\frac{1}{2}}", None, "D"),
        ("Answer: a cat", None, "C"),
        ("Answer: A cat", None, "C"),
        ("It must be this one:\nRome.", None, "B"),
        ("The answer is (B), since A is wrong", None, "B"),
        ("The answer is B because A and C are wrong.", None, "B"),
        ("Option B, not A.", None, "B"),
        ("Therefore, A is correct.", None, "A"),
        ("A cat is no city. B", None, "B"),
        ("I think that it is B. A good guess", None, "B"),
        ("The answer is a matter of taste", None, None),
        ("The answer is A or B", None, "B"),
        (r"\boxed{E}", None, None),  # there are four options
        ("E", None, None),
        ("Answer: Because", None, None),
        ("<think>Answer: A</think>Answer: B", "B", "B"),
        ("<think>Answer: B", None, None),
        (r"so \boxed{", None, None),
        ("", None, None),
    ],
)
def test_the_letter_that_is_read(response: str, strict: str | None, lenient: str | None) -> None:
    for gold in "ABCD":
        found = judged(response, answer=gold, options=OPTIONS)
        assert (found.reward, found.lenient) == (float(gold == strict), float(gold == lenient)), found
        assert found.answer == strict
        assert found.metrics == {"answered": float(strict is not None)}


def test_without_options_a_row_has_the_letters_a_to_j() -> None:
    assert judged(r"\boxed{J}", answer="J").reward == 1.0
    assert judged("So K, J", answer="J").lenient == 1.0
    assert judged(r"\boxed{J. ten}", answer="J").reward == 0.0


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"answer": 1}, "`answer` to be a letter from A to J, got 1"),
        ({"answer": "E", "options": OPTIONS}, "a letter from A to D, got 'E'"),
        ({"answer": "AB"}, "got 'AB'"),
        ({"answer": "A", "options": {"A": "x"}}, "`options` to be a list of texts"),
    ],
)
def test_a_row_without_a_letter_of_its_options_is_refused(row: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        judged("", **row)
