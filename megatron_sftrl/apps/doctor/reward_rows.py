"""The rows that rewards are examined on: of a run's data, of files, or made by a task of reasoning_gym."""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import subprocess
import sys
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import cast

from megatron_sftrl.config.data import PromptColumns
from megatron_sftrl.data.chat import encode_prompt
from megatron_sftrl.data.formats import FormattedRow, read_formatted
from megatron_sftrl.data.sources import check_source
from megatron_sftrl.data.tokenizer import Tokenizer
from megatron_sftrl.errors import UserError
from megatron_sftrl.registry import nearest
from megatron_sftrl.rl.rewards.math import gold_answer
from megatron_sftrl.rl.rewards.registry import Json, Reward

_EXAMPLES = ("example_correct_answer", "possible_answer", "example_answer")
"""Where tasks of reasoning_gym whose entries have no answer keep one that is right."""
_CHARACTERS_PER_TOKEN = 4
"""Where there is no tokenizer: near enough for a reward of the length."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DoctorRow:
    """A row as rewards see it, and what is known of it.

    Args:
        question: the last turn of the user, without what a chat template puts around it.
        answers: texts that are right, the first one the row's own; empty where none is known.
        task: of reasoning_gym; empty for every other row.
    """

    source: str
    prompt: str
    question: str
    values: Mapping[str, Json]
    answers: tuple[str, ...]
    task: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class DoctorRows:
    """A sample, of how many rows, how tokens of a response are counted, and what is wrong with the data."""

    rows: tuple[DoctorRow, ...]
    num_rows: int
    num_tokens: Callable[[str], int]
    problems: tuple[str, ...] = ()
    is_made: bool = False


def rows_of_files(
    paths: Sequence[Path],
    *,
    count: int,
    seed: int,
    key: str,
    tokenizer: Tokenizer | None = None,
    columns: PromptColumns | None = None,
) -> DoctorRows:
    """A sample of rows that `sftrl grpo` reads; of every task of reasoning_gym as many as of the others.

    Prompts are those that a run with this tokenizer shows to its rewards; the question where there is none.

    Raises:
        UserError: a source or a row that cannot be used; `key` is how messages call the paths.
    """
    found: list[FormattedRow] = []
    for path in paths:
        check_source(path, key)
        before = len(found)
        found += read_formatted(path, "prompts", columns=columns, key=key)
        if len(found) == before:
            raise UserError(f"{key}: no prompts in {path}; remove it, or write it again")
    chosen = [found[place] for place in _sample([_task_of(row.values) for row in found], count, seed)]

    def num_tokens(text: str) -> int:
        if tokenizer is None:
            return _rough_num_tokens(text)
        return len(tokenizer.encode_continuation(text)) + 1

    return DoctorRows(
        rows=tuple(_as_doctor_row(row, tokenizer) for row in chosen),
        num_rows=len(found),
        num_tokens=num_tokens,
    )


def rows_of_tasks(tasks: Sequence[str], *, count: int, seed: int) -> DoctorRows:
    """`count` rows of each task, made with this seed, which are held against the same made again.

    Raises:
        UserError: an unknown task, or one that cannot be made with its default settings.
    """
    made = {task: make_task(task, size=count, seed=seed) for task in tasks}
    again = _made_elsewhere(tasks, count=count, seed=seed)
    rows = tuple(
        DoctorRow(
            source=f"{task}:{place}",
            prompt=str(entry["question"]),
            question=str(entry["question"]),
            values=entry,
            answers=_answers_of(entry),
            task=task,
        )
        for task, entries in made.items()
        for place, entry in enumerate(entries)
    )
    problems = [_change(task, made[task], *again[task], seed=seed) for task in made]
    return DoctorRows(
        rows=rows,
        num_rows=len(rows),
        num_tokens=_rough_num_tokens,
        problems=tuple(filter(None, problems)),
        is_made=True,
    )


Entries = list[dict[str, Json]]


def make_task(task: str, *, size: int, seed: int) -> Entries:
    """Entries of a task of reasoning_gym, as a file of them would hold them."""
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    if task not in DATASETS:
        raise UserError(
            f"--task: expected a task of reasoning_gym, got {task!r}{nearest(task, sorted(DATASETS))}"
        )
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # some print while they are made
            entries = list(reasoning_gym.create_dataset(task, size=size, seed=seed))
    except AssertionError as error:
        raise UserError(
            f"--task {task}: reasoning_gym does not make it with its default settings: {error}; write its "
            "rows to a file, and give that as --data"
        ) from None
    # Fractions and other objects, which some have in their metadata, are their text in a file.
    return json.loads(json.dumps(entries, default=str))


_MAKE = """
import json, sys
import reasoning_gym
tasks, sizes, seed, out = json.loads(sys.argv[1])
made = {
    task: [list(reasoning_gym.create_dataset(task, size=size, seed=seed)) for size in sizes] for task in tasks
}
with open(out, "w") as file:
    json.dump(made, file, default=str)
"""


def _made_elsewhere(tasks: Sequence[str], *, count: int, seed: int) -> Mapping[str, tuple[Entries, Entries]]:
    """The same rows, and twice as many of them, from another process with another order of its sets."""
    hash_seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "made.json"
        asked = json.dumps([list(tasks), [count, 2 * count], seed, str(out)])
        subprocess.run(
            [sys.executable, "-c", _MAKE, asked],
            env={**os.environ, "PYTHONHASHSEED": hash_seed},
            stdout=subprocess.DEVNULL,
            check=True,
        )
        return json.loads(out.read_text())


def _change(task: str, entries: Entries, again: Entries, larger: Entries, *, seed: int) -> str | None:
    """In words, what another process makes of the same seed; None where it is the same."""
    count = len(entries)
    if differing := sum(one != other for one, other in zip(entries, again, strict=True)):
        return (
            f"{task}: made again with seed {seed} in another process, {differing} of {count} rows are "
            "others: what is measured on such rows cannot be measured again. Write them to a file once"
        )
    if differing := sum(one != other for one, other in zip(entries, larger, strict=False)):
        return (
            f"{task}: of {len(larger)} rows made with seed {seed}, {differing} of the first {count} are not "
            f"those of {count} rows: another size is other data. Write the rows to a file once"
        )
    return None


def check_rows(rewards: Iterable[Reward], rows: Iterable[DoctorRow]) -> None:
    """Raise UserError for the first row without what the rewards look at, in a form that they can read."""
    rewards = list(rewards)
    for row in rows:
        for reward in rewards:
            try:
                reward.check_row(row.values)
            except ValueError as error:
                raise UserError(f"{row.source}: {error}") from error


def _sample(tasks: Sequence[str], count: int, seed: int) -> list[int]:
    """Places of `count` rows in the order of the data, each task in its turn."""
    draw = random.Random(seed)
    places: dict[str, list[int]] = defaultdict(list)
    for place, task in enumerate(tasks):
        places[task].append(place)
    for each in places.values():
        draw.shuffle(each)
    groups = list(places.values())
    draw.shuffle(groups)
    in_turn = [place for turn in zip_longest(*groups) for place in turn if place is not None]
    return sorted(in_turn[:count])


def _as_doctor_row(row: FormattedRow, tokenizer: Tokenizer | None) -> DoctorRow:
    try:
        conversation = row.conversation()
        values = cast(Mapping[str, Json], row.values_with_answer())
        users = [turn for turn in conversation.messages if turn.get("role") == "user"]
        question = str((users or conversation.messages)[-1].get("content"))
        prompt = question if tokenizer is None else tokenizer.decode(encode_prompt(tokenizer, conversation))
    except ValueError as error:
        raise UserError(f"{row.source}: {error}") from error
    return DoctorRow(
        source=row.source,
        prompt=prompt,
        question=question,
        values=values,
        answers=_answers_of(values),
        task=_task_of(values),
    )


def _task_of(values: Mapping[str, object]) -> str:
    metadata = values.get("metadata")
    task = metadata.get("source_dataset") if isinstance(metadata, dict) else None
    return task if isinstance(task, str) else ""


def _answers_of(values: Mapping[str, Json]) -> tuple[str, ...]:
    """The texts of a row's answer: of a solution, what stands in its box or behind its ####."""
    answer = values.get("answer")
    metadata = values.get("metadata")
    if answer is None and isinstance(metadata, dict) and _task_of(values):
        known = next((metadata[key] for key in _EXAMPLES if metadata.get(key) is not None), None)
        return () if known is None else (known if isinstance(known, str) else json.dumps(known),)
    several = answer if isinstance(answer, list) else [answer]
    texts = [
        _final_text(one) if isinstance(one, str) else str(one)
        for one in several
        if isinstance(one, str | int | float)
    ]
    return tuple(texts)


def _final_text(answer: str) -> str:
    try:
        return gold_answer(answer)
    except UserError:
        return answer


def _rough_num_tokens(text: str) -> int:
    return len(text) // _CHARACTERS_PER_TOKEN + 1
