"""`sftrl show-data`: the marks are the loss mask, the numbers are those of training, no bad row stops it."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from megatron_sftrl.apps.show_data.counts import Problems, same_words
from megatron_sftrl.apps.show_data.examine import Piece, ShownRow, pieces_of
from megatron_sftrl.apps.show_data.output import Terminal
from megatron_sftrl.apps.show_data.words import in_brackets, printable, short
from megatron_sftrl.cli import main
from megatron_sftrl.config.schema import TokenizerSection
from megatron_sftrl.data.chat import tokenize_row
from megatron_sftrl.data.dataset import find_rows
from megatron_sftrl.data.tokenizer import load_tokenizer
from megatron_sftrl.errors import UserError
from tests.unit.config.example import EXAMPLE
from tests.unit.data.tokenizers_for_tests import load_by_name, write_byte_level

LONG = {"prompt": "Which of these colours? " * 4, "response": "Blue, and then green. " * 3}
ROWS = [
    {"prompt": "What is 2+2?", "response": "The answer is 4."},
    {"prompt": "Hello", "response": "Hello there, how are you?"},
    {"prompt": "Name a colour.", "response": "Blue"},
]
CONVERSATION = {
    "messages": [
        {"role": "user", "content": "Grüße 🙂"},
        {"role": "assistant", "content": " schöne\nGrüße 🙂", "weight": 0},
        {"role": "user", "content": "And?"},
        {"role": "assistant", "content": "Nothing\n\nmore €."},
        {"role": "user", "content": "And?"},
        {"role": "assistant", "content": "Stop."},
    ]
}


class Project:
    """A run's YAML, a tokenizer without a model beside it, and files of rows."""

    def __init__(self, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.root, self._capsys = root, capsys
        self.tokenizer = write_byte_level(root / "tokenizer", template="chatml")
        self.yaml = root / "run.yaml"
        self.yaml.write_text(EXAMPLE)

    def lines(self, name: str, rows: list) -> Path:
        path = self.root / name
        path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        return path

    def show(self, *words: str, train: Path, valid: Path | None = None, expect: int = 0) -> str:
        """What the command prints for these files."""
        overrides = [f"tokenizer.path={self.tokenizer}", f"data.train=[{train}]"]
        if valid is not None:
            overrides.append(f"data.valid=[{valid}]")
        assert main(["show-data", str(self.yaml), *overrides, *words]) == expect
        return self._capsys.readouterr().out


@pytest.fixture
def project(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Project:
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)
    return Project(tmp_path, capsys)


@pytest.mark.parametrize(
    ("kind", "template", "row"),
    [
        ("byte_level", None, ROWS[1]),
        ("byte_level", "chatml", CONVERSATION),
        ("byte_level", "generation", CONVERSATION),
        ("sentencepiece", None, ROWS[1]),
        ("sentencepiece", "plain_text", ROWS[0]),
    ],
)
def test_what_is_marked_is_the_loss_mask(kind: str, template: str | None, row: dict, tmp_path: Path) -> None:
    tokenizer = load_by_name(tmp_path / "t", kind=kind, template=template)
    ids, mask = tokenize_row(tokenizer, row)
    pieces = pieces_of(tokenizer, ids, mask)
    assert "".join(piece.text for piece in pieces) == tokenizer.decode(ids)
    # Up to each border the text is that of the tokens up to it: no token is on the wrong side of a mark.
    borders = [place for place in range(1, len(ids)) if mask[place] != mask[place - 1]]
    text, found = "", []
    for before, piece in zip(pieces, [*pieces[1:], None], strict=True):
        text += before.text
        if piece is not None and piece.is_learned != before.is_learned:
            found.append(text)
    assert found == [tokenizer.decode(ids[:place]) for place in borders]
    assert pieces[0].is_learned == mask[0]
    specials = [tokenizer.decode([i]) for i in ids if i in tokenizer.special_ids]
    assert [piece.text for piece in pieces if piece.is_special] == specials


def test_every_turn_that_is_learned_is_in_brackets_and_no_other(project: Project) -> None:
    train = project.lines("a.jsonl", [CONVERSATION])
    out = project.show("data.max_length=400", train=train)
    assert re.findall("⟦(.*?)⟧", out, re.DOTALL) == ["Nothing\n\nmore €.<|im_end|>", "Stop.<|im_end|>"]
    assert "<|im_start|>assistant\n schöne\nGrüße 🙂<|im_end|>\n" in out


def test_a_row_cut_inside_of_a_character_is_shown_piece_by_piece(tmp_path: Path) -> None:
    tokenizer = load_by_name(tmp_path / "t", kind="byte_level", template=None)
    ids = tokenizer.encode("€")
    assert len(ids) > 1
    pieces = pieces_of(tokenizer, ids, [False, *[True] * (len(ids) - 1)])
    assert [piece.is_learned for piece in pieces] == [False, True]
    assert all("\ufffd" in piece.text for piece in pieces)


@pytest.mark.parametrize("truncation", ["drop", "right", "left_prompt"])
def test_the_numbers_are_those_of_the_dataset_that_training_loads(truncation: str, project: Project) -> None:
    rows = [*ROWS, LONG, *ROWS, {"prompt": "a", "response": "b " * 90}]
    if truncation == "left_prompt":
        del rows[-1]  # its response alone is too long
    train = project.lines("a.jsonl", rows)
    limit = 100
    out = project.show(f"data.truncation={truncation}", f"data.max_length={limit}", train=train)
    tokenizer = load_tokenizer(TokenizerSection(path=project.tokenizer))
    dataset = find_rows([train], tokenizer, max_length=limit, truncation=truncation).load()  # type: ignore[arg-type]
    told = re.search(r"one epoch: (\d+) rows, ([\d,]+) tokens, ([\d,]+) of them learned", out)
    assert told is not None
    expected = [len(dataset), int(dataset.lengths.sum()), int(dataset.num_loss_tokens.sum())]
    assert [int(number.replace(",", "")) for number in told.groups()] == expected
    num_longer = dataset.num_dropped + dataset.num_truncated
    assert num_longer > 0
    fate = f"{num_longer} {'dropped' if truncation == 'drop' else 'cut'}"
    assert f"    {len(rows)} rows, {fate}\n" in out
    assert f"longer than data.max_length = {limit}: {num_longer} sequence" in out
    assert f"(data.truncation: {truncation})" in out


def test_a_cut_is_shown_with_what_it_takes_away(project: Project) -> None:
    train = project.lines("a.jsonl", [LONG])
    short_end = project.show("data.truncation=right", "data.max_length=100", train=train)
    assert re.search(r"a\.jsonl:1: \d+ tokens, \d+ learned, cut to 100\n", short_end)
    kept = re.search("⟦(.*?)⟧", short_end, re.DOTALL)
    removed = re.search("cut out: (.*)\n\n", short_end)
    assert kept is not None
    assert removed is not None
    assert kept[1] + removed[1] == LONG["response"] + "<|im_end|>"
    whole = project.show("data.max_length=114", train=train)
    assert "a.jsonl:1: 114 tokens, 39 learned\n" in whole
    assert "longer than data.max_length = 114: 0 sequences\n" in whole
    late_start = project.show("data.truncation=left_prompt", "data.max_length=100", train=train)
    assert "cut out: <|im_start|>system" in late_start
    assert f"⟦{LONG['response']}<|im_end|>⟧" in late_start
    dropped = project.show(
        "data.truncation=drop", "data.max_length=100", train=project.lines("b.jsonl", [LONG, ROWS[0]])
    )
    assert re.search(r"b\.jsonl:1: \d+ tokens, dropped: too long\n", dropped)


def test_every_kind_of_bad_row_is_listed_once_with_its_first_row_and_the_exit_code_says_so(
    project: Project,
) -> None:
    rows = [
        *ROWS,
        {"prompt": "it's", "response": ""},
        "{broken",
        {"prompt": "a", "response": "b", "thinking": "'c'"},
        {"prompt": "a", "response": "  "},
        {"prompt": "a", "reply": "b"},
        "{broken, too",
        {"prompt": "a" * 200, "response": "b"},
        {"prompt": "a" * 300, "response": "b"},
        ROWS[0],
    ]
    train = project.lines("a.jsonl", rows)
    out = project.show("--rows", "1", "data.max_length=100", train=train, expect=2)
    refused = out.partition("\nrefused\n")[2].splitlines()
    kinds = [re.match(r"(\d+) x .*a\.jsonl:(\d+): (.*)", line) for line in refused[:-1]]
    told = {(int(kind[1]), int(kind[2])): kind[3] for kind in kinds if kind}
    assert set(told) == {(2, 4), (2, 5), (1, 6), (1, 8), (2, 10)}
    assert told[2, 5].startswith("not JSON")
    assert "response is empty" in told[2, 4]
    assert told[1, 6].startswith("thinking: nothing reads this column")
    assert "data.max_length = 100 tokens, got 2" in told[2, 10]
    assert refused[-1] == "training refuses these data: 8 problems of 5 kind(s)"
    assert "12 rows, 8 refused\n" in out
    assert re.search(r"one epoch: 4 rows, .*\nlonger than data.max_length = 100: 2 sequences; they", out)


def test_a_row_of_several_sequences_is_shown_sequence_by_sequence(project: Project) -> None:
    write_byte_level(project.tokenizer, template="forgets_thoughts")
    turns = [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "<think>red</think>fine"},
        {"role": "user", "content": "Name"},
        {"role": "assistant", "content": "Blue"},
    ]
    rows = [{"messages": turns}, {"messages": turns, "weight": 0}, {"messages": turns[:2]}]
    train = project.lines("a.jsonl", rows)
    out = project.show(train=train)
    tokenizer = load_tokenizer(TokenizerSection(path=project.tokenizer))
    dataset = find_rows([train], tokenizer, max_length=128, truncation="error").load()
    sums = f"{dataset.lengths.sum()} tokens, {dataset.num_loss_tokens.sum()} of them learned"
    assert f"one epoch: 2 rows in 3 sequences, {sums}" in out
    assert "3 rows, 1 left out by their weight\n" in out
    learned = re.findall("⟦(.*?)⟧", out, re.DOTALL)
    assert ["red" in text for text in learned] == [True, False, True]
    assert "Blue" in learned[1]
    heads = re.findall(r"a\.jsonl:(\d)(.*?: \d+ tokens|: left out by its weight)", out)
    assert [(place, text.rpartition(":")[0]) for place, text in heads] == [
        ("1", ", sequence 1 of 2"),
        ("1", ", sequence 2 of 2"),
        ("2", ""),
        ("3", ""),
    ]
    last = project.show("data.learn=last_turn", train=train)
    assert "one epoch: 2 rows, " in last
    first, _ = re.findall("⟦(.*?)⟧", last, re.DOTALL)
    assert "Blue" in first


def test_a_row_that_is_shown_and_refused_says_why_and_keeps_its_place(project: Project) -> None:
    train = project.lines("a.jsonl", [ROWS[0], {"prompt": "a", "response": ""}, ROWS[1], ROWS[2], "{broken"])
    out = project.show("--rows", "3", train=train, expect=2)
    heads = re.findall(r"^\S*a\.jsonl:(\d+): (refused|\d+ tokens)", out, re.MULTILINE)
    assert [number for number, _ in heads] == ["1", "2", "3"]
    assert "a.jsonl:2: refused\n" in out
    assert "a.jsonl:2: the response is empty; remove the row\n" in out


@pytest.mark.parametrize(
    ("one", "other", "are_same"),
    [
        ("expected 3, got 4.5", "expected 12, got 1", True),
        ("role: expected one of a, b, got 'x'", 'role: expected one of a, b, got "it\'s"', True),
        ("got ['a', 'b']", "got ['c']", True),
        ("messages[3].content: expected text", "messages[12].content: expected text", True),
        ("the row's text can't be 'read'", "the row's text can't be 'r\\'ead'", True),
        ("thinking: nothing reads this column", "history: nothing reads this column", False),
        ("the row's 'a' isn't 'b' here", "the row's 'a' isn't 'b' there", False),
    ],
)
def test_messages_are_one_kind_but_for_what_is_the_rows_own(one: str, other: str, are_same: bool) -> None:
    assert (same_words(one) == same_words(other)) == are_same


def test_the_list_of_kinds_stays_short_whatever_messages_say() -> None:
    problems = Problems()
    for number in range(1000):
        try:
            raise UserError("unlike any other: " + "".join(chr(97 + int(digit)) for digit in str(number)))
        except UserError as error:
            problems.add(error)
    assert len(problems) < 12
    assert problems.count == 1000


def test_rows_of_a_file_without_a_format_are_all_refused(project: Project) -> None:
    train = project.lines("a.jsonl", [{"a": 1}, {"b": 2}, "[1]"])
    out = project.show(train=train, expect=2)
    assert "no row that could be read\n    3 rows, 3 refused\n" in out
    assert "one epoch: 0 rows" in out


def test_sources_that_are_not_there_or_empty_are_problems_among_others(project: Project) -> None:
    train = project.lines("a.jsonl", ROWS)
    empty = project.lines("b.jsonl", [])
    out = project.show(f"data.train=[{train},{empty},{project.root}/c.jsonl]", train=train, expect=2)
    assert f"no row in {empty}" in out
    assert "c.jsonl does not exist" in out
    assert "could not be read" not in out
    assert "one epoch: 3 rows" in out


def test_a_source_that_breaks_off_is_a_problem_and_the_next_one_is_read(project: Project) -> None:
    import pyarrow
    import pyarrow.parquet

    broken = project.root / "p.parquet"
    table = {name: [row[name].encode() for row in ROWS] for name in ("prompt", "response")}
    table["response"][1] = b"\xff"
    texts = {
        name: pyarrow.array(column, pyarrow.binary()).view(pyarrow.string()) for name, column in table.items()
    }
    pyarrow.parquet.write_table(pyarrow.table(texts), broken)
    whole = project.lines("a.jsonl", ROWS)
    out = project.show(f"data.train=[{broken},{whole}]", train=whole, expect=2)
    assert re.search(r"1 x \S+p\.parquet row 1: a text of this row is not UTF-8", out)
    assert "1 row; there are more, which could not be read\n" in out
    assert "one epoch: 4 rows" in out
    assert "⟦The answer is 4.<|im_end|>⟧" in project.show("--row", f"{broken}:0", train=broken)


def test_rows_scored_in_part_are_refused_as_in_training(project: Project) -> None:
    tokenizer = load_tokenizer(TokenizerSection(path=project.tokenizer))
    ids, mask = tokenize_row(tokenizer, ROWS[0])
    learned = [i for i, is_learned in zip(ids, mask, strict=True) if is_learned]
    scored = {**ROWS[0], "behavior_token_ids": learned, "behavior_logprobs": [-1.0] * len(learned)}
    assert "1 with behaviour scores" in project.show(train=project.lines("a.jsonl", [scored]))
    pear = ("loss={name: pear}", "reference=null")
    project.show(*pear, train=project.lines("a.jsonl", [scored]))
    out = project.show(*pear, train=project.lines("b.jsonl", ROWS), expect=2)
    assert "3 x loss 'pear' needs behavior_logprobs, but data.train has none: score it" in out
    mixed = project.lines("b.jsonl", [scored, *ROWS[1:]])
    assert re.search(
        r"2 x \S+b\.jsonl:2: the row has no behaviour scores", project.show(train=mixed, expect=2)
    )
    other = {**scored, "behavior_token_ids": [learned[0] + 1, *learned[1:]]}
    out = project.show(train=project.lines("c.jsonl", [scored, other]), expect=2)
    assert "c.jsonl:2: behaviour scores belong to other tokens" in out


def test_rows_with_the_same_tokens_are_found_inside_a_set_and_between_sets(project: Project) -> None:
    # The same tokens in another form, too.
    turns = [
        {"role": "user", "content": ROWS[1]["prompt"]},
        {"role": "assistant", "content": ROWS[1]["response"]},
    ]
    train = project.lines("a.jsonl", [*ROWS, ROWS[0], ROWS[0]])
    valid = project.lines("b.jsonl", [{"messages": turns}, CONVERSATION, CONVERSATION])
    out = project.show("data.max_length=400", train=train, valid=valid)
    told = out.partition("the same tokens twice\n")[2]
    assert told.startswith(
        "rows of data.train that repeat an earlier one of it: 2\n"
        f"    {train}:4 is {train}:1\n    {train}:5 is {train}:1\n"
        "rows of data.valid that repeat an earlier one of it: 1\n"
        f"    {valid}:3 is {valid}:2\n"
        "rows of data.valid that are in data.train, too: 1\n"
        f"    {valid}:1 is {train}:2\n"
    )
    shown = project.show("--rows", "1", "--valid", "data.max_length=400", train=train, valid=valid)
    assert f"\n{valid}:1: " in shown
    assert f"{train}:1: " not in shown


def test_many_repeats_are_a_number_and_the_first_of_them(project: Project) -> None:
    out = project.show(train=project.lines("a.jsonl", [ROWS[0]] * 9))
    assert "repeat an earlier one of it: 8\n" in out
    assert len(re.findall(r"a\.jsonl:\d+ is \S+a\.jsonl:1\n", out)) == 5
    assert "... and 3 more\n" in out


def test_one_row_is_shown_whole_and_by_the_names_that_messages_use(project: Project) -> None:
    import datasets

    long = {"prompt": "a", "response": "b" * 5000}
    train = project.lines("a.jsonl", [ROWS[0], "", long, {"prompt": "a", "response": ""}])
    words = ["data.max_length=9000"]
    assert "characters ...)" in project.show(*words, train=train, expect=2)
    out = project.show("--row", f"{train}:3", *words, train=train)
    assert "b" * 5000 in out
    assert "one epoch" not in out
    out = project.show("--row", "a.jsonl:4", *words, train=train, expect=2)
    assert out == f"\n{train}:4: refused\n{train}:4: the response is empty; remove the row\n"
    parquet = project.root / "p.parquet"
    datasets.Dataset.from_list(ROWS).to_parquet(str(parquet))
    for name in (f"{parquet}:2", f"{parquet} row 2", "p.parquet:2"):
        assert "⟦Blue<|im_end|>⟧" in project.show("--row", name, train=train, valid=parquet)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("a.jsonl:2", "has no row 2; lines of JSONL count from 1"),
        ("a.jsonl:9", "has no row 9"),
        ("b.jsonl:1", "expected one of the run's files"),
        ("a.jsonl", "expected FILE:NUMBER"),
    ],
)
def test_a_row_that_is_not_there_is_refused(
    row: str, message: str, project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    train = project.lines("a.jsonl", [ROWS[0], "", ROWS[1]])
    words = [f"tokenizer.path={project.tokenizer}", f"data.train=[{train}]", "--row", row]
    assert main(["show-data", str(project.yaml), *words]) == 2
    assert message in capsys.readouterr().err


def test_ids_stand_under_the_text_with_the_same_marks(project: Project) -> None:
    tokenizer = load_tokenizer(TokenizerSection(path=project.tokenizer))
    ids, mask = tokenize_row(tokenizer, ROWS[2])
    out = project.show("--ids", "--row", "a.jsonl:1", train=project.lines("a.jsonl", [ROWS[2]]))
    line = out.splitlines()[-1]
    assert [int(i) for i in re.findall(r"\d+", line)] == ids
    learned = re.search("⟦(.*)⟧", line)
    assert learned is not None
    assert [int(i) for i in learned[1].split()] == np.array(ids)[mask].tolist()


def test_valid_without_held_out_data_is_refused(project: Project, capsys: pytest.CaptureFixture[str]) -> None:
    train = project.lines("a.jsonl", ROWS)
    words = [f"tokenizer.path={project.tokenizer}", f"data.train=[{train}]", "--valid"]
    assert main(["show-data", str(project.yaml), *words]) == 2
    assert "--valid: data.valid is empty" in capsys.readouterr().err


# GRPO.


@pytest.fixture
def prompts(project: Project) -> Project:
    sections = EXAMPLE.replace("data: {train: [train.jsonl], max_length: 128}", "").replace(
        "loss: {name: gift, beta: 5}\nreference: {kind: frozen}\n",
        "loss: {name: grpo}\ndata: {train: [train.jsonl], max_prompt_length: 100}\n"
        "rollout: {prompts_per_step: 1, max_new_tokens: 8}\nrewards: [{name: exact_match}]\n",
    )
    project.yaml.write_text(sections)
    return project


def test_prompts_of_grpo_are_shown_with_their_answers(prompts: Project) -> None:
    questions = [
        {"question": "What is 2+2?", "answer": "2+2=4\n#### 4"},
        {"question": "Name a colour.", "answer": "blue"},
        {"question": "What is 2+2?", "answer": "4"},
    ]
    out = prompts.show("--rows", "1", train=prompts.lines("a.jsonl", questions))
    assert "What is 2+2?<|im_end|>\n<|im_start|>assistant\n\nanswer: 2+2=4\n#### 4\n" in out
    assert "⟦" not in out
    assert "learned" not in out
    assert "question and answer: question as the prompt\n    3 rows, 3 with an answer (from answer)\n" in out
    assert "repeat an earlier one of it: 1\n" in out
    assert "one epoch: 3 rows, " in out


def test_prompts_that_grpo_would_refuse_are_listed(prompts: Project) -> None:
    rows = [
        {"prompt": "Hello", "answer": "4"},
        {"prompt": "Name" * 100, "answer": "4"},
        {"prompt": "Hello"},
        {"prompt": ""},
        "{broken",
    ]
    train = prompts.lines("a.jsonl", rows)
    out = prompts.show(train=train, expect=2)
    assert f"1 x {train}:2: expected at most data.max_prompt_length = 100 tokens, got " in out
    assert f"1 x {train}:3: reward 'exact_match' needs 'answer' in every row" in out
    assert f"1 x {train}:4: prompt: expected a non-empty text" in out
    assert f"1 x {train}:5: not JSON" in out
    assert "longer than data.max_prompt_length = 100: 1 prompt; they are refused" in out
    assert "5 rows, 4 refused" in out
    one = prompts.show("--row", "a.jsonl:3", train=train, expect=2)
    assert "reward 'exact_match' needs 'answer'" in one


# Terminal and page.


def test_on_a_terminal_color_says_what_is_learned() -> None:
    def shown(**options) -> str:
        stream = io.StringIO()
        row = ShownRow(
            place="a.jsonl:1",
            fate="whole",
            pieces=(
                Piece(text="[bold]a\x1b[31m\n", is_learned=False, is_special=False),
                Piece(text="b\n", is_learned=True, is_special=False),
            ),
            ids=(1, 2),
            mask=(False, True),
            num_tokens=2,
        )
        Terminal(Console(file=stream, force_terminal=True, **options), with_ids=False).show_row(row)
        return stream.getvalue()

    colored = shown(color_system="256")
    assert "⟦" not in colored
    assert "[bold]a\\x1b[31m\n" in colored
    assert re.search(r"\x1b\[[\d;]*mb↵", colored)
    assert "[bold]a\\x1b[31m\n⟦b\n⟧" in shown(color_system="256", no_color=True)


def test_brackets_are_of_a_kind_that_the_text_does_not_hold() -> None:
    pieces = [
        Piece(text="⟦a⟧", is_learned=False, is_special=False),
        Piece(text="b", is_learned=True, is_special=False),
        Piece(text="</s>", is_learned=True, is_special=True),
    ]
    assert in_brackets(pieces) == "⟦a⟧⟪b</s>⟫"
    assert printable("a\tb\r\n\x07") == "a\tb\\x0d\n\\x07"
    assert short("abcdef", 4) == "ab (... 2 characters ...) ef"


def test_the_page_says_the_same_escaped_and_replaces_an_old_one_at_once(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    hostile = {"prompt": "<script>alert(1)</script>&", "response": "\n</pre><img src=x>"}
    train = project.lines("a.jsonl", [hostile, {"prompt": "<i>", "response": "", "<u>": 1}, ROWS[0]])
    page = project.root / "new" / "page.html"
    out = project.show("--html", str(page), train=train, expect=2)
    text = page.read_text()
    assert [each.name for each in page.parent.iterdir()] == ["page.html"]
    for tag in ("<script", "<img", "<i>", "<u>"):
        assert tag not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt;&amp;" in text
    assert "<mark>↵\n&lt;/pre&gt;&lt;img src=x&gt;</mark><mark><b>&lt;|im_end|&gt;</b></mark>" in text
    assert not re.findall(r"(?:src|href)=", re.sub("<pre.*?</pre>", "", text, flags=re.DOTALL))
    for line in out.partition("\ndata.train\n")[2].splitlines():
        assert not line or line.replace("'", "&#39;") in text

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full_disk)
    other = project.lines("b.jsonl", ROWS)
    project.show("--html", str(page), train=other, expect=2)  # --html cannot be written
    assert page.read_text() == text
    assert [each.name for each in page.parent.iterdir()] == ["page.html"]


def test_a_page_that_cannot_be_written_is_refused_first(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [f"tokenizer.path={project.tokenizer}", "data.train=[missing.jsonl]", "--html", str(project.root)]
    assert main(["show-data", str(project.yaml), *words]) == 2
    assert "--html: expected a file, got the directory" in capsys.readouterr().err


def test_no_model_is_needed_or_imported_and_a_closed_pipe_is_no_error(project: Project) -> None:
    train = project.lines("a.jsonl", ROWS)
    words = [str(project.yaml), f"model={{hf: {project.tokenizer}}}", f"tokenizer.path={project.tokenizer}"]
    code = (
        "import sys; from megatron_sftrl.cli import main; "
        f"code = main(['show-data', *{[*words, f'data.train=[{train}]']!r}]); "
        "print(sorted({'megatron', 'vllm'} & {*sys.modules}), code, file=sys.stderr)"
    )
    done = subprocess.run(
        ["bash", "-c", 'set -o pipefail; "$0" -c "$1" | true', sys.executable, code],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1] == "[] 0"
