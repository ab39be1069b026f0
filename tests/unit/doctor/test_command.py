"""`sftrl doctor loss`: its verdicts, its exit code, and the command that shows a failure again."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from megatron_sftrl.cli import main

PLANTED = Path(__file__).parent / "planted"
IN_PROCESS = ["--only", "inputs", "--only", "output", "--only", "microbatches"]


def test_a_loss_that_holds_ends_with_exit_code_0(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "loss", "--loss", "gift", "--option", "beta=5.0", *IN_PROCESS]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("doctor: loss gift (needs reference), seed 0: 6 sequences, 52 tokens")
    assert [line.split()[:2] for line in out[1:-1]] == [
        ["inputs", "ok"],
        ["output", "ok"],
        ["microbatches", "ok"],
    ]
    assert out[-1] == "all 3 properties hold"


def test_a_loss_that_does_not_ends_with_1_and_a_command_that_shows_it(
    capsys: pytest.CaptureFixture[str],
) -> None:
    module = str(PLANTED / "counts.py")
    request = ["doctor", "loss", "--loss", "counts", "--module", module, "--option", "defect=local_count"]
    assert main([*request, "--seed", "7", *IN_PROCESS]) == 1
    first = capsys.readouterr().out
    assert first.splitlines()[-1] == "1 of 3 properties FAILED"
    (again,) = [line for line in first.splitlines() if line.startswith("    again: sftrl ")]
    assert main(shlex.split(again)[2:]) == 1
    second = capsys.readouterr().out
    failures = [line for line in first.splitlines() if line.startswith("    2 micro-batches")]
    assert len(failures) == 2
    assert set(failures) <= set(second.splitlines())
    assert "inputs" not in second


def test_a_file_of_one_loss_needs_no_name_and_what_it_got_wrong_stands_with_its_line(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["doctor", "loss", "--module", str(PLANTED / "reduces.py")]) == 1
    out = capsys.readouterr().out
    assert (
        "expected token_loss to be a floating point tensor [T] = [52] on cpu, got torch.float32 [] on cpu"
        in out
    )
    assert "16 properties were not looked at: the loss gives no answer to compare with" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "expected --loss NAME or --module FILE, got neither"),
        (["--loss", "gitf"], r"unknown loss 'gitf' (did you mean 'gift'?)"),
        (["--loss", "gift", "--option", "beta"], "--option 'beta': expected key=value"),
        (["--loss", "gift", "--option", "betta=1"], "unknown option 'betta'"),
        (["--loss", "gift", "--only", "micro"], "unknown property 'micro' (did you mean 'microbatches'?)"),
        (
            ["--module", str(PLANTED / "counts.py")],
            "got cancels, counts, neighbours, numbers, undeclared; choose with --loss",
        ),
        (["--module", "missing.py"], "--module: no such file"),
    ],
)
def test_a_users_mistake_is_one_message(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", "loss", *arguments]) == 2
    assert message in capsys.readouterr().err
