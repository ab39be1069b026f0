"""`sftrl generate` from a run's checkpoint: the same responses under every layout."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.product import sftrl, sftrl_each
from tests.e2e.project import Project, read_rows

# With seed 5 a draw falls within rounding of a boundary between two tokens, and tp 2 takes the other one.
SAMPLED = ("--num-samples", "3", "--temperature", "1.0", "--seed", "6")


def command(
    project: Project, run_dir: Path, out: Path, *more: str, overrides: tuple[str, ...] = ()
) -> list[str]:
    return [
        "generate", str(project.yaml), f"run_dir={run_dir}", *overrides, "--prompts", str(project.valid),
        "--out", str(out), "--max-new-tokens", "8", *more,
    ]  # fmt: skip


@pytest.mark.parametrize("layout", ["parallel.tp=2", "parallel.pp=2", "parallel.cp=2", "seed=7"])
@pytest.mark.parametrize("how", ["greedy", "sampled"])
def test_one_process_and_two_generate_the_same(
    how: str, layout: str, project: Project, two_processes: Path, tmp_path: Path
) -> None:
    """seed=7 is the run's own: two processes without a split of the model, dp = 2."""
    more = SAMPLED if how == "sampled" else ()
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    sftrl(*command(project, two_processes, one, *more))
    sftrl(*command(project, two_processes, two, *more, overrides=(layout,)), ranks=2)
    assert one.read_text() == two.read_text()
    rows = read_rows(one)
    assert [row["prompt"] for row in rows] == [row["prompt"] for row in read_rows(project.valid)]
    for row in rows:
        assert len(row["responses"]) == len(row["num_tokens"]) == (3 if how == "sampled" else 1)
        for text, count, is_finished in zip(
            row["responses"], row["num_tokens"], row["is_finished"], strict=True
        ):
            assert is_finished or count == 8
            if "<" not in text:  # no special token; an id is a character, or none (the model's last row)
                assert len(text) <= count - is_finished
    assert len({text for row in rows for text in row["responses"]}) > 1 or how == "greedy"


def test_a_seed_repeats_its_samples_and_another_seed_draws_others(
    project: Project, two_processes: Path, tmp_path: Path
) -> None:
    outs = [tmp_path / f"{number}.jsonl" for number in range(3)]
    seeds = ["5", "5", "6"]
    for done in sftrl_each(
        [
            command(project, two_processes, out, *SAMPLED[:-1], seed)
            for out, seed in zip(outs, seeds, strict=True)
        ]
    ):
        done.expect(0)
    first, again, other = (out.read_text() for out in outs)
    assert first == again
    assert first != other


def test_a_response_ends_at_the_ids_and_texts_that_are_asked_for(
    project: Project, two_processes: Path, tmp_path: Path
) -> None:
    """The same responses as without them, up to the first; the text stops in front of it."""
    plain, texts, ids, foreign = (tmp_path / f"{name}.jsonl" for name in ("plain", "texts", "ids", "foreign"))
    digits = range(20, 30)  # one id a character, four special ones in front of the space
    *ended, refused = sftrl_each(
        [
            command(project, two_processes, plain, *SAMPLED),
            command(project, two_processes, texts, *SAMPLED, *(f"--stop={each}" for each in "0123456789")),
            command(project, two_processes, ids, *SAMPLED, *(f"--stop-id={each}" for each in digits)),
            command(project, two_processes, foreign, "--stop-id=101"),
        ]
    )
    for done in ended:
        done.expect(0)
    assert "--stop-id: expected ids from 0 to 100, got [101]" in refused.expect(2).stderr
    assert texts.read_text() == ids.read_text()
    shortened = 0
    for whole, cut in zip(read_rows(plain), read_rows(texts), strict=True):
        for long, short, is_finished in zip(
            whole["responses"], cut["responses"], cut["is_finished"], strict=True
        ):
            head = long.partition(next((each for each in long if each.isdigit()), "\0"))[0]
            assert short == head
            assert is_finished or short == long
            shortened += short != long
    assert shortened > 0


def test_an_output_that_exists_and_a_missing_checkpoint_are_refused(
    project: Project, two_processes: Path, tmp_path: Path
) -> None:
    precious = tmp_path / "precious.jsonl"
    precious.write_text("mine\n")
    exists, nothing = sftrl_each(
        [
            command(project, two_processes, precious),
            command(project, tmp_path / "empty", tmp_path / "new.jsonl"),
        ]
    )
    assert f"{precious} exists already: choose another --out" in exists.expect(2).stderr
    assert precious.read_text() == "mine\n"
    assert "no complete checkpoint in" in nothing.expect(2).stderr
    assert not (tmp_path / "new.jsonl").exists()
