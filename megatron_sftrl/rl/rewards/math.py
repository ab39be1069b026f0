r"""math: the value of the final answer, compared symbolically by math-verify.

    reward  = 1 if the answer in \boxed{...} or behind #### equals row["answer"], else 0
    lenient = reward, or 1 if the last number of the response equals it, whatever the format

Of several answers the last counts, in either format. row["answer"] may be bare (`3/4`), a solution that ends
in `#### 1,234` as in GSM8K (arXiv:2110.14168), or one that holds a \boxed{...} as in MATH (arXiv:2103.03874).
Equality is math-verify's (github.com/huggingface/Math-Verify): 1/2 = 0.5 = \frac{1}{2}, sets without order.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

from pydantic import Field

from megatron_sftrl.rl.rewards.api import Canary, RewardConfig, RewardInputs, RewardOutput
from megatron_sftrl.rl.rewards.registry import register_reward

# No answer of a data set is longer; math-verify's patterns take time quadratic in the text they are given.
LONGEST_ANSWER = 1000
# Far enough back to hold the last number that a reader would call the answer.
TAIL = 4000

_NUMBER = re.compile(r"(?<![\d.])-?(?:\d+(?:,\d{3})*(?:\.\d+)?|\.\d+)(?:/\d+)?")

Format = Literal["boxed", "hashes"]


class MathConfig(RewardConfig):
    formats: tuple[Format, ...] = Field(default=("boxed", "hashes"), min_length=1)
    r"""Where the strict reading looks for the answer: in \boxed{...}, or behind #### up to the line's end."""
    decimals: int = Field(default=6, ge=0, le=15)
    """Decimal places to which two inexact numbers must agree."""


def examples(config: MathConfig) -> Sequence[Canary]:
    """Answers in the chosen formats, right ones also where only the writing differs."""
    write = {"boxed": r"So it is $\boxed{%s}$.", "hashes": "So it is\n#### %s"}
    pairs = [("42", "42", "24"), (r"\frac{1}{2}", "0.5", "0.25"), ("7 + 7 = 14\n#### 1,234", "1234", "1,23")]
    return [
        Canary(response=write[name] % text, row={"answer": gold}, is_right=is_right)
        for name in config.formats
        for gold, right, wrong in pairs
        for text, is_right in ((right, True), (wrong, False))
    ] + [Canary(response="I do not know.", row={"answer": "42"}, is_right=False)]


@register_reward("math", config=MathConfig, needs=("answer",), canaries=examples, imports=("math_verify",))
def math(inputs: RewardInputs, config: MathConfig) -> RewardOutput:
    """1 for an answer of the right value in the right format, else 0; lenient: for the last number."""
    gold = gold_answer(str(inputs.row["answer"]))
    answer = written_answer(inputs.response, config.formats)
    is_right = answer is not None and are_equal(gold, answer, decimals=config.decimals)
    number = last_number(inputs.response)
    is_right_number = is_right or (number is not None and are_equal(gold, number, decimals=config.decimals))
    return RewardOutput(
        reward=float(is_right),
        lenient=float(is_right_number),
        metrics={"answered": float(answer is not None)},
    )


def gold_answer(text: str) -> str:
    """The final answer of a solution, or the whole text where it is only that."""
    found = written_answer(text, ("boxed", "hashes"))
    return text.strip() if found is None else found


def written_answer(text: str, formats: Sequence[Format]) -> str | None:
    """The last answer in one of the formats; None when there is none, or it was cut off."""
    found = [_boxed(text) if name == "boxed" else _behind_hashes(text) for name in formats]
    return max((place for place in found if place is not None), default=(0, None))[1]


def last_number(text: str) -> str | None:
    """The last number, such as -1,234.5 or 3/4."""
    numbers = _NUMBER.findall(text[-TAIL:])
    return numbers[-1] if numbers else None


def are_equal(gold: str, answer: str, *, decimals: int) -> bool:
    """Whether two answers have the same value, or are the same text."""
    gold, answer = _plain(gold), _plain(answer)
    if not answer or len(answer) > LONGEST_ANSWER:
        return False
    if gold == answer:
        return True
    # Late: rewards are registered in the trainer as well, which has no need of sympy.
    from math_verify import parse, verify

    # The worker's limits stand in for math-verify's own timeouts, which it asks to switch off so. The first
    # match only: an answer that lists candidates must not be right because one of them is.
    values = [
        parse(rf"\boxed{{{text}}}", extraction_mode="first_match", parsing_timeout=None)  # type: ignore[arg-type]
        for text in (gold, answer)
    ]
    return bool(verify(*values, float_rounding=decimals, timeout_seconds=None))


def _boxed(text: str) -> tuple[int, str] | None:
    start = text.rfind(r"\boxed{")
    depth, begin = 0, start + len(r"\boxed{")
    for place in range(begin, min(len(text), begin + LONGEST_ANSWER + 1)) if start >= 0 else ():
        if text[place] == "}" and depth == 0:
            return start, text[begin:place]
        depth += {"{": 1, "}": -1}.get(text[place], 0)
    return None


def _behind_hashes(text: str) -> tuple[int, str] | None:
    start = text.rfind("####")
    line = text[start + 4 :].lstrip(" ").partition("\n")[0].strip()
    return (start, line) if start >= 0 and line else None


def _plain(text: str) -> str:
    """Without the full stop and the dollar signs around it."""
    return text.strip().removesuffix(".").strip().strip("$").replace(r"\$", "").strip()
