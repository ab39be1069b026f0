"""The properties of a reward, from what it gave to right and wrong answers."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from megatron_sftrl.apps.doctor.reward_candidates import (
    ANOTHER_ROWS,
    MOST_FREQUENT,
    Judged,
    Mathematics,
    is_own,
)
from megatron_sftrl.apps.doctor.reward_rows import DoctorRow
from megatron_sftrl.rl.rewards.checks import FULL_CREDIT
from megatron_sftrl.rl.rewards.registry import Part, Reward

# What is found. The right answer of a row is its own, in the form in which it earns most; where none is
# known, or the reward does not look at it, full marks are 1. A candidate is wrong in a row unless it is the
# row's answer, which is not asked of the reward.


BY_CHANCE = 0.1
"""Share of rows in which another answer than the row's own may earn what that one does: it can be right, too,
where a row has several right answers, or be the same in a notation that is not recognised."""
MOST_ROWS = 0.75
_EPSILON = 1e-6


def is_full(score: float, full: float) -> bool:
    """A score is full marks, up to the rounding of a verifier's arithmetic."""
    return score >= full - _EPSILON


@dataclass(frozen=True, slots=True, kw_only=True)
class RewardFinding:
    """One property of one reward: what is wrong with it, none where it holds, and what else was seen."""

    property: str
    says: str
    problems: tuple[str, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Hole:
    """A candidate that earns full marks in `num_earning` of the `num_wrong` rows in which it is wrong."""

    name: str
    form: str
    text: str
    source: str
    own: str | None
    num_earning: int
    num_wrong: int

    @property
    def share(self) -> float:
        return self.num_earning / self.num_wrong

    @property
    def is_large(self) -> bool:
        """More than chance; one row alone is, where there are not two that could be."""
        return self.share > BY_CHANCE and self.num_earning >= min(2, self.num_wrong)


class Findings:
    """The properties of one reward on the sample; `full_marks` of each row, what its answer earns, or 1."""

    def __init__(
        self, reward: Reward, rows: Sequence[DoctorRow], judged: Sequence[Judged], mathematics: Mathematics
    ) -> None:
        self._reward, self._rows, self._judged, self._mathematics = reward, rows, judged, mathematics
        self._own = [one for one in judged if one.candidate.kind == "own"]
        self._others = [one for one in judged if one.candidate.kind in ("wrong", "constant")]
        reads_answers = self._reads_answers()
        self._rights = [self._right(place) if reads_answers else None for place in range(len(rows))]
        self._why_unknown = "the rows have none" if reads_answers else "the reward does not look at `answer`"
        self.full_marks = [1.0 if right is None else right for right in self._rights]

    def all(self) -> list[RewardFinding]:
        """Each property, in the order in which they are told."""
        return [self._right_finding(), self._wrong_finding(), self._twice_finding(), self._calls_finding()]

    def _right(self, place: int) -> float | None:
        """What the own answer of a row earns, however it is written; None where there is none."""
        scores = [score for one in self._own if (score := one.score(place)) is not None]
        return max(scores, default=None)

    def _reads_answers(self) -> bool:
        """It needs them, has solutions, or prefers a row's own answer to another row's in most rows.

        Of a reward of the length, say, neither kind of answer earns more in most of them.
        """
        if self._reward.has_solutions or "answer" in self._reward.entry.needs:
            return True
        for other in self._others:
            own = next((one for one in self._own if one.candidate.form == other.candidate.form), None)
            if own is None or other.candidate.name != ANOTHER_ROWS:
                continue
            pairs = [(own.score(place), other.score(place)) for place in range(len(self._rows))]
            known = [(mine, theirs) for mine, theirs in pairs if mine is not None and theirs is not None]
            more = sum((mine > theirs) - (mine < theirs) for mine, theirs in known)
            if more > MOST_ROWS * len(known):
                return True
        return False

    def _right_finding(self) -> RewardFinding:
        said = next((one for one in self._own if one.candidate.is_solution), None)
        problems, known = [], [right for right in self._rights if right is not None]
        for place, row in enumerate(self._rows):
            score = None if said is None else said.score(place)
            if said is not None and score is not None and score < FULL_CREDIT:
                problems.append(
                    f"{row.source}: the row's own answer, written as {shown(said.candidate.texts[place])}, "
                    f"earns {score:g}, expected 1: no response could be right"
                )
        nothing = [place for place in range(len(self._rows)) if self._earns_nothing(place)]
        if len(nothing) > BY_CHANCE * len(known) and not problems:
            first = self._rows[nothing[0]]
            problems.append(
                f"the right answer earns nothing in {len(nothing)} of {len(known)} rows, however it is "
                f"written; the first is {first.source} ({shown(first.answers[0])})"
            )
        hidden = len(self._rows) - len(known)
        note = f"no right answer is known in {hidden} of {len(self._rows)} rows ({self._why_unknown})"
        return RewardFinding(
            property="right",
            says="the right answer earns what it should",
            problems=tuple(_few(problems)),
            notes=((f"{note}: full marks are 1 there",) if hidden else ()) + tuple(self._notes_on_forms()),
        )

    def _earns_nothing(self, place: int) -> bool:
        right = self._rights[place]
        others = [score for one in self._others if (score := one.score(place)) is not None]
        return right is not None and right <= min([0.0, *others])

    def _notes_on_forms(self) -> Iterator[str]:
        """The ways to write a right answer that cost its score."""
        for one in self._judged:
            if one.candidate.kind != "variant":
                continue
            pairs = [
                (score, right)
                for place, right in enumerate(self._rights)
                if right is not None and (score := one.score(place)) is not None
            ]
            lost = sum(score < right - _EPSILON for score, right in pairs)
            if lost:
                way = f"{one.candidate.name} ({one.candidate.form})"
                yield f"{way} earns less in {lost / len(pairs):.0%} of the rows"

    def _wrong_finding(self) -> RewardFinding:
        by_task: dict[str, list[int]] = defaultdict(list)
        for place, row in enumerate(self._rows):
            by_task[row.task].append(place)
        problems: list[str] = []
        notes: list[str] = []
        for task, places in sorted(by_task.items()):
            holes = [hole for one in self._others if (hole := self._hole(one, places)) is not None]
            large = _largest_of_each([hole for hole in holes if hole.is_large])
            small = _largest_of_each([hole for hole in holes if not hole.is_large])
            begin = f"{task}: " if task else ""
            if large:
                problems.append(begin + _in_words(large))
            elif small:
                notes.append(begin + _in_words(small))
        return RewardFinding(
            property="wrong",
            says="no wrong answer earns what a right one does",
            problems=tuple(problems),
            notes=(*notes, *self._best_constant()),
        )

    def _hole(self, one: Judged, places: Sequence[int]) -> Hole | None:
        """The rows in which a candidate earns full marks and is not the row's answer; None without any."""
        candidate = one.candidate
        differ, earning = [], []
        for place in places:
            answer, score = candidate.answers[place], one.score(place)
            if answer is None or score is None or is_own(answer, self._rows[place]):
                continue
            differ.append(place)
            if is_full(score, self.full_marks[place]) and not self._earns_nothing(place):
                earning.append(place)
        asked = [(candidate.answers[place] or "", self._rows[place]) for place in earning]
        equal = self._mathematics.equal(asked) if asked else []
        earning, same = (
            [place for place, is_equal in zip(earning, equal, strict=True) if not is_equal],
            sum(equal),
        )
        if not earning:
            return None
        return Hole(
            name=candidate.name,
            form=candidate.form,
            text=candidate.texts[earning[0]] or "",
            source=self._rows[earning[0]].source,
            own=(self._rows[earning[0]].answers or (None,))[0],
            num_earning=len(earning),
            num_wrong=len(differ) - same,
        )

    def _best_constant(self) -> Iterator[str]:
        """In one line, the constant that earns most, beside the right answer."""
        constants = [one for one in self._others if one.candidate.kind == "constant" and one.mean is not None]
        if not constants:
            return
        best = max(constants, key=lambda one: one.mean or 0.0)
        rights = [right for right in self._rights if right is not None]
        right = f"the right answer {sum(rights) / len(rights):.2f}" if rights else "no right answer is known"
        texts = dict.fromkeys(text for text in best.candidate.texts if text is not None)
        text = f" ({shown(next(iter(texts)))})" if len(texts) == 1 and texts != {"": None} else ""
        yield f"a constant, {best.candidate.name}{text}, earns {best.mean:.2f} on average, {right}"

    def _twice_finding(self) -> RewardFinding:
        problems = [
            f"{self._rows[place].source}: {shown(one.candidate.texts[place])} got {first.reward:g}, then "
            f"{again.reward:g}"
            for one in self._judged
            for place, (first, again) in enumerate(zip(one.first, one.again, strict=True))
            if first is not None
            and again is not None
            and first.outcome == again.outcome == "ok"
            and (first.reward, first.lenient) != (again.reward, again.lenient)
        ]
        return RewardFinding(
            property="twice",
            says="the same response gets the same reward twice, in another order",
            problems=tuple(_few(problems)),
        )

    def _calls_finding(self) -> RewardFinding:
        failed: Counter[str] = Counter()
        firsts: dict[str, str] = {}
        num_calls = num_retried = 0
        for one in self._judged:
            for place, part in _placed(one):
                num_calls += 1
                num_retried += part.is_retried and part.outcome == "ok"
                if part.outcome != "ok":
                    failed[part.outcome] += 1
                    text = shown(one.candidate.texts[place])
                    firsts.setdefault(
                        part.outcome,
                        f"{self._rows[place].source}, {text} ({one.candidate.name}): {part.detail}",
                    )
        problems = [
            f"{count} of {num_calls} calls ended with {outcome}; the first: {firsts[outcome]}"
            for outcome, count in failed.items()
        ]
        note = f"{num_retried} calls failed once, and not again in another worker"
        return RewardFinding(
            property="calls",
            says="every response is judged, in the time that the workers have",
            problems=tuple(problems),
            notes=(note,) if num_retried else (),
        )


def _largest_of_each(holes: Iterable[Hole]) -> list[Hole]:
    """One of each name, the largest first."""
    largest: dict[str, Hole] = {}
    for hole in sorted(holes, key=lambda hole: -hole.share):
        largest.setdefault(hole.name, hole)
    return list(largest.values())


def _in_words(holes: Sequence[Hole]) -> str:
    first, *more = holes
    own = "" if first.own is None else f", where the answer is {shown(first.own)}"
    also = ", ".join(f"{hole.name} ({hole.share:.0%})" for hole in more)
    are_answers = {hole.name for hole in holes} <= {ANOTHER_ROWS, MOST_FREQUENT}
    return (
        f"{first.name} earns full marks in {first.num_earning} of the {first.num_wrong} rows that have "
        f"another answer: {shown(first.text)} in {first.source}{own}"
        + (f"; also {also}" if also else "")
        + ("; it is right there, too, or nothing looks at the row's question" if are_answers else "")
    )


def _placed(one: Judged) -> Iterator[tuple[int, Part]]:
    for parts in (one.first, one.again):
        yield from ((place, part) for place, part in enumerate(parts) if part is not None)


_MOST_TOLD = 3
_LONGEST_SHOWN = 60


def _few(lines: Sequence[str]) -> list[str]:
    hidden = len(lines) - _MOST_TOLD
    return [*lines[:_MOST_TOLD], *([f"and {hidden} more"] if hidden > 0 else [])]


def shown(text: str | None) -> str:
    """A text in quotes, cut where it is long."""
    shown = repr(text or "")
    return shown if len(shown) <= _LONGEST_SHOWN else shown[: _LONGEST_SHOWN - 4] + "...'"
