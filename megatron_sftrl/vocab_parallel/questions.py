"""Questions about distributions, answered together and only once.

Each distribution is a `Subject`: its logits and the answers it already gave. `answers` takes questions about
any number of subjects, evaluates what is not known in one MAX and one SUM all-reduce, and remembers it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from megatron_sftrl.vocab_parallel.collectives import Meanwhile
from megatron_sftrl.vocab_parallel.evaluation import evaluate
from megatron_sftrl.vocab_parallel.rows import Source
from megatron_sftrl.vocab_parallel.statistics import Expectation, LogSumExp, Pick, Statistic, Total


@dataclass(slots=True, kw_only=True, eq=False)
class Answer:
    """A known value, and the ids it is about: the tensor itself and its version when it was asked."""

    value: Tensor
    ids: Tensor | None = None
    ids_version: int = 0


@dataclass(slots=True, kw_only=True, eq=False)
class Subject:
    """One distribution.

    Args:
        source: its logits.
        known: answers so far, by kind and identity of the ids.
        anticipated: labels whose log-probabilities, with the entropy, come along with the first question.
        meanwhile: work for the time of the reductions behind its answers.
    """

    source: Source
    known: dict[tuple[str, int], Answer] = field(default_factory=dict)
    anticipated: Tensor | None = None
    meanwhile: Meanwhile | None = None

    @property
    def needs_grad(self) -> bool:
        """An answer asked now has to carry a gradient."""
        return self.source.requires_grad and torch.is_grad_enabled()

    def remember(self, kind: str, value: Tensor, ids: Tensor | None = None) -> None:
        """Keep an answer; ids are held, so that their identity stays theirs."""
        version = 0 if ids is None else ids._version
        self.known[kind, id(ids)] = Answer(value=value, ids=ids, ids_version=version)

    def detached(self) -> Subject:
        """The same distribution without gradient, knowing what this one knows."""
        if not self.source.requires_grad:
            return self
        source = replace(self.source, origin=self.source.origin.detach())
        known = {
            key: Answer(value=answer.value.detach(), ids=answer.ids, ids_version=answer.ids_version)
            for key, answer in self.known.items()
        }
        return Subject(source=source, known=known)


@dataclass(frozen=True, slots=True, eq=False)
class Question:
    """log_sum: log sum exp(z - M).  mean: E_p[z - M].  total: sum (z - M).  pick: z - M at the ids `about`.
    under: E_q[z - M], q the distribution `about`; every expectation but this one is remembered."""

    of: Subject
    kind: Literal["log_sum", "mean", "total", "pick", "under"]
    about: Tensor | Subject | None = None

    def statistic(self) -> Statistic:
        """What `evaluate` computes for this question."""
        source = self.of.source
        if self.kind == "log_sum":
            return LogSumExp(source)
        if self.kind == "mean":
            return Expectation(source, source)
        if self.kind == "total":
            return Total(source)
        if isinstance(self.about, Tensor):
            return Pick(source, self.about)
        assert isinstance(self.about, Subject)
        return Expectation(self.about.source, source)

    def recall(self) -> Tensor | None:
        """The answer, if it is known and carries a gradient where one is needed."""
        answer = self.of.known.get((self.kind, id(self.about)))
        if answer is None or (self.of.needs_grad and not answer.value.requires_grad):
            return None
        is_same = answer.ids is None or answer.ids._version == answer.ids_version
        return answer.value if is_same else None


def answers(questions: Sequence[Question]) -> list[Tensor]:
    """[T] for each question, in order."""
    results = [question.recall() for question in questions]
    if all(value is not None for value in results):
        return [value for value in results if value is not None]
    unknown = [question for question, value in zip(questions, results, strict=True) if value is None]
    asked = unknown + [question for question in _company(questions) if question.recall() is None]
    asked = list({(id(q.of), q.kind, id(q.about)): q for q in asked}.values())
    found: dict[tuple[int, str, int], Tensor] = {}
    meanwhile = next((q.of.meanwhile for q in asked if q.of.meanwhile is not None), None)
    for question, value in zip(asked, evaluate([q.statistic() for q in asked], meanwhile), strict=True):
        found[id(question.of), question.kind, id(question.about)] = value
        if not isinstance(question.about, Subject):
            question.of.remember(question.kind, value, question.about)
    return [
        found[id(question.of), question.kind, id(question.about)] if value is None else value
        for question, value in zip(questions, results, strict=True)
    ]


def _company(questions: Sequence[Question]) -> list[Question]:
    """What comes along: the entropy of whatever is trained (every step logs it) and what was anticipated."""
    along: list[Question] = []
    for subject in {id(question.of): question.of for question in questions}.values():
        if subject.needs_grad or subject.anticipated is not None:
            along += [Question(subject, "log_sum"), Question(subject, "mean")]
        if subject.anticipated is not None:
            along.append(Question(subject, "pick", subject.anticipated))
    return along
