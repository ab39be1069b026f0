"""Ranks that wait for others to tokenize: no limit of a collective ends them, a failure reaches them all."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.ranks import RankError, run_ranks
from tests.unit.data.test_parts import contents, rows_in, write
from tests.unit.data.tokenizers_for_tests import write_byte_level

COLLECTIVES_WAIT = 2
"""Seconds, in these runs."""


class Rows:
    """In the place of RowsToTokenize on rank 0."""

    def __init__(self, work: str) -> None:
        self._work = work

    def write_part(self, index: int, num_parts: int, on_move: Callable[[], None]) -> None:
        assert (index, num_parts) == (0, 1)

    def load(self, *, num_parts: int, on_move: Callable[[], None]) -> None:
        from megatron_sftrl.errors import UserError

        if self._work == "refuses":
            raise UserError("train.jsonl:17: no response")
        if self._work == "dies":
            os._exit(9)
        for _ in range(50):
            time.sleep(0.1 * (COLLECTIVES_WAIT if self._work == "stands still" else 1))
            if self._work == "is slow":
                on_move()


def tokenize(work: str, hang_minutes: float, notes: Path) -> str:
    """What tokenize_once ends with, and in a file of this rank what it was and after how many seconds."""
    import torch.distributed as dist

    from megatron_sftrl.config.schema import ParallelSection
    from megatron_sftrl.engine import parallel as parallel_module
    from megatron_sftrl.trainers.demonstrations import tokenize_once

    original = parallel_module._SECONDS_BEHIND_THE_WATCH
    parallel_module._SECONDS_BEHIND_THE_WATCH = COLLECTIVES_WAIT - hang_minutes * 60  # type: ignore[assignment]
    said, rows, rank = "", [Rows(work)], int(os.environ["RANK"])
    try:
        with parallel_module.parallel_context(ParallelSection(), hang_minutes=hang_minutes) as context:
            dist.barrier()  # Gloo connects at first use: not while a rank works.
            began = time.monotonic()
            try:
                tokenize_once(rows, context, hang_minutes=hang_minutes)  # type: ignore[arg-type]
            except Exception as error:
                said = f"{type(error).__name__}: {error}"
            (notes / str(rank)).write_text(json.dumps([said, time.monotonic() - began]))
    finally:
        parallel_module._SECONDS_BEHIND_THE_WATCH = original
    return said


def test_a_rank_that_tokenizes_longer_than_collectives_wait_is_waited_for(tmp_path: Path) -> None:
    assert run_ranks(2, tokenize, "is slow", 1.5 / 60, tmp_path, group=False) == ["", ""]
    seconds = [json.loads((tmp_path / str(rank)).read_text())[1] for rank in range(2)]
    assert min(seconds) > 2 * COLLECTIVES_WAIT


def test_a_row_that_cannot_be_used_is_an_error_for_the_user_on_every_rank(tmp_path: Path) -> None:
    said = run_ranks(2, tokenize, "refuses", 1.5 / 60, tmp_path, group=False)
    assert said == ["UserError: train.jsonl:17: no response"] * 2


def test_ranks_that_wait_for_one_that_stands_still_end_when_the_watch_says(tmp_path: Path) -> None:
    with pytest.raises(RankError, match="rank 1: died with exit code 1"):
        run_ranks(2, tokenize, "stands still", 1.5 / 60, tmp_path, group=False, timeout_s=30)


def test_ranks_that_wait_for_one_that_died_do_not_wait_on(tmp_path: Path) -> None:
    with pytest.raises(RankError, match="rank 0: died with exit code 9"):
        run_ranks(2, tokenize, "dies", 1.5 / 60, tmp_path, group=False, timeout_s=30)
    said, seconds = json.loads((tmp_path / "1").read_text())
    assert said
    assert seconds < 1


def tokenize_on_two_nodes(folder: Path, tokenizer_path: Path, paths: list[Path]) -> str:
    from megatron_sftrl.config.schema import ParallelSection, TokenizerSection
    from megatron_sftrl.data.tokenizer import load_tokenizer
    from megatron_sftrl.data.tokenizing import Tokenizing
    from megatron_sftrl.engine.parallel import parallel_context
    from megatron_sftrl.trainers.demonstrations import tokenize_once

    os.environ["LOCAL_RANK"] = str(int(os.environ["RANK"]) % 2)
    tokenizer = load_tokenizer(TokenizerSection(path=tokenizer_path))
    sources: set[str] = set()
    original = Tokenizing.tokenize

    def noted(self: Tokenizing, rows: Any, first_row: int) -> Any:
        sources.update(Path(row.file.path).name for row in rows)
        return original(self, rows, first_row)

    Tokenizing.tokenize = noted  # type: ignore[method-assign]
    try:
        with parallel_context(ParallelSection()) as context:
            rows = rows_in(folder / "shared", paths, tokenizer)
            tokenize_once([rows], context, hang_minutes=5)
            fingerprint = rows.load().fingerprint
    finally:
        Tokenizing.tokenize = original  # type: ignore[method-assign]
    return f"{fingerprint} {' '.join(sorted(sources))}"


def test_each_node_takes_a_share_of_the_files(tmp_path: Path) -> None:
    from megatron_sftrl.config.schema import TokenizerSection
    from megatron_sftrl.data.tokenizer import load_tokenizer

    tokenizer_path = write_byte_level(tmp_path / "tokenizer", adds_bos=True)
    paths = [
        write(tmp_path / f"{index}.jsonl", [{"prompt": f"q {index}", "response": f"a {index}"}])
        for index in range(4)
    ]
    alone = rows_in(tmp_path / "alone", paths, load_tokenizer(TokenizerSection(path=tokenizer_path))).load()
    said = run_ranks(4, tokenize_on_two_nodes, tmp_path, tokenizer_path, paths, group=False)
    shares = ["0.jsonl 1.jsonl", "", "2.jsonl 3.jsonl", ""]
    assert said == [f"{alone.fingerprint} {share}" for share in shares]
    assert contents(tmp_path / "shared") == contents(tmp_path / "alone")
