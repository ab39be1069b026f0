"""What a reward gives to a row's own answer and to answers that are known to be wrong, each judged twice."""

from __future__ import annotations

import random
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from megatron_sftrl.apps.doctor.reward_rows import DoctorRow, DoctorRows
from megatron_sftrl.rl.rewards.math import MathConfig
from megatron_sftrl.rl.rewards.pool import RewardPool
from megatron_sftrl.rl.rewards.registry import Part, Reward, RewardInputs
from megatron_sftrl.rl.rewards.text import normal

# Ways to write an answer X. A reward that has a solution is asked for its own way; of another it is not known
# which one it reads, and the one in which the rows' own answers earn most is taken.

BARE = "X"
_BOXED, _HASHES = r"\boxed{X}", "#### X"
_COMMON = (BARE, _BOXED, _HASHES, "<answer>X</answer>", "Answer: X")
_SOLUTION = "its solution"
"""The own answer of a reward that does not take it from `answer`: no other text can be written like it."""
_WHOLE = "as in the row"
"""A whole solution, of which X is the final answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Form:
    """How an answer is written; `shown` has an X in the place of it. `is_said`: the reward says so itself."""

    shown: str
    write: Callable[[DoctorRow, str], str | None]
    is_said: bool = False


def forms_of(reward: Reward, rows: Sequence[DoctorRow]) -> list[Form]:
    """The ways to write an answer that this reward may read, its own one first."""
    own = next((text for row in rows if (text := reward.written(row.values, "X")) is not None), None)
    if own is None:
        return [_plain(shown) for shown in _COMMON]
    others = [BARE]
    if isinstance(reward.config, MathConfig):
        others += [{"boxed": _BOXED, "hashes": _HASHES}[name] for name in reward.config.formats]
    form = Form(shown=own, write=lambda row, answer: reward.written(row.values, answer), is_said=True)
    return [form, *(_plain(shown) for shown in others if shown != own)]


def _plain(shown: str) -> Form:
    before, _, behind = shown.partition("X")
    return Form(shown=shown, write=lambda row, answer: before + answer + behind)


ANOTHER_ROWS, MOST_FREQUENT = "another row's answer", "the most frequent answer"
Kind = Literal["own", "variant", "wrong", "constant"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A response to every row, one text for each, or None where there is none.

    Args:
        kind: the row's own answer; the same with something around it; an answer that is wrong unless it is
            the row's own, too; one that is the same in every row (of a task), and wrong in the same sense.
        form: how it is written.
        answers: what is said in it.
        is_solution: it is what the reward says that it gives 1.
    """

    name: str
    kind: Kind
    form: str
    answers: tuple[str | None, ...]
    texts: tuple[str | None, ...]
    is_solution: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Judged:
    """What a reward said about a candidate, row by row; None where nothing was judged."""

    candidate: Candidate
    first: tuple[Part | None, ...]
    again: tuple[Part | None, ...]

    def score(self, place: int) -> float | None:
        """Of one row, by the first pass; None where it has none."""
        part = self.first[place]
        return part.reward if part is not None and part.outcome == "ok" else None

    @property
    def parts(self) -> list[Part]:
        """Of both passes."""
        return [part for part in (*self.first, *self.again) if part is not None]

    @property
    def mean(self) -> float | None:
        """Of the scores of the first pass."""
        scores = [score for place in range(len(self.first)) if (score := self.score(place)) is not None]
        return sum(scores) / len(scores) if scores else None


_FIRST_ROWS = 4
"""Where each of the first rows fails the others are not tried, nor is there a second pass: each may cost a
timeout and a new worker, twice."""


def judge_all(pool: RewardPool, index: int, sample: DoctorRows, seed: int) -> list[Judged]:
    """What one reward of the pool gives to every candidate; the own answers come first."""
    reward, rows = pool.rewards[index], sample.rows
    forms = forms_of(reward, rows)
    judge = _Judge(pool, index, sample)
    own = judge.all_of(list(_own(reward, rows, forms)))
    read = forms[0]
    if not read.is_said and own:
        best = max(own, key=lambda judged: judged.mean or 0.0).candidate.form
        read = next((form for form in forms if form.shown == best), read)
    written = [read] if read.shown == BARE else [read, _plain(BARE)]
    return own + judge.all_of([*_variants(rows, read), *_wrong(rows, written, seed)])


class _Judge:
    def __init__(self, pool: RewardPool, index: int, sample: DoctorRows) -> None:
        self._pool, self._index, self._sample = pool, index, sample

    def all_of(self, candidates: Sequence[Candidate]) -> list[Judged]:
        """Each of them, twice: the second time from the last one back to the first."""
        firsts = [self._parts(each, range(len(each.texts))) for each in candidates]
        judged = [
            Judged(candidate=candidate, first=first, again=self._parts_again(candidate, first))
            for candidate, first in zip(reversed(candidates), reversed(firsts), strict=True)
        ]
        return judged[::-1]

    def _parts_again(self, candidate: Candidate, first: Sequence[Part | None]) -> tuple[Part | None, ...]:
        if all(part is None or part.outcome != "ok" for part in first):
            return (None,) * len(first)
        return self._parts(candidate, range(len(first))[::-1])

    def _parts(self, candidate: Candidate, order: Sequence[int]) -> tuple[Part | None, ...]:
        places = [place for place in order if candidate.texts[place] is not None]
        found: dict[int, Part] = {}
        for part_of in (places[:_FIRST_ROWS], places[_FIRST_ROWS:]):
            if found and all(part.outcome != "ok" for part in found.values()):
                break
            inputs = [self._inputs(place, candidate.texts[place] or "") for place in part_of]
            found |= dict(zip(part_of, self._pool.score_with(self._index, inputs), strict=True))
        return tuple(found.get(place) for place in range(len(candidate.texts)))

    def _inputs(self, place: int, text: str) -> RewardInputs:
        row = self._sample.rows[place]
        return RewardInputs(
            prompt=row.prompt,
            response=text,
            row=row.values,
            num_response_tokens=self._sample.num_tokens(text),
            is_finished=True,
        )


def _own(reward: Reward, rows: Sequence[DoctorRow], forms: Sequence[Form]) -> Iterator[Candidate]:
    answers = tuple(row.answers[0] if row.answers else None for row in rows)
    solutions = tuple(reward.solution(row.values) for row in rows)
    ways = [(form.shown, _texts(rows, form, answers), form.is_said) for form in forms]
    if forms[0].is_said:
        texts = tuple(one or other for one, other in zip(solutions, ways[0][1], strict=True))
        ways[0] = (forms[0].shown, texts, True)
    else:
        ways.append((_SOLUTION, solutions, True))
    wholes = tuple(_whole(row) for row in rows)
    if wholes != answers:
        ways.append((_WHOLE, wholes, False))
    for shown, texts, is_solution in ways:
        if any(text is not None for text in texts):
            yield Candidate(
                name="own answer",
                kind="own",
                form=shown,
                answers=answers,
                texts=texts,
                is_solution=is_solution,
            )


def _whole(row: DoctorRow) -> str | None:
    answer = row.values.get("answer")
    return str(answer) if row.answers and isinstance(answer, str | int | float) else None


def _variants(rows: Sequence[DoctorRow], form: Form) -> Iterator[Candidate]:
    answers = tuple(row.answers[0] if row.answers else None for row in rows)
    for name, shape in (("with space around", "\n  X \n"), ("with a full stop", "X."), ("in a box", _BOXED)):
        shaped = tuple(None if answer is None else shape.replace("X", answer) for answer in answers)
        texts = _texts(rows, form, shaped)
        if any(text is not None for text in texts):
            yield Candidate(
                name=f"own answer {name}", kind="variant", form=form.shown, answers=answers, texts=texts
            )


def _wrong(rows: Sequence[DoctorRow], forms: Sequence[Form], seed: int) -> Iterator[Candidate]:
    same: list[tuple[str, Kind, tuple[str | None, ...]]] = [
        (ANOTHER_ROWS, "wrong", _of_other_rows(rows, seed)),
        ("the question", "wrong", tuple(row.question for row in rows)),
        ("the empty text", "constant", ("",) * len(rows)),
        *((f"'{text}'", "constant", (text,) * len(rows)) for text in ("0", "1", "True")),
        (MOST_FREQUENT, "constant", _most_frequent(rows)),
    ]
    for name, kind, answers in same:
        for form in forms:
            texts = _texts(rows, form, answers)
            if any(text is not None for text in texts):
                yield Candidate(name=name, kind=kind, form=form.shown, answers=answers, texts=texts)


def _texts(rows: Sequence[DoctorRow], form: Form, answers: Sequence[str | None]) -> tuple[str | None, ...]:
    return tuple(
        None if answer is None else form.write(row, answer) for row, answer in zip(rows, answers, strict=True)
    )


def _of_other_rows(rows: Sequence[DoctorRow], seed: int) -> tuple[str | None, ...]:
    """For each row the answer of another row of its task that has another one, drawn."""
    draw = random.Random(seed)
    found: list[str | None] = []
    for row in rows:
        others = [
            other.answers[0]
            for other in rows
            if other.answers and other.task == row.task and not is_own(other.answers[0], row)
        ]
        found.append(draw.choice(others) if others else None)
    return tuple(found)


def _most_frequent(rows: Sequence[DoctorRow]) -> tuple[str | None, ...]:
    """For each row the answer that most rows of its task have."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for row in rows:
        counts[row.task].update(row.answers[:1])
    most = {task: count.most_common(1)[0][0] for task, count in counts.items() if count}
    return tuple(most.get(row.task) for row in rows)


# Which answers are the same is not asked of the reward: one that takes any text for right says yes to all.

_NUMBER = re.compile(r"[-+]?\d{1,40}(?:\.\d{1,40})?(?:/0*[1-9]\d{0,39})?")
_CALCULATION = re.compile(r"[\w)\]}]\s*[-+*/^\u00d7\u00f7]\s*[\w(\[\\]")
"""An operator between two things. What it comes to says nothing: of a puzzle whose numbers must make 24 every
answer has the same value, and a question that is a sum has the value of its answer."""
_LONGEST_COMPARED = 200


def is_own(answer: str, row: DoctorRow) -> bool:
    """It is the row's answer as a text, up to spaces, capitals and a full stop, or as a number."""
    return any(
        normal(answer, ignore_case=True) == normal(own, ignore_case=True)
        or (None is not _value(answer) == _value(own))
        for own in row.answers
    )


def _value(text: str) -> Fraction | None:
    text = text.strip().replace(",", "")
    if not _NUMBER.fullmatch(text):
        return None
    number, _, divisor = text.partition("/")
    return Fraction(number) / Fraction(divisor or "1")


class Mathematics:
    """Says, by the math reward in workers of its own, where an answer has the value of the row's own."""

    def __init__(self, pool: RewardPool) -> None:
        self._pool = pool
        self._known: dict[tuple[str, str], bool] = {}

    def equal(self, answers: Sequence[tuple[str, DoctorRow]]) -> list[bool]:
        """For each answer and row; not asked, and no, for two numbers, a calculation or a long text."""
        pairs = [
            [(answer, own) for own in row.answers if _is_worth_asking(answer, own)] for answer, row in answers
        ]
        new = sorted({pair for each in pairs for pair in each} - self._known.keys())
        parts = self._pool.score_with(0, [_is_equal(answer, own) for answer, own in new])
        self._known |= {pair: part.reward == 1 for pair, part in zip(new, parts, strict=True)}
        return [any(self._known[pair] for pair in each) for each in pairs]


def _is_worth_asking(answer: str, own: str) -> bool:
    values = [_value(text) for text in (answer, own)]
    if all(value is not None for value in values):
        return False
    return all(
        text.strip()
        and len(text) <= _LONGEST_COMPARED
        and (value is not None or not _CALCULATION.search(text))
        for text, value in zip((answer, own), values, strict=True)
    )


def _is_equal(answer: str, own: str) -> RewardInputs:
    return RewardInputs(
        prompt="",
        response=rf"\boxed{{{answer}}}",
        row={"answer": own},
        num_response_tokens=1,
        is_finished=True,
    )
