"""The reward `math` on answers of which it is known whether they are right: the ways in which data sets write
them, and ways to be paid for an answer that was not given."""

from __future__ import annotations

from pathlib import Path

import pytest

from megatron_sftrl.rl.rewards import RewardInputs
from megatron_sftrl.rl.rewards.math import MathConfig, math
from megatron_sftrl.rl.rewards.math_answers import are_equal
from tests.unit.rl.rewards.samples import sample

ANSWERS = Path(__file__).with_name("math_answers.tsv")


def strict(response: str, answer: object, **options: object) -> float:
    """The strict reward of a response that is known to be harmless."""
    inputs: RewardInputs = sample(response, answer=answer)  # type: ignore[arg-type]
    return math(inputs, MathConfig.model_validate(options)).reward


# Lines of: equal or not, the right answer, another one.
PAIRS = [line.split("\t") for line in ANSWERS.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(("gold", "answer"), [pair[1:] for pair in PAIRS if pair[0] == "equal"])
def test_answers_of_one_value_are_equal_however_they_are_written(gold: str, answer: str) -> None:
    assert are_equal(gold, answer, decimals=6)


@pytest.mark.parametrize(("gold", "answer"), [pair[1:] for pair in PAIRS if pair[0] == "not"])
def test_answers_of_other_values_and_answers_with_a_way_out_are_not_equal(gold: str, answer: str) -> None:
    assert not are_equal(gold, answer, decimals=6)


# A response, the right answer, and what it earns.
READ = [
    # the last box counts; a heading behind it does not
    ("\\boxed{18}\n\n#### Verification\nIt fits.", "18", 1),
    ("\\boxed{18}\n#### Explanation of the result", "18", 1),
    ("\\boxed{18}\n#### Step 2: check\nIt fits.", "18", 1),
    ("\\boxed{18}\n#### 2. Check\nIt fits.", "18", 1),
    ("\\boxed{18}\n#### 2. Check\nIt fits.", "2", 0),
    ("\\boxed{18}\n#### 3 ways to check\nIt fits.", "3", 0),
    ("\\boxed{Monday}\n#### Verification", "Monday", 1),
    ("#### 18\n\n#### Verification\nIt fits.", "18", 1),
    ("\\boxed{4}\n#### 5", "5", 1),
    ("\\boxed{4}\n#### 5", "4", 0),
    ("\\boxed{4}\n#### 5 dollars", "5", 1),
    ("#### 5\nso $\\boxed{4}$", "4", 1),
    ("### 5", "5", 0),
    ("##### 5", "5", 0),
    # behind the mark
    ("\\boxed{18\\ }", "18", 1),
    ("#### 18 dollars", "18", 1),
    ("#### **18**", "18", 1),
    ("#### __18__", "18", 1),
    ("#### $18", "18", 1),
    ("#### \\$18.00", "18", 1),
    ("#### `18`", "18", 1),
    ("#### $18$", "18", 1),
    ("#### \\(18\\)", "18", 1),
    ("#### x = 18", "18", 1),
    ("#### Answer: 18", "18", 1),
    ("#### The final answer is 18.", "18", 1),
    ("####18", "18", 1),
    ("#### 18 dollars per day.", "18", 1),
    ("#### 1,234 eggs", "1,234", 1),
    ("#### 50%", "50", 1),
    ("#### Monday", "Monday", 1),
    ("#### 18 or 20", "18", 0),
    ("#### 18, 20", "18", 0),
    ("#### 17 = 18", "18", 0),
    ("#### not 18", "18", 0),
    ("####", "18", 0),
    ("#### \n18", "18", 0),
    # boxes
    ("\\fbox{42}", "42", 1),
    ("\\boxed 5", "5", 1),
    ("\\boxed5", "5", 1),
    ("$\\boxed 18$.", "18", 1),
    ("$\\boxed\\frac{1}{2}$", "0.5", 1),
    ("\\boxed {5}", "5", 1),
    ("\\boxed{\\boxed{5}}", "5", 1),
    ("\\boxed{\\text{the answer is } 5}", "5", 1),
    ("\\text{so \\boxed{5}}", "5", 1),
    ("\\boxed{\\frac{\\sqrt{3}}{2}}", "\\frac{\\sqrt3}{2}", 1),
    ("\\boxed{5}, that is \\boxed{}", "5", 1),
    ("\\boxed{}", "0", 0),
    ("\\boxed{}", "", None),
    ("\\boxed{5", "5", 0),
    ("\\boxed{4} \\boxed{5", "4", 0),
    ("\\boxed{4}, no: \\boxed{5}", "5", 1),
    ("\\boxed{4}, no: \\boxed{5}", "4", 0),
    # several boxes
    ("$x=\\boxed{3}$ and $y=\\boxed{5}$", "3, 5", 1),
    ("$y=\\boxed{5}$ and $x=\\boxed{3}$", "3, 5", 1),
    ("First $\\boxed{3}$.\n\nThen, after some work, $\\boxed{5}$.", "3, 5", 1),
    ("\\boxed{3}, \\boxed{5}", "3, 5", 1),
    ("\\boxed{3}, \\boxed{5}, \\boxed{7}", "3, 5", 0),
    ("\\boxed{7}, \\boxed{3}, \\boxed{5}", "3, 5", 0),
    ("\\boxed{3} and \\boxed{5}; together \\boxed{3, 5}", "3, 5", 1),
    ("\\boxed{3, 5}", "3, 5", 1),
    ("\\boxed{5}", "3, 5", 0),
    ("\\boxed{4} or \\boxed{5}", "5", 0),
    ("\\boxed{4}, \\boxed{5}", "5", 0),
    ("\\boxed{5}, \\boxed{5}", "5", 1),
    ("\\boxed{1}\\boxed{2}", "12", 0),
    # thinking
    ("<think>\\boxed{4}</think>\\boxed{5}", "5", 1),
    ("<think>\\boxed{5}</think>It is 4.", "5", 0),
    ("<think>It is \\boxed{5}", "5", 0),
    ("\\boxed{5}</think>It is \\boxed{4}.", "5", 0),
    ("I see.</think>\n#### 5", "5", 1),
    # the row's answer
    ("\\boxed{5}", 5, 1),
    ("\\boxed{2.50}", 2.5, 1),
    ("\\boxed{10^{-7}}", 1e-7, 1),
    ("\\boxed{72}", "48/2 = 24.\n48+24 = 72.\n#### 72", 1),
    ("\\boxed{x=1, x=2}", "so $x=\\boxed{1}$ or $x=\\boxed{2}$", 1),
]


@pytest.mark.parametrize(("response", "gold", "expected"), READ)
def test_the_answer_is_what_the_response_ends_with(response: str, gold: object, expected: int | None) -> None:
    if expected is None:
        with pytest.raises(ValueError, match=r"expected row\.answer to hold an answer, got none"):
            strict(response, gold)
    else:
        assert strict(response, gold) == expected


@pytest.mark.parametrize("gold", [True, ["3", "5"], {"value": 3}])
def test_an_answer_that_is_neither_text_nor_number_is_refused_by_name(gold: object) -> None:
    with pytest.raises(ValueError, match=r"expected row\.answer to be text or a number, got"):
        strict(r"\boxed{3}", gold)


@pytest.mark.parametrize(
    ("gold", "answer", "decimals", "expected"),
    [
        ("1/3", "0.33", 2, True),
        ("1/3", "0.34", 2, False),
        ("1/3", "0.333333", 6, True),
        ("1/3", "0.33333", 6, False),
        ("0.0001234", "0.0001235", 6, False),
        ("2/3000000", "0.0000006667", 6, True),
        ("100.4", "100", 0, True),
        ("0.4", "0", 0, False),
    ],
)
def test_inexact_numbers_agree_to_places_and_small_ones_to_digits(
    gold: str, answer: str, decimals: int, expected: bool
) -> None:
    assert are_equal(gold, answer, decimals=decimals) is expected
