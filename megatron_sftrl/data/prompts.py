"""The prompts of a GRPO run: tokenized once, each with the row that its rewards look at."""

from __future__ import annotations

import hashlib
import json
import logging
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from pathlib import Path

import numpy as np

from megatron_sftrl.config.data import Learning, PromptColumns
from megatron_sftrl.data.chat import encode_prompt, tokenize_row
from megatron_sftrl.data.formats import FormattedRow, read_formatted
from megatron_sftrl.data.mixture import Mixture, describe_mixture, plan_mixture, with_mixture
from megatron_sftrl.data.sources import check_source
from megatron_sftrl.data.tokenizer import Tokenizer
from megatron_sftrl.errors import UserError

LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptRow:
    """Ids that responses continue, where the row stands (such as `train.jsonl:17`), and its columns.

    Among them is the answer, wherever the row's format has it. `demonstration` has the ids of the row's own
    response, its end token included, where one is asked for and there.
    """

    tokens: tuple[int, ...]
    values: Mapping[str, object]
    source: str
    demonstration: array[int] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptSet:
    """Rows in the order of the files, at least one; a hash by which a resume on changed ones is noticed.

    Args:
        sizes: rows of each path.
        mixture: what an epoch takes of each path; all rows when None.
    """

    rows: tuple[PromptRow, ...]
    fingerprint: str
    sizes: tuple[int, ...] = ()
    mixture: Mixture | None = None

    @property
    def num_drawn(self) -> int:
        """Prompts of one epoch."""
        return len(self.rows) if self.mixture is None else self.mixture.num_rows

    def with_weights(self, weights: Sequence[float], paths: Sequence[Path]) -> PromptSet:
        """The same rows, of which an epoch takes shares of prompts, told in the log.

        Raises:
            UserError: as plan_mixture.
        """
        mixture = plan_mixture(weights, sizes=self.sizes, amounts=self.sizes, paths=paths)
        counts = np.ones(mixture.num_rows, np.int64)
        LOGGER.info("data.train: %s", describe_mixture(mixture, counts, "prompts", paths))
        return replace(self, mixture=mixture, fingerprint=with_mixture(self.fingerprint, mixture))


def read_prompt_set(
    paths: Sequence[Path],
    tokenizer: Tokenizer,
    *,
    max_prompt_length: int,
    columns: PromptColumns | None = None,
    key: str = "data.train",
    longest_demonstration: int | None = None,
) -> PromptSet:
    """Read and tokenize every row; `columns` are data.columns, `key` is where the paths stand there.

    Args:
        longest_demonstration: tokens of the longest response of a row; responses are not read when None.
    Raises:
        UserError: a source or row that cannot be used, a prompt or a response that is too long, a source
            without rows, or responses are read and no row has one.
    """
    rows, sizes = [], []
    digest = hashlib.sha256()
    for path in paths:
        check_source(path, key)
        before = len(rows)
        for row in read_formatted(path, "prompts", columns=columns, key=key):
            prompt, text = tokenize_prompt(tokenizer, row)
            check_prompt_length(prompt, max_prompt_length)
            if longest_demonstration is not None:
                prompt = with_demonstration(tokenizer, row, prompt, longest_demonstration)
                digest.update(prompt.demonstration or b"")
            rows.append(prompt)
            digest.update(text)
        if len(rows) == before:
            raise UserError(f"{key}: no prompts in {path}; remove it from {key}, or write it again")
        sizes.append(len(rows) - before)
    if longest_demonstration is not None and all(row.demonstration is None for row in rows):
        raise UserError(
            f"rollout.demonstrations: no row of {key} has a response (in response, completion or target): "
            "name its column by data.columns.response, or set rollout.demonstrations=0 to generate all"
        )
    return PromptSet(rows=tuple(rows), fingerprint=digest.hexdigest(), sizes=tuple(sizes))


def tokenize_prompt(tokenizer: Tokenizer, row: FormattedRow) -> tuple[PromptRow, bytes]:
    """The prompt of a row, however long, and what a fingerprint covers of it.

    Raises:
        UserError: the row cannot be used; names its place.
    """
    try:
        tokens = tuple(encode_prompt(tokenizer, row.conversation()))
        values = row.values_with_answer()
    except ValueError as error:
        raise UserError(f"{row.source}: {error}") from error
    prompt = PromptRow(tokens=tokens, values=values, source=row.source)
    return prompt, _as_json(tokens, values, row.source)


def with_demonstration(tokenizer: Tokenizer, row: FormattedRow, prompt: PromptRow, longest: int) -> PromptRow:
    """The row with the tokens of its response, where it has one.

    Raises:
        UserError: the response cannot be used, or is longer than `longest` tokens.
    """
    try:
        conversation = row.demonstration()
        if conversation is None:
            return prompt
        ids, mask = tokenize_row(tokenizer, conversation, Learning(turns="last_turn"))
    except ValueError as error:
        raise UserError(f"{row.source}: {error}") from error
    start = len(prompt.tokens)
    assert tuple(ids[:start]) == prompt.tokens and mask == [i >= start for i in range(len(ids))], (
        "what is learned of a single answer is what is generated behind its prompt"
    )
    if len(ids) - start > longest:
        raise UserError(
            f"{row.source}: expected a response of at most rollout.max_new_tokens = {longest} tokens, got "
            f"{len(ids) - start} with its end token; raise it, or remove the response from the row"
        )
    return replace(prompt, demonstration=array("i", ids[start:]))


def check_prompt_length(prompt: PromptRow, max_prompt_length: int) -> None:
    """Raise UserError for a prompt of more tokens."""
    if len(prompt.tokens) > max_prompt_length:
        raise UserError(
            f"{prompt.source}: expected at most data.max_prompt_length = {max_prompt_length} tokens, got "
            f"{len(prompt.tokens)}; raise it or remove the row"
        )


def _as_json(tokens: tuple[int, ...], values: Mapping[str, object], source: str) -> bytes:
    """What the fingerprint covers of a row; rows travel to the reward workers as JSON."""
    try:
        return json.dumps([tokens, values], sort_keys=True).encode()
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{source}: expected text, numbers, lists and objects in every column, which reach the rewards "
            f"as JSON, got {error}; convert or remove the column"
        ) from error


def end_token_ids(tokenizer: Tokenizer) -> frozenset[int]:
    """Ids that end a response: the tokenizer's end token, and the one that training puts behind a turn.

    A base model's tokenizer may end texts with one token and its chat template turns with another.
    """
    return frozenset({tokenizer.eos_id, _end_of_turn(tokenizer)})


def _end_of_turn(tokenizer: Tokenizer) -> int:
    """The last token of a learned turn."""
    try:
        ids, mask = tokenize_row(tokenizer, {"prompt": "a", "response": "b"}, Learning(thinking="cut"))
    except UserError:
        # No row of text trains this template as it is. What it prints behind a turn still ends one.
        return _printed_end_of_turn(tokenizer)
    return ids[max(index for index, is_learned in enumerate(mask) if is_learned)]


def _printed_end_of_turn(tokenizer: Tokenizer) -> int:
    """The last special token that the template prints behind an answer, with only white space behind it."""
    assert tokenizer.chat_template is not None, "without a template every row of text can be tokenized"
    question = {"role": "user", "content": "a"}
    texts = []
    for answer in ("b", "c"):
        try:
            texts.append(tokenizer.chat_template.render([question, {"role": "assistant", "content": answer}]))
        except UserError:
            return tokenizer.eos_id  # a template of prompts alone prints no end
    if texts[0] == texts[1]:
        return tokenizer.eos_id  # it prints no answer either
    # What stands behind the answer is equal in both texts.
    pairs = zip(reversed(texts[0]), reversed(texts[1]), strict=False)
    behind = "".join(one for one, _ in takewhile(lambda pair: pair[0] == pair[1], pairs))[::-1]
    ids = tokenizer.encode_continuation(behind)
    places = [index for index, token in enumerate(ids) if token in tokenizer.special_ids]
    if not places or tokenizer.decode(ids[places[-1] + 1 :]).strip():
        return tokenizer.eos_id
    return ids[places[-1]]
