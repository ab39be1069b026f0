"""Rows to tokens and masks, many at a time, each checked."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from megatron_sftrl.config.data import ALL_TURNS, Learning
from megatron_sftrl.data.chat import tokenize_sequences
from megatron_sftrl.data.conversation import is_left_out
from megatron_sftrl.data.examples import Example, Truncation, truncate
from megatron_sftrl.data.formats import FormattedRow
from megatron_sftrl.data.rows import read_behavior_scores, read_scorer
from megatron_sftrl.data.tokenizer import Tokenizer
from megatron_sftrl.errors import UserError

_CHUNK = 256
"""Rows that are tokenized at a time."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenizedRows:
    """The sequences of a chunk that are kept, r of them, one behind the other in n tokens.

    Args:
        tokens: [n] int32.
        loss_mask: [n] bool.
        behavior_logprobs: [n] fp32 nats, 0 where not learned or where a row has no scores.
        lengths: [r] int64.
        kept: [r] int64, the places of their rows in the chunk.
        num_dropped: sequences that were dropped, and rows that say that they are left out.
        is_scored: [r] bool.
        scorers: the different texts of read_scorer() in them.
    """

    tokens: NDArray[np.int32]
    loss_mask: NDArray[np.bool_]
    behavior_logprobs: NDArray[np.float32]
    lengths: NDArray[np.int64]
    kept: NDArray[np.int64]
    is_scored: NDArray[np.bool_]
    num_dropped: int
    num_truncated: int
    scorers: frozenset[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokenizing:
    """How rows become tokens; with use_scores their behaviour scores come along."""

    tokenizer: Tokenizer
    max_length: int
    truncation: Truncation
    learning: Learning = ALL_TURNS
    use_scores: bool = True

    def tokenize(self, rows: Sequence[FormattedRow], first_row: int) -> TokenizedRows:
        """Every row; `first_row` is the number of the first one over all sources.

        Raises:
            UserError: a row that cannot be used, named by file and line.
        """
        kept, examples, num_dropped, num_truncated = [], [], 0, 0
        for index, row in enumerate(rows):
            whole = whole_examples(self.tokenizer, self.learning, row, first_row + index)
            cuts = cut_examples(self.tokenizer, whole, max_length=self.max_length, truncation=self.truncation)
            found = with_scores(row, whole, cuts) if self.use_scores else cuts
            left = [example for example in found if example is not None]
            kept += [index] * len(left)
            examples += left
            num_dropped += len(found) - len(left) if whole else 1
            num_truncated += sum(
                cut is not None and cut is not full for full, cut in zip(whole, cuts, strict=True)
            )
        return _joined(
            examples,
            kept=kept,
            num_dropped=num_dropped,
            num_truncated=num_truncated,
            scorers=frozenset(read_scorer(rows[index].values) for index in kept),
        )


def whole_examples(
    tokenizer: Tokenizer, learning: Learning, row: FormattedRow, row_over_all: int
) -> list[Example]:
    """The whole examples of a row, without their scores; none where the row says that it is left out.

    Raises:
        UserError: the row cannot be used; names its place.
    """
    if is_left_out(row.values):
        return []
    try:
        sequences = tokenize_sequences(tokenizer, row.conversation(), learning)
    except ValueError as error:
        raise UserError(f"{row.source}: {error}") from error
    return [
        Example(
            tokens=np.array(ids, np.int32),
            loss_mask=np.array(mask, np.bool_),
            behavior_logprobs=None,
            row=row_over_all,
            source=row.source,
        )
        for ids, mask in sequences
    ]


def cut_examples(
    tokenizer: Tokenizer, whole: Sequence[Example], *, max_length: int, truncation: Truncation
) -> list[Example | None]:
    """What truncate() leaves of each example, an opening token in its place."""
    return [
        truncate(
            full,
            max_length=max_length,
            truncation=truncation,
            keep_first=int(full.tokens[0]) == tokenizer.bos_id,
        )
        for full in whole
    ]


def with_scores(
    row: FormattedRow, whole: Sequence[Example], cuts: Sequence[Example | None]
) -> list[Example | None]:
    """The examples of a row with its behaviour scores, if it has any: one after the other in its columns.

    Raises:
        UserError: the scores do not fit the row; names its place.
    """
    if not whole:
        return []
    learned = np.concatenate([full.loss_token_ids for full in whole])
    num_kept = len(learned)
    if len(cuts) == 1 and cuts[0] is not None:
        # One sequence may carry the scores of what remains of it.
        num_kept = cuts[0].num_loss_tokens
    try:
        scores = read_behavior_scores(row.values, loss_token_ids=learned, num_kept=num_kept)
    except ValueError as error:
        raise UserError(f"{row.source}: {error}") from error
    if scores is None:
        return list(cuts)
    found: list[Example | None] = []
    for full, cut in zip(whole, cuts, strict=True):
        own, scores = scores[: full.num_loss_tokens], scores[full.num_loss_tokens :]
        found.append(cut and replace(cut, behavior_logprobs=own[: cut.num_loss_tokens]))
    return found


def _joined(
    examples: Sequence[Example],
    *,
    kept: Sequence[int],
    num_dropped: int,
    num_truncated: int,
    scorers: frozenset[str],
) -> TokenizedRows:
    scores = [np.zeros(len(each.tokens), np.float32) for each in examples]
    for score, example in zip(scores, examples, strict=True):
        if example.behavior_logprobs is not None:
            score[example.loss_mask] = example.behavior_logprobs
    return TokenizedRows(
        tokens=np.concatenate([np.zeros(0, np.int32), *(each.tokens for each in examples)]),
        loss_mask=np.concatenate([np.zeros(0, np.bool_), *(each.loss_mask for each in examples)]),
        behavior_logprobs=np.concatenate([np.zeros(0, np.float32), *scores]),
        lengths=np.array([len(each.tokens) for each in examples], np.int64),
        kept=np.array(kept, np.int64),
        is_scored=np.array([each.behavior_logprobs is not None for each in examples], np.bool_),
        num_dropped=num_dropped,
        num_truncated=num_truncated,
        scorers=scorers,
    )


# Rendering a template holds Python's lock, so that threads do not help: large data goes to processes. They
# are forked from a server that has imported what they need and has started no thread.

_ALONE = 1.0
"""Seconds of tokenizing before processes are started, which takes as long: smaller data never needs them."""
_MOST = 16
"""Processes that one reader keeps busy."""
_AHEAD = 4
"""Chunks for each process that are read before the first of them is done."""


def tokenize_rows(
    rows: Iterator[FormattedRow], tokenizing: Tokenizing, *, num_processes: int = 1
) -> Iterator[tuple[list[FormattedRow], TokenizedRows]]:
    """All rows in order, in chunks, with what became of each chunk.

    Where it takes longer than a second `num_processes` processes do the work, if they are more than one.

    Raises:
        UserError: a row that cannot be read or used, named by file and line: the first such row.
        RuntimeError: a process has died.
    """
    chunks, first_row, used = _chunks(rows), 0, 0.0
    for chunk in chunks:
        start = time.monotonic()
        tokenized = tokenizing.tokenize(chunk, first_row)
        used += time.monotonic() - start
        yield chunk, tokenized
        first_row += len(chunk)
        if num_processes > 1 and used >= _ALONE:
            yield from _in_processes(chunks, tokenizing, num_processes, first_row)


def processes_of_this_rank(*, is_alone: bool) -> int:
    """Processors that this rank may use; `is_alone`: the node's other ranks wait for it meanwhile."""
    ranks = 1 if is_alone else int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(len(os.sched_getaffinity(0)) // ranks, _MOST))


def _in_processes(
    chunks: Iterator[list[FormattedRow]], tokenizing: Tokenizing, num_processes: int, first_row: int
) -> Iterator[tuple[list[FormattedRow], TokenizedRows]]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "tokenizers"])
    pool = ProcessPoolExecutor(num_processes, mp_context=context, initializer=_begin, initargs=(tokenizing,))
    under_way: deque[tuple[list[FormattedRow], Future[TokenizedRows]]] = deque()
    stopped: UserError | None = None
    chunk: list[FormattedRow] = []
    try:
        while True:
            while stopped is None and len(under_way) < _AHEAD * num_processes:
                try:
                    chunk = next(chunks)
                except StopIteration:
                    break
                except UserError as error:
                    stopped = error  # a row further up may be at fault as well, and is told first
                    break
                under_way.append((chunk, pool.submit(_tokenize, chunk, first_row)))
                first_row += len(chunk)
            if not under_way:
                break
            chunk, future = under_way.popleft()
            yield chunk, future.result()
    except BrokenProcessPool as error:
        raise RuntimeError(
            f"a process that tokenizes rows has died (it was killed, or memory ran out), at or behind "
            f"{chunk[0].source}"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)
    if stopped is not None:
        raise stopped


_TOKENIZING: Tokenizing | None = None
"""In a process of the pool, what it was started with."""


def _begin(tokenizing: Tokenizing) -> None:
    global _TOKENIZING
    _TOKENIZING = tokenizing
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # one thread each
    for number in (signal.SIGINT, signal.SIGUSR1):  # the process that has started this one decides
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _tokenize(rows: list[FormattedRow], first_row: int) -> TokenizedRows:
    assert _TOKENIZING is not None
    return _TOKENIZING.tokenize(rows, first_row)


def _chunks(rows: Iterator[FormattedRow]) -> Iterator[list[FormattedRow]]:
    """Rows in lists; those in front of one that cannot be read come first, and may be at fault themselves."""
    chunk: list[FormattedRow] = []
    try:
        for row in rows:
            chunk.append(row)
            if len(chunk) == _CHUNK:
                yield chunk
                chunk = []
    except UserError:
        if chunk:
            yield chunk
        raise
    if chunk:
        yield chunk
