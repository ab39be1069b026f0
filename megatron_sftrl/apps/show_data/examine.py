"""Every row as training would take it: what of it is learned, what is cut, what is refused and why.

Rows pass through the functions that training uses, which go on behind a row that is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, cast

import numpy as np

from megatron_sftrl.config.schema import GrpoConfig, RunConfig, TrainingConfig
from megatron_sftrl.data.examples import Example
from megatron_sftrl.data.formats import FormattedRow, read_formatted
from megatron_sftrl.data.prompts import check_prompt_length, tokenize_prompt, with_demonstration
from megatron_sftrl.data.rows import OnRefused
from megatron_sftrl.data.tokenizer import Tokenizer
from megatron_sftrl.data.tokenizing import cut_examples, whole_examples, with_scores
from megatron_sftrl.errors import UserError
from megatron_sftrl.rl.rewards.registry import Json, Reward, build_rewards

# A row as people read it: its text in pieces, each learned or not.


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """Text of neighbouring tokens that are all learned or all not, or of one special token."""

    text: str
    is_learned: bool
    is_special: bool


def pieces_of(tokenizer: Tokenizer, ids: Sequence[int], mask: Sequence[bool]) -> tuple[Piece, ...]:
    """The text of `ids` in order, parted where `mask` changes and around special tokens."""
    kinds = [(bool(learned), i in tokenizer.special_ids) for i, learned in zip(ids, mask, strict=True)]
    starts = [n for n in range(len(kinds)) if n == 0 or kinds[n][1] or kinds[n] != kinds[n - 1]]
    ends = [*starts[1:], len(kinds)]
    # A tokenizer may drop a space in front of the first of the tokens that it decodes, so that the texts of
    # all tokens up to a border are compared, and not those between two borders.
    upto = [tokenizer.decode(ids[:end]) for end in ends]
    before = ["", *upto[:-1]]
    if all(text.startswith(start) for text, start in zip(upto, before, strict=True)):
        texts = [text[len(start) :] for text, start in zip(upto, before, strict=True)]
    else:  # a border inside of a character, where a row was cut
        texts = [tokenizer.decode(ids[start:end]) for start, end in zip(starts, ends, strict=True)]
    return tuple(
        Piece(text=text, is_learned=kinds[start][0], is_special=kinds[start][1])
        for text, start in zip(texts, starts, strict=True)
    )


Fate = Literal["whole", "cut", "dropped", "left out", "refused"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ShownRow:
    """A sequence of a row for people, or the row itself where it gives none.

    Args:
        place: such as `train.jsonl:17`.
        pieces, ids, mask: what is trained on; where that is nothing, or the row is refused, all of it.
        num_tokens: before truncation.
        removed: text that truncation cut out.
        answer: what rewards read as `answer`, of a prompt that has one.
        error: why it is refused.
    """

    place: str
    fate: Fate
    pieces: tuple[Piece, ...] = ()
    ids: tuple[int, ...] = ()
    mask: tuple[bool, ...] = ()
    num_tokens: int = 0
    removed: str = ""
    answer: str | None = None
    error: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExaminedRow:
    """What becomes of a row.

    Args:
        number: as in SourceRow.
        format_title: what the log calls the rows of its file.
        whole: its sequences before truncation; none where the row is left out, or no row that can be used.
        kept: of each of them what is trained on, None when dropped; empty where the row is refused.
        answer, answer_column: of a prompt.
        error: why the row is refused.
    """

    number: int
    place: str
    format_title: str = ""
    whole: tuple[Example, ...] = ()
    kept: tuple[Example | None, ...] = ()
    answer: object = None
    answer_column: str | None = None
    error: UserError | None = None

    def shown(self, tokenizer: Tokenizer) -> list[ShownRow]:
        """The row for people, sequence by sequence."""
        error = "" if self.error is None else str(self.error)
        if not self.whole:
            return [ShownRow(place=self.place, fate="refused" if error else "left out", error=error)]
        found = []
        for number, full in enumerate(self.whole):
            kept = None if error else self.kept[number]
            fate = "refused" if error else _fate(full, kept)
            shown = _shown(tokenizer, full, kept, fate)
            if len(self.whole) > 1:
                shown = replace(shown, place=f"{self.place}, sequence {number + 1} of {len(self.whole)}")
            else:
                shown = replace(shown, place=self.place)
            found.append(replace(shown, answer=None if self.answer is None else str(self.answer)))
        found[0] = replace(found[0], error=error)
        return found


def _fate(full: Example, kept: Example | None) -> Fate:
    if kept is None:
        return "dropped"
    return "cut" if len(kept.tokens) < len(full.tokens) else "whole"


def _shown(tokenizer: Tokenizer, full: Example, kept: Example | None, fate: Fate) -> ShownRow:
    example = full if kept is None else kept
    ids, mask = example.tokens.tolist(), example.loss_mask.tolist()
    whole, removed = full.tokens.tolist(), ""
    if fate == "cut":
        start = next((n for n, (a, b) in enumerate(zip(ids, whole, strict=False)) if a != b), len(ids))
        removed = tokenizer.decode(whole[start : start + len(whole) - len(ids)])
    return ShownRow(
        place=full.source,
        fate=fate,
        pieces=pieces_of(tokenizer, ids, mask),
        ids=tuple(ids),
        mask=tuple(mask),
        num_tokens=len(whole),
        removed=removed,
    )


# Reading.

Take = Callable[[ExaminedRow], None]


class DataReader:
    """Reads the sources of a run as the command that trains it does, and does not stop at a bad row."""

    def __init__(self, config: TrainingConfig, tokenizer: Tokenizer) -> None:
        """Raise UserError for rewards that cannot be built: they say what a row must hold."""
        assert isinstance(config, RunConfig | GrpoConfig)
        self._config, self._tokenizer = config, tokenizer
        self._rewards: tuple[Reward, ...] = ()
        if isinstance(config, GrpoConfig):
            self._rewards = build_rewards(config.rewards)

    def read(self, path: Path, key: str, take: Take) -> None:
        """Hand every row of a source to `take`, in order.

        Raises:
            UserError: the source cannot be read, or not to its end.
        """

        def refuse(number: int, place: str, error: UserError) -> None:
            take(ExaminedRow(number=number, place=place, error=error))

        for row in self._rows(path, key, refuse):
            take(self._examined(row))

    def read_one(self, path: Path, key: str, number: int) -> ExaminedRow:
        """The row of this number; UserError where there is none, or the source cannot be read so far."""
        found: list[ExaminedRow] = []

        def refuse(refused: int, place: str, error: UserError) -> None:
            if refused == number:
                found.append(ExaminedRow(number=number, place=place, error=error))

        for row in self._rows(path, key, refuse):
            if row.number == number:
                found.append(self._examined(row))
            if row.number >= number:
                break
        if not found:
            raise UserError(
                f"--row: {path} has no row {number}; lines of JSONL count from 1, other rows from 0"
            )
        return found[0]

    def _rows(self, path: Path, key: str, refuse: OnRefused) -> Iterator[FormattedRow]:
        kind = "prompts" if isinstance(self._config, GrpoConfig) else "demonstrations"
        return read_formatted(path, kind, columns=self._config.data.columns, key=key, on_refused=refuse)

    def _examined(self, row: FormattedRow) -> ExaminedRow:
        return self._prompt(row) if isinstance(self._config, GrpoConfig) else self._demonstration(row)

    def _demonstration(self, row: FormattedRow) -> ExaminedRow:
        data = cast(RunConfig, self._config).data
        found = ExaminedRow(number=row.number, place=row.source, format_title=row.format.title)
        try:
            whole = whole_examples(self._tokenizer, data.learning, row, 0)
            found = replace(found, whole=tuple(whole))
            cuts = cut_examples(
                self._tokenizer, whole, max_length=data.max_length, truncation=data.truncation
            )
            return replace(found, kept=tuple(with_scores(row, whole, cuts)))
        except UserError as error:
            return replace(found, error=error)

    def _prompt(self, row: FormattedRow) -> ExaminedRow:
        """A prompt as an example of which nothing is learned."""
        config = cast(GrpoConfig, self._config)
        found = ExaminedRow(
            number=row.number,
            place=row.source,
            format_title=row.format.title,
            answer_column=row.format.answer_column(config.data.columns),
        )
        try:
            prompt, _ = tokenize_prompt(self._tokenizer, row)
            tokens = np.array(prompt.tokens, np.int32)
            example = Example(
                tokens=tokens,
                loss_mask=np.zeros(len(tokens), np.bool_),
                behavior_logprobs=None,
                row=0,
                source=row.source,
            )
            found = replace(found, whole=(example,))
            check_prompt_length(prompt, config.data.max_prompt_length)
            if config.rollout.demonstrations:
                with_demonstration(self._tokenizer, row, prompt, config.rollout.max_new_tokens)
            for reward in self._rewards:
                try:
                    reward.check_row(cast(dict[str, Json], prompt.values))
                except UserError as error:
                    raise UserError(f"{row.source}: {error}") from error
        except UserError as error:
            return replace(found, error=error)
        return replace(found, kept=(example,), answer=prompt.values.get("answer"))
