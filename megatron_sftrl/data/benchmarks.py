r"""Rows of the usual benchmarks, in the columns in which they are published, as questions with one answer.

    gsm8k          question; answer: a solution that ends in #### 18
    math           MATH, AIME, AMC: problem (or Problem, question); answer, or else a solution with a \boxed{}
    mmlu           question; choices: texts; answer: the place of the right one, from 0
    mmlu_pro       question; options: texts; answer: a letter; answer_index
    arc            question; choices: text and label (letters or numbers); answerKey: a label
    gpqa           Question; Correct Answer; Incorrect Answer 1, 2, 3
    reasoning_gym  question; answer, or null where the task's verifier needs none; metadata

Options become letters in the order of the row. GPQA has no order, and would have the right option first: its
options are put in the order of the SHA-256 of question and option, the same in every run.
"""

from __future__ import annotations

import hashlib
import string
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from megatron_sftrl.errors import UserError

Row = Mapping[str, object]

BOXED = r"Reason step by step, and put the final answer within \boxed{}."
BOXED_LETTER = r"Reason step by step, and put the letter of the right option within \boxed{}."
TAGGED = "Reason step by step, and put the final answer between <answer> and </answer>."


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """What a row asks; with options (in the order of their letters), the answer is one of the letters."""

    text: str
    answer: object
    options: tuple[str, ...] = ()

    def prompt(self, instruction: str) -> str:
        """Question, options behind their letters, and the instruction, an empty line between them."""
        lettered = [
            f"{letter}. {option}"
            for letter, option in zip(string.ascii_uppercase, self.options, strict=False)
        ]
        return "\n\n".join(part for part in (self.text, "\n".join(lettered), instruction) if part)


@dataclass(frozen=True, slots=True, kw_only=True)
class Benchmark:
    """How rows of a benchmark are read.

    Args:
        columns: that a row must have; of alternatives (`problem|question`) one.
        read: UserError, naming the column, for values that make no question.
        known_by: a column that tells the rows from bare questions; without one they have to be asked for by
            name.
        instruction: behind the question, unless data.columns has another.
    """

    name: str
    columns: tuple[str, ...]
    read: Callable[[Row], Question]
    known_by: str | None
    instruction: str

    def missing(self, row: Row) -> list[str]:
        """The columns that a row lacks."""
        return [column for column in self.columns if not _has(row, column)]

    def is_meant(self, row: Row) -> bool:
        """The row has its column, and no prompt of its own."""
        has_prompt = _has(row, "prompt|messages")
        return self.known_by is not None and _has(row, self.known_by) and not has_prompt

    def fits(self, row: Row) -> bool:
        """The row is meant to be this, and lacks nothing."""
        return self.is_meant(row) and not self.missing(row)


def _has(row: Row, column: str) -> bool:
    """One of the alternatives; a null is no column, as columnar files fill in what other rows have."""
    return any(row.get(name) is not None for name in column.split("|"))


def _text(row: Row, column: str) -> str:
    return _as_text(row[column], column)


def _as_text(value: object, column: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{column}: expected a text, got {value!r}")
    return value.strip()


def _texts(value: object, column: str) -> tuple[str, ...]:
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise UserError(f"{column}: expected a list of texts, got {type(value).__name__}")
    if not 2 <= len(value) <= len(string.ascii_uppercase):
        raise UserError(f"{column}: expected 2 to 26 options, got {len(value)}")
    return tuple(_as_text(each, f"{column}[{number}]") for number, each in enumerate(value))


def _letter(place: object, options: Sequence[str], column: str) -> str:
    if isinstance(place, bool) or not isinstance(place, int) or not 0 <= place < len(options):
        raise UserError(f"{column}: expected 0 to {len(options) - 1}, the place of an option, got {place!r}")
    return string.ascii_uppercase[place]


def _gsm8k(row: Row) -> Question:
    answer = _text(row, "answer")
    if not answer.rpartition("####")[1] or not answer.rpartition("####")[2].strip():
        raise UserError("answer: expected a solution that ends in #### and the answer")
    return Question(text=_text(row, "question"), answer=answer)


def _math(row: Row) -> Question:
    text = _text(row, next(name for name in ("problem", "Problem", "question") if row.get(name) is not None))
    for name in ("answer", "Answer"):
        if (answer := row.get(name)) is not None:
            # AMC's answers are floating point numbers in its file: 142.0.
            whole = int(answer) if isinstance(answer, float) and answer.is_integer() else answer
            if isinstance(whole, bool) or not isinstance(whole, str | int | float) or whole == "":
                raise UserError(f"{name}: expected text or a number, got {answer!r}")
            return Question(text=text, answer=whole)
    name = next(name for name in ("solution", "Solution") if row.get(name) is not None)
    solution = _text(row, name)
    if r"\boxed" not in solution and r"\fbox" not in solution:
        raise UserError(rf"{name}: expected a solution with \boxed{{}}, or a column answer; got neither")
    return Question(text=text, answer=solution)


def _mmlu(row: Row) -> Question:
    options = _texts(row["choices"], "choices")
    return Question(
        text=_text(row, "question"), answer=_letter(row["answer"], options, "answer"), options=options
    )


def _mmlu_pro(row: Row) -> Question:
    options = _texts(row["options"], "options")
    letter = _letter(row["answer_index"], options, "answer_index")
    if row["answer"] != letter:
        raise UserError(f"answer: expected {letter}, the letter of answer_index, got {row['answer']!r}")
    return Question(text=_text(row, "question"), answer=letter, options=options)


def _arc(row: Row) -> Question:
    choices = row["choices"]
    if not isinstance(choices, Mapping) or not {"text", "label"} <= choices.keys():
        raise UserError(f"choices: expected text and label, got {choices!r}")
    options, labels = _texts(choices["text"], "choices.text"), _texts(choices["label"], "choices.label")
    if len(options) != len(labels) or len(set(labels)) < len(labels):
        raise UserError(f"choices.label: expected one for each of {len(options)} options, got {labels}")
    if row["answerKey"] not in labels:
        raise UserError(f"answerKey: expected one of {', '.join(labels)}, got {row['answerKey']!r}")
    place = labels.index(str(row["answerKey"]))
    return Question(text=_text(row, "question"), answer=string.ascii_uppercase[place], options=options)


_GPQA = ("Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3")


def _gpqa(row: Row) -> Question:
    text, right = _text(row, "Question"), _text(row, _GPQA[0])
    options = sorted(
        (_text(row, column) for column in _GPQA),
        key=lambda option: hashlib.sha256(f"{text}\0{option}".encode()).digest(),
    )
    if options.count(right) > 1:
        raise UserError(f"Correct Answer: {right!r} is an incorrect answer, too")
    return Question(text=text, answer=string.ascii_uppercase[options.index(right)], options=tuple(options))


def _reasoning_gym(row: Row) -> Question:
    metadata = row.get("metadata")
    if not isinstance(metadata, Mapping) or not isinstance(metadata.get("source_dataset"), str):
        raise UserError(f"metadata: expected an object with source_dataset, got {metadata!r}")
    return Question(text=_text(row, "question"), answer=row.get("answer"))


def _benchmark(
    name: str,
    read: Callable[[Row], Question],
    columns: tuple[str, ...],
    *,
    known_by: str | None = None,
    instruction: str = BOXED,
) -> Benchmark:
    return Benchmark(name=name, columns=columns, read=read, known_by=known_by, instruction=instruction)


_ALL = (
    _benchmark("gsm8k", _gsm8k, ("question", "answer")),
    _benchmark(
        "math",
        _math,
        ("problem|Problem|question", "answer|Answer|solution|Solution"),
        known_by="problem|Problem",
    ),
    _benchmark(
        "mmlu", _mmlu, ("question", "choices", "answer"), known_by="choices", instruction=BOXED_LETTER
    ),
    _benchmark(
        "mmlu_pro",
        _mmlu_pro,
        ("question", "options", "answer", "answer_index"),
        known_by="options",
        instruction=BOXED_LETTER,
    ),
    _benchmark(
        "arc", _arc, ("question", "choices", "answerKey"), known_by="answerKey", instruction=BOXED_LETTER
    ),
    _benchmark("gpqa", _gpqa, ("Question", *_GPQA), known_by="Correct Answer", instruction=BOXED_LETTER),
    _benchmark("reasoning_gym", _reasoning_gym, ("question",), instruction=TAGGED),
)
BENCHMARKS: Mapping[str, Benchmark] = {each.name: each for each in _ALL}
