"""Expressions of sympy compared by their values: numbers to many digits, functions at points."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from typing import Any, TypeAlias

import sympy

# A part of sympy's tree, of which its own annotations say less than is so.
Value: TypeAlias = Any

# Digits of exact numbers that must agree, out of those that are computed.
AGREEING, COMPUTED = 30, 50
# Below this a difference of larger numbers may be rounding alone.
NOISE = sympy.Rational(1, 10**40)
# Of an exact number; more than these takes time, and no answer has so many.
MOST_DIGITS = 200_000.0
UNFINISHED = (sympy.Integral, sympy.Sum, sympy.Product, sympy.Limit, sympy.Derivative)
# Where functions are compared: of either sign, large, small, whole and not.
POINTS = ("7/3", "-5/4", "3", "-2", "11/17", "-13/29", "29/5", "5", "-31/7", "41/11", "1", "17/2")
# Of these, as many must be real for a comparison to say something.
FEWEST = 3


def num_digits(value: Value) -> float:
    """About how many digits the numbers need that an expression is computed with; infinite: too many."""
    sizes = [num_digits(argument) for argument in value.args]
    if any(math.isinf(size) for size in sizes):
        return math.inf
    if isinstance(value, sympy.Rational):
        return (abs(value.p).bit_length() + value.q.bit_length()) / 3 + 1
    if not sizes:
        return 1.0
    grows = isinstance(value, sympy.Pow | sympy.exp | sympy.factorial | sympy.factorial2 | sympy.gamma)
    if grows or isinstance(value, sympy.binomial):
        amount = _amount(value.args[0] if isinstance(value, sympy.binomial) else value.args[-1], sizes[-1])
        size = sizes[0] * max(amount, 1.0)
    else:
        size = sum(sizes)
    return size if size <= MOST_DIGITS else math.inf


def _amount(value: Value, size: float) -> float:
    if value.free_symbols:
        return 10.0 ** min(size, 300.0)
    return abs(complex(value.evalf(15)))


def is_feasible(gold: Value, answer: Value) -> bool:
    """Whether two expressions can be computed: their numbers have an end, and the work is done."""
    return (
        not (answer.has(*UNFINISHED) and not gold.has(*UNFINISHED))
        and math.isfinite(num_digits(gold))
        and math.isfinite(num_digits(answer))
    )


def agree(
    gold: Value, answer: Value, *, tolerance: Callable[[Fraction], Fraction], is_rough: bool = False
) -> bool | None:
    """Whether two parsed expressions have the same values.

    None for what has no value: sets, relations, infinities, and functions that are real nowhere. `tolerance`
    is how far an inexact number may be from the given one; with `is_rough` exact numbers may be as far apart.
    """
    if not (isinstance(gold, sympy.Expr) and isinstance(answer, sympy.Expr)):
        return None
    # It may be an index as well, of which the same holds.
    gold, answer = _with_imaginary_unit(gold), _with_imaginary_unit(answer)
    names = _names(gold, answer)
    is_exact = not (is_rough or gold.has(sympy.Float) or answer.has(sympy.Float))
    if not names:
        first, second = _at(gold, {}), _at(answer, {})
        if first is None or second is None:
            return None
        if max(abs(first), abs(second)) < NOISE and is_exact:
            return sympy.simplify(gold - answer) == 0
        if is_exact or not (first.is_real and second.is_real):
            return _are_near(first, second, 10**-AGREEING if is_exact else 1e-9)
        right = Fraction(str(first))
        return abs(right - Fraction(str(second))) <= tolerance(right)
    found = _at_points(names, gold, answer)
    if found is None or all(max(abs(first), abs(second)) < NOISE for first, second in found):
        return None
    return all(_are_near(first, second, 10**-AGREEING if is_exact else 1e-9) for first, second in found)


def are_multiples(gold: Value, answer: Value) -> bool:
    """Whether one function is the other times a number, so that both are zero at the same places."""
    if not (isinstance(gold, sympy.Expr) and isinstance(answer, sympy.Expr)):
        return False
    names = _names(gold, answer)
    found = _at_points(names, gold, answer) if names else None
    if found is None:
        return False
    ratios = [second / first for first, second in found if first != 0]
    return (
        len(ratios) >= FEWEST
        and ratios[0] != 0
        and all(_are_near(ratios[0], ratio, 1e-20) for ratio in ratios)
        and all(second == 0 for first, second in found if first == 0)
    )


def _names(*values: Value) -> list[str]:
    return sorted({symbol.name for value in values for symbol in value.free_symbols})


def _with_imaginary_unit(value: Value) -> Value:
    return value.subs({symbol: sympy.I for symbol in value.free_symbols if symbol.name == "i"})


def _at_points(names: Sequence[str], gold: Value, answer: Value) -> list[tuple[Value, Value]] | None:
    """Both values wherever the first one is real; None if that is nearly nowhere."""
    found = []
    for shift in range(len(POINTS)):
        point = {
            name: sympy.Rational(POINTS[(shift + 5 * place) % len(POINTS)])
            for place, name in enumerate(names)
        }
        first = _at(gold, point)
        if first is None or not first.is_real:
            continue
        second = _at(answer, point)
        found.append((first, sympy.nan if second is None else second))
    return found if len(found) >= FEWEST else None


def _at(value: Value, point: Mapping[str, Value]) -> Value | None:
    at = {symbol: point[symbol.name] for symbol in value.free_symbols}
    number = value.subs(at).doit().evalf(COMPUTED)
    return number if number.is_number and number.is_finite else None


def _are_near(first: Value, second: Value, relative: float) -> bool:
    if not second.is_finite:
        return False
    apart, size = abs(first - second), max(abs(first), abs(second))
    return bool(apart <= size * relative or size < NOISE)
