r"""Whether two written answers of mathematics are the same answer.

math-verify (github.com/huggingface/Math-Verify) reads LaTeX and compares expressions. Around it stands what
it takes for equal and is not, or the other way round: lists and intervals are taken apart here and compared
item by item, words letter by letter, units and bases by name, functions at points, numbers to a tolerance
that small ones cannot hide behind; and equations must not be false.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Sequence
from fractions import Fraction
from functools import partial
from itertools import pairwise
from typing import Any

from megatron_sftrl.rl.rewards.math_text import (
    Quantity,
    canonical,
    choice,
    is_words,
    normal_words,
    plain_words,
    quantity,
    split_top,
    with_spaces_closed,
)

# No answer of a data set is longer; math-verify's patterns take time quadratic in the text they are given.
LONGEST_ANSWER = 1000
# Nesting that no answer has, and the parser's recursion does not survive.
DEEPEST = 60

_RELATION = re.compile(r"\\(?:leq?|geq?|neq?|lt|gt|leqslant|geqslant)(?![a-zA-Z])|[<>]")
_PLAIN_NUMBER = re.compile(r"[-+]?(?:\d+(?:\.\d*)?|\.\d+)(?:/\d+)?")
_SCIENTIFIC = re.compile(r"([-+]?(?:\d+(?:\.\d*)?|\.\d+))(?:\\times|\\cdot)10\^\{?([-+]?\d{1,3})\}?")
_NAME = re.compile(r"(?:\\?[A-Za-z]+|\\text\{[^{}]*\})(?:_\{?\w+\}?|\([a-z](?:, ?[a-z])*\)|'|\([-\d]+\))*")
_NUMBER_AND_LETTER = re.compile(r"[-+\d.]+ ?[A-Za-z]")
_LABEL = re.compile(
    r"([A-Za-z]|\([a-z](?:,\s*[a-z])*\))\s*(?:=|\\in(?![a-zA-Z]))\s*(?=[(\[]|\\\{|\\emptyset|\\mathbb)"
)
_BRACKETS = {"(": ")", "[": "]", r"\{": r"\}", r"\langle": r"\rangle"}


def are_equal(gold: str, answer: str, *, decimals: int) -> bool:
    """Whether an answer has the value of the right one, or is the same text; LaTeX or plain text.

    What offers several candidates is not equal to one of them. Inexact numbers agree to `decimals` places.
    """
    if len(answer) > LONGEST_ANSWER or len(gold) > LONGEST_ANSWER:
        return gold.strip() == answer.strip()
    return _same(canonical(gold), canonical(answer), decimals)


def num_items(gold: str) -> int:
    """How many values an answer lists; 1 where brackets hold them together."""
    open_, _, items = _items(canonical(gold[:LONGEST_ANSWER]))
    return 1 if open_ else len(items)


def _same(gold: str, answer: str, decimals: int) -> bool:
    if not answer or not gold or _depth(answer) > DEEPEST:
        return False
    if gold == answer:
        return True
    letter = choice(gold)
    if letter is not None:
        return choice(answer, with_text=True) == letter
    if is_words(gold) or is_words(answer):
        return normal_words(gold) == normal_words(answer)
    gold, answer = _without_labels(gold, answer)
    cells = _cells(gold), _cells(answer)
    if cells[0] and cells[1]:
        return [len(row) for row in cells[0]] == [len(row) for row in cells[1]] and all(
            _same(right, given, decimals)
            for rows in zip(*cells, strict=True)
            for right, given in zip(*rows, strict=True)
        )
    if r"\cup" in gold + answer:
        gold_items, answer_items = _united(gold), _united(answer)
        return _same_sets(gold_items, answer_items, decimals)
    return _same_lists(gold, answer, decimals)


def _united(text: str) -> list[str]:
    """The parts of a union of intervals, some of them written as inequalities perhaps."""
    return split_top(text, r"\cup", *([","] if _RELATION.search(text) else []))


def _same_lists(gold: str, answer: str, decimals: int) -> bool:
    """By brackets and items, where one of the two is more than one value."""
    gold_open, gold_close, gold_items = _items(gold)
    open_, close, items = _items(answer)
    if len(gold_items) == len(items) == 1 and (not gold_open or gold_open == open_):
        if gold_open and gold_open != "(":
            return close == gold_close and _same(gold_items[0], items[0], decimals)
        return _same_quantities(gold, answer, decimals)
    relations = [bool(_RELATION.search(text)) for text in (gold, answer)]
    if relations == [True, False] or (
        relations == [False, True] and (gold_open + gold_close != "()" or r"\infty" in gold)
    ):
        return _verified(gold, answer, decimals)  # an interval written as an inequality
    if (open_, close) not in ((gold_open, gold_close), ("", "")) and gold_open:
        return False
    if {open_, gold_open} == {"", "["}:
        return False
    labelled = [all("=" in item for item in found) for found in (gold_items, items)]
    is_ordered = {gold_open, open_} & {"(", "[", r"\langle"} or labelled == [True, False]
    if is_ordered:
        return len(gold_items) == len(items) and all(
            _same(right, given, decimals) for right, given in zip(gold_items, items, strict=True)
        )
    return _same_sets(gold_items, items, decimals)


def _same_sets(gold: Sequence[str], answer: Sequence[str], decimals: int) -> bool:
    """Each item of one is an item of the other, in any order."""
    if len(gold) != len(answer):
        return False
    left = list(answer)
    for right in gold:
        match = next((given for given in left if _same(right, given, decimals)), None)
        if match is None:
            return False
        left.remove(match)
    return True


def _items(text: str) -> tuple[str, str, list[str]]:
    """The brackets around a text, if a pair holds all of it, and what its commas separate; +- makes two."""
    open_ = next((mark for mark in _BRACKETS if text.startswith(mark)), "")
    close = next((mark for mark in _BRACKETS.values() if text.endswith(mark)), "")
    if open_ and close and len(text) > len(open_) + len(close):
        inside = text[len(open_) : -len(close)].strip()
        is_half_open = {open_, close} & {"[", "]"} and {open_, close} & {"(", ")"}
        fits = _BRACKETS[open_] == close or (is_half_open and len(split_top(inside, ",")) == 2)
        if fits and _is_balanced(inside) and not re.search(r"\\mid|[|:]", inside):
            items = split_top(inside, ",")
            if open_ == r"\{" or len(items) > 1:
                return open_.replace(r"\langle", "("), close.replace(r"\rangle", ")"), _expanded(items)
    return "", "", _expanded(split_top(text, ",", ";"))


def _expanded(items: Sequence[str]) -> list[str]:
    found: list[str] = []
    for item in items:
        if r"\pm" in item and r"\mp" not in item and item.count(r"\pm") == 1:
            found += [item.replace(r"\pm", sign).strip() for sign in ("+", "-")]
        else:
            found.append(item)
    return found


def _is_balanced(text: str) -> bool:
    """Whether no bracket closes one that is not in the text."""
    depth = 0
    for mark in re.findall(r"\\[{}]|[()\[\]]", text):
        depth += 1 if mark in ("(", "[", r"\{") else -1
        if depth < 0:
            return False
    return depth == 0


def _without_labels(gold: str, answer: str) -> tuple[str, str]:
    """Without what a set, an interval or a tuple is said to be: x in [0, 1], (x, y) = (1, 2)."""
    labels, rests = zip(*(_label(text) for text in (gold, answer)), strict=True)
    if all(labels) and labels[0] != labels[1]:
        return gold, answer
    return rests[0], rests[1]


def _label(text: str) -> tuple[str, str]:
    """A name before a set, an interval or a tuple, empty where there is none, and what follows."""
    found = _LABEL.match(text)
    return (found[1].replace(" ", ""), text[found.end() :]) if found else ("", text)


def _cells(text: str) -> list[list[str]]:
    """The cells of a matrix, row by row; empty for anything else."""
    held = re.fullmatch(r"[(\[]\s*(\\begin\{(array|matrix)\}.*\\end\{\2\})\s*[)\]]", text)
    text = held[1] if held else text
    found = re.fullmatch(r"\\begin\{([pbB]?matrix|array)\}(?:\{[clr|]*\})?(.*)\\end\{\1\}", text)
    if found is None or r"\begin" in found[2]:
        return []
    rows = re.split(r"\\\\|\\cr(?![a-zA-Z])", found[2].strip().removesuffix(r"\\"))
    return [[cell.strip() for cell in row.split("&")] for row in rows]


def _same_quantities(gold: str, answer: str, decimals: int) -> bool:
    """Of one value each, with a unit perhaps, at the end of an equation perhaps."""
    sides = [part.strip() for part in re.split(r"(?<![<>!\\:])=", answer)]
    gold_sides = [part.strip() for part in re.split(r"(?<![<>!\\:])=", gold)]
    if not all(sides):
        sides = [side for side in sides if side]
        if len(sides) != 1:
            return False
        answer = sides[0]
    if len(sides) > 1 and not _is_true(sides, decimals):
        return False
    if len(gold_sides) == 1 and len(sides) > 1:
        if _NAME.fullmatch(sides[-1]) and not _NAME.fullmatch(gold):
            sides.reverse()
        return _same_quantities(gold, sides[-1], decimals)
    if len(gold_sides) == 2 and len(sides) == 1 and _NAME.fullmatch(gold_sides[0]):
        return _same_quantities(gold_sides[1], sides[0], decimals)
    if len(gold_sides) > 1 or len(sides) > 1:
        if len(gold_sides) == 2 and len(sides) > 2 and sides[0] == gold_sides[0]:
            return _same_quantities(gold_sides[1], sides[-1], decimals)
        return _same_equations(gold_sides, sides, decimals)
    approximations = [part.strip() for part in re.split(r"\\approx(?![a-zA-Z])", answer)]
    if len(approximations) > 1:
        return _same_approximations(gold, [part for part in approximations if part], decimals)
    if all(_NUMBER_AND_LETTER.fullmatch(text) for text in (gold, answer)):
        return _same_value(gold, answer, decimals)
    return _same_with_units(quantity(gold), quantity(answer), decimals)


def _is_true(sides: Sequence[str], decimals: int) -> bool:
    """Whether the sides of an equation that are numbers are the same number."""
    numbers = [side for side in sides if not re.search("[A-Za-z]", re.sub(r"\\[A-Za-z]+", "", side))]
    return all(_same_with_units(quantity(a), quantity(b), decimals) for a, b in pairwise(numbers))


def _same_approximations(gold: str, parts: Sequence[str], decimals: int) -> bool:
    """One part is the value, and the others are near it."""
    values = parts[1:] if _NAME.fullmatch(parts[0]) else parts
    for first, second in pairwise(values):
        if not _same_with_units(quantity(first), quantity(second), decimals, part=Fraction(1, 100)):
            return False
    return any(_same_quantities(gold, part, decimals) for part in parts)


def _same_with_units(
    gold: Quantity, answer: Quantity, decimals: int, *, part: Fraction | None = None
) -> bool:
    """Part: how far apart, relative to the first, the values may be; None for equal ones."""
    if not gold.agrees_with(answer):
        return False
    if _same_value(gold.value, answer.value, decimals, part=part):
        return True
    is_percent = gold.unit == "%", answer.unit == "%"
    if is_percent == (True, False) and not answer.unit:
        return _same_value(rf"\frac{{{gold.value}}}{{100}}", answer.value, decimals)
    if is_percent == (False, True) and not gold.unit:
        return _same_value(gold.value, rf"\frac{{{answer.value}}}{{100}}", decimals)
    return False


def _same_value(gold: str, answer: str, decimals: int, *, part: Fraction | None = None) -> bool:
    gold, answer = with_spaces_closed(gold), with_spaces_closed(answer)
    if gold == answer:
        return True
    if re.search(r"\d\s+[\d.]", answer):
        return False
    if is_words(answer) or is_words(gold):
        return normal_words(gold) == normal_words(answer)
    first, second = _number(gold), _number(answer)
    if first is not None and second is not None:
        if part is None and "." not in gold + answer:
            return first == second
        return abs(first - second) <= (
            _tolerance(first, decimals=decimals) if part is None else part * abs(first)
        )
    if bool(_RELATION.search(gold)) != bool(_RELATION.search(answer)):
        return False
    return _verified(gold, answer, decimals, part=part)


def _number(text: str) -> Fraction | None:
    text = text.replace(" ", "")
    scientific = _SCIENTIFIC.fullmatch(text)
    if scientific:
        return Fraction(scientific[1]) * Fraction(10) ** int(scientific[2])
    fraction = re.fullmatch(r"([-+]?)\\frac\{([-+]?\d+)\}\{([-+]?\d+)\}", text)
    if fraction:
        text = fraction[1] + fraction[2] + "/" + fraction[3] if fraction[2].isdigit() else text
    if not _PLAIN_NUMBER.fullmatch(text):
        return None
    over, _, under = text.partition("/")
    return None if under and not int(under) else Fraction(over) / int(under or 1)


def _tolerance(value: Fraction, *, decimals: int) -> Fraction:
    """Half a unit of the last of `decimals` places, and of half as many significant digits."""
    return min(Fraction(1, 10**decimals), abs(value) / 10 ** (decimals // 2)) / 2


def _depth(text: str) -> int:
    depth = deepest = 0
    for character in text:
        depth += (character in "{([") - (character in "})]")
        deepest = max(deepest, depth)
    return deepest


def _parsed(text: str) -> Any:
    """As math-verify reads it, units and words apart; None for what it cannot read."""
    # Late: rewards are registered in the trainer as well, which has no need of sympy.
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse

    # Units are read above: math-verify's list of them holds letters that are variables.
    reading = NormalizationConfig(
        basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="last", equations=False
    )
    # The worker's limits stand in for math-verify's own timeouts, which it asks to switch off so. The first
    # match only: an answer that lists candidates must not be right because one of them is.
    found = parse(
        rf"\boxed{{{text}}}",
        extraction_config=[LatexExtractionConfig(normalization_config=reading)],
        extraction_mode="first_match",
        parsing_timeout=None,  # type: ignore[arg-type]
    )
    return found[0] if found and not isinstance(found[0], str) else None


def _verified(gold: str, answer: str, decimals: int, *, part: Fraction | None = None) -> bool:
    """By math-verify, and against it where the values say otherwise."""
    from math_verify import verify

    from megatron_sftrl.rl.rewards.math_values import agree, is_feasible

    # math-verify reads X as x.
    letters = [set(re.findall("[A-Za-z]", plain_words(text))) for text in (gold, answer)]
    for name in {letter.lower() for letter in letters[0] & {x.swapcase() for x in letters[1]}}:
        if letters[0] & {name, name.upper()} != letters[1] & {name, name.upper()}:
            return False
    tolerance = partial(_tolerance, decimals=decimals) if part is None else partial(operator.mul, part)
    try:
        first, second = _parsed(gold), _parsed(answer)
        if first is None or second is None or not is_feasible(first, second):
            return False
        by_value = agree(first, second, tolerance=tolerance, is_rough=part is not None)
        if by_value is not None:
            return by_value
        return bool(
            verify(first, second, float_rounding=decimals, timeout_seconds=None, allow_set_relation_comp=True)
        )
    except MemoryError:
        raise
    except Exception:
        # An answer on which sympy breaks is wrong; it must not become one that could not be judged.
        return False


def _same_equations(gold: Sequence[str], answer: Sequence[str], decimals: int) -> bool:
    from megatron_sftrl.rl.rewards.math_values import are_multiples, is_feasible

    if len(gold) != 2 or len(answer) != 2:
        return False
    if all(_NAME.fullmatch(sides[0]) for sides in (gold, answer)) and with_spaces_closed(
        gold[0]
    ) == with_spaces_closed(answer[0]):
        return _same_quantities(gold[1], answer[1], decimals)
    try:
        first, second = (_parsed(f"({left}) - ({right})") for left, right in (gold, answer))
        return (
            first is not None
            and second is not None
            and is_feasible(first, second)
            and are_multiples(first, second)
        )
    except MemoryError:
        raise
    except Exception:
        return False  # as above
