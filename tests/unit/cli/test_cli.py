"""The command line: what it runs, and what a user's mistake looks like."""

from __future__ import annotations

import logging
import os
import re
import runpy
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

import megatron_sftrl.cli
from megatron_sftrl import __version__
from megatron_sftrl.cli import main, run_command, start_logging
from megatron_sftrl.errors import UserError
from tests.unit.config.example import EXAMPLE

ROOT = Path(__file__).resolve().parents[3]


def run(*arguments: str, rank: int = 0, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "megatron_sftrl", *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "RANK": str(rank), **environment},
        timeout=120,
        check=False,
    )


def test_a_users_mistake_is_one_message_and_exit_code_2(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(EXAMPLE)
    done = run("sft", str(path), "parallel.tpp=2")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith(f"error: {path}: 1 problem(s)\n  unknown key 'parallel.tpp'")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("how", ["flag", "environment"])
def test_the_traceback_is_there_when_asked_for(tmp_path: Path, how: str) -> None:
    missing = str(tmp_path / "missing.yaml")
    done = run("sft", "--traceback", missing) if how == "flag" else run("sft", missing, SFTRL_TRACEBACK="1")
    assert done.returncode != 0
    assert "Traceback" in done.stderr
    assert "no such configuration file" in done.stderr


def test_another_rank_leaves_the_word_to_rank_0_and_then_speaks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    waited: list[float] = []
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setattr(megatron_sftrl.cli.time, "sleep", waited.append)
    assert main(["sft", "missing.yaml"]) == 2
    assert waited == [5.0]
    assert capsys.readouterr().err.startswith("error (rank 3): no such configuration file")


def test_rank_0_does_not_wait(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(megatron_sftrl.cli.time, "sleep", lambda _: pytest.fail("rank 0 waited"))
    assert main(["sft", "missing.yaml"]) == 2
    assert capsys.readouterr().err.startswith("error: no such configuration file")


def test_an_error_that_is_not_the_users_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("ours")

    monkeypatch.setattr("megatron_sftrl.config.load.load_config", broken)
    with pytest.raises(RuntimeError, match="ours"):
        main(["sft", "run.yaml"])


def test_the_version_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exited:
        main(["--version"])
    assert exited.value.code == 0
    assert capsys.readouterr().out == f"megatron-sftrl {__version__}\n"


def test_every_key_is_explained(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["keys"]) == 0
    assert "`parallel.tp` (integer >= 1; default 1)" in capsys.readouterr().out


def test_every_loss_is_listed_with_its_equation_needs_and_options(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    mine = tmp_path / "my_loss_for_the_cli_test.py"
    mine.write_text(
        '"""Mine."""\n'
        "from megatron_sftrl import LossOptions, LossInputs, LossOutput, register_loss\n"
        "class Config(LossOptions):\n"
        "    weight: float = 0.5\n"
        '    """Share of nothing."""\n'
        "@register_loss('listed_by_the_cli_test', config=Config)\n"
        "def mine(inputs: LossInputs, config: Config) -> LossOutput:\n"
        '    """L_t = 0."""\n'
        "    raise AssertionError\n"
    )
    from megatron_sftrl.losses.registry import DEFAULT_REGISTRY

    try:
        assert main(["losses", str(mine)]) == 0
    finally:
        DEFAULT_REGISTRY._entries.pop("listed_by_the_cli_test", None)
    out = capsys.readouterr().out
    for name in ("sft", "gift", "pear", "curiosft", "dft", "entropy", "label_smoothing"):
        assert f"## {name}" in out
    assert "## gift (needs reference)" in out
    assert "`beta` (number >= 0; default 20.0)" in out
    assert (
        "## listed_by_the_cli_test\n\nL_t = 0.\n\n- `weight` (number; default 0.5): Share of nothing." in out
    )


def test_every_reward_is_listed_with_what_it_gives_its_needs_and_options(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    mine = tmp_path / "my_reward_for_the_cli_test.py"
    mine.write_text(
        '"""Mine."""\n'
        "from megatron_sftrl import RewardConfig, RewardInputs, RewardOutput, register_reward\n"
        "class Config(RewardConfig):\n"
        "    share: float = 0.5\n"
        '    """Share of nothing."""\n'
        "@register_reward('listed_by_the_cli_test', config=Config, needs=('answer', 'hint'))\n"
        "def mine(inputs: RewardInputs, config: Config) -> RewardOutput:\n"
        '    """Nothing."""\n'
        "    raise AssertionError\n"
    )
    from megatron_sftrl.rl.rewards.registry import DEFAULT_REGISTRY

    try:
        assert main(["rewards", str(mine)]) == 0
    finally:
        DEFAULT_REGISTRY._entries.pop("listed_by_the_cli_test", None)
    out = capsys.readouterr().out
    for name in DEFAULT_REGISTRY.names():
        assert f"## {name}" in out
    assert "## math (needs answer in every row)\n\n1 for an answer of the right value" in out
    assert "- `decimals` (integer >= 0, <= 15; default 6): Decimal places" in out
    assert "## format\n\n1 if the whole response matches, else 0.\n\n- `pattern` (text; default " in out
    assert (
        "## listed_by_the_cli_test (needs answer, hint in every row)\n\nNothing.\n\n"
        "- `share` (number; default 0.5): Share of nothing." in out
    )
    assert (
        '- `example` (text; default "<think>\\n1 + 1 = 2\\n</think>\\n<answer>2</answer>"): A response' in out
    )
    # Other tests register rewards of their own, without one.
    built_in = ("math", "exact_match", "reasoning_gym", "format", "length")
    shown = {section.split()[0]: section for section in f"\n{out}".split("\n## ")[1:]}
    assert not [name for name in built_in if "No description." in shown[name]]


def test_the_list_of_rewards_loads_neither_torch_nor_a_verifier() -> None:
    code = (
        "import sys; from megatron_sftrl.cli import _parser, main; _parser(); "
        "assert 'megatron_sftrl.registry' not in sys.modules; main(['rewards']); "
        "print(sorted({'torch', 'sympy', 'math_verify', 'megatron', 'reasoning_gym'} & {*sys.modules}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_file_of_rewards_that_is_not_there_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rewards", "missing.py"]) == 2
    assert "no such file" in capsys.readouterr().err


MEGATRON = "/site-packages/megatron/core/models/backends.py"
TORCH = "/site-packages/torch/distributed/c10d_logger.py"
APEX = "Apex is not installed. Falling back to Torch Norm"
CONNECTIONS = "When using sequence parallelism it is recommended to set CUDA_DEVICE_MAX_CONNECTIONS to 1"
FULL_SCOPE = "full scope is deprecated. Use empty cuda_graph_scope to capture the whole layer."
COLLECTIVE = "`torch.distributed.all_gather_into_tensor` is deprecated. Please use another."


def warn(text: str, file: str, *, line: int = 1) -> None:
    """As the code of that file does."""
    category = FutureWarning if text == COLLECTIVE else UserWarning
    module = file.removeprefix("/site-packages/").removesuffix(".py").replace("/", ".")
    warnings.warn_explicit(text, category, file, line, module=module)


def warned(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *, has_driver: bool, level: str
) -> str:
    """What a command says that meets the warnings of Megatron twice, and those of a user's file."""
    exists = os.path.exists
    monkeypatch.setattr(
        os.path, "exists", lambda path: has_driver if path == "/dev/nvidiactl" else exists(path)
    )
    monkeypatch.setenv("SFTRL_LOG", level)

    def command() -> None:
        for line in (1, 2):
            for text in (APEX, CONNECTIONS, FULL_SCOPE):
                warn(text, MEGATRON, line=line)
            warn(COLLECTIVE, TORCH, line=line)
        for text in (COLLECTIVE, APEX, "beta is large"):
            warn(text, "/home/me/megatron_sftrl/my_loss.py")
        warn("something else", MEGATRON)

    with warnings.catch_warnings():
        warnings.simplefilter("default")
        # As outside of pytest, which keeps warnings for its summary.
        monkeypatch.setattr(warnings, "showwarning", show_on_standard_error)
        assert run_command(command) == run_command(lambda: None) == 0
    return capsys.readouterr().err


def show_on_standard_error(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: object = None,
    line: str | None = None,
) -> None:
    sys.stderr.write(f"{filename}:{lineno}: {category.__name__}: {message}\n")


@pytest.mark.parametrize("level", ["", "DEBUG"])
@pytest.mark.parametrize("has_driver", [False, True], ids=["cpu", "gpu"])
def test_what_megatron_warns_of_is_told_once_at_debug_and_the_rest_is_shown(
    has_driver: bool, level: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = warned(monkeypatch, capsys, has_driver=has_driver, level=level).splitlines()
    worth_knowing = [APEX, CONNECTIONS] if has_driver else []
    shown = [line for line in lines if "[rank 0]" not in line]
    logged = [line.partition("[rank 0] ")[2] for line in lines if "[rank 0]" in line]
    mine = "/home/me/megatron_sftrl/my_loss.py:1"
    assert shown == [
        *(f"{MEGATRON}:{line}: UserWarning: {text}" for line in (1, 2) for text in worth_knowing),
        f"{mine}: FutureWarning: {COLLECTIVE}",
        f"{mine}: UserWarning: {APEX}",
        f"{mine}: UserWarning: beta is large",
        f"{MEGATRON}:1: UserWarning: something else",
    ]
    told = [APEX, CONNECTIONS, FULL_SCOPE][len(worth_knowing) :]
    told = [f"DEBUG: {MEGATRON}:1: UserWarning: {text}" for text in told]
    assert logged == ([*told, f"DEBUG: {TORCH}:1: FutureWarning: {COLLECTIVE}"] if level else [])


@pytest.mark.skipif(os.path.exists("/dev/nvidiactl"), reason="they are shown where a GPU driver is")
def test_the_import_of_megatron_shows_nothing_and_fails_for_no_warning() -> None:
    code = (
        "from megatron_sftrl.cli import run_command\n"
        "def command():\n"
        "    import megatron_sftrl.engine.policy\n"
        "    import warnings; warnings.warn('mine')\n"
        "run_command(command)"
    )
    # Of torch's own imports some warn, too.
    options = ["-W", "error:Apex", "-W", "error:Transformer Engine"]
    done = subprocess.run(
        [sys.executable, *options, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "SFTRL_LOG": "DEBUG"},
        timeout=300,
        check=True,
    )
    absent = [line for line in done.stderr.splitlines() if "not installed" in line]
    assert absent
    assert all("[rank 0] DEBUG: " in line for line in absent)
    assert len(absent) == len({line.partition("Warning: ")[2] for line in absent})
    assert "UserWarning: mine" in done.stderr


@pytest.mark.parametrize("command", ["keys | head -1", "rewards | true"])
def test_a_closed_pipe_is_no_error(command: str) -> None:
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {sys.executable} -m megatron_sftrl {command}"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": ""},
        timeout=120,
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_overrides_may_stand_behind_the_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(EXAMPLE)
    options = ["--prompts", "p.jsonl", "--out", "o.jsonl"]
    assert main(["generate", str(path), *options, "parallel.tpp=2"]) == 2
    assert "unknown key 'parallel.tpp'" in capsys.readouterr().err
    for unknown in (["--tempreature=1"], ["stray"]):
        with pytest.raises(SystemExit):
            main(["generate", str(path), *options, *unknown])
        assert f"unrecognized arguments: {unknown[0]}" in capsys.readouterr().err


@pytest.mark.parametrize("error", [ValueError("a library's"), BrokenPipeError("a worker's")], ids=repr)
def test_what_a_library_raises_in_a_run_is_a_failure_and_no_end(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise error

    monkeypatch.setattr("megatron_sftrl.config.load.load_config", broken)
    with pytest.raises(type(error)):
        main(["sft", "run.yaml"])


def test_a_problem_that_pydantic_tells_itself_is_the_users(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from megatron_sftrl.config.schema import BatchSection

    monkeypatch.setattr("megatron_sftrl.config.load.load_config", lambda *_: BatchSection(global_size=0))
    assert main(["sft", "run.yaml"]) == 2
    assert "global_size" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "module", "function"),
    [
        (["convert", "to-megatron", "--hf", "a", "--out", "b"], "apps.convert.command", "run_to_megatron"),
        (["convert", "to-hf", "--checkpoint", "a", "--out", "b"], "apps.convert.command", "run_to_hf"),
    ],
)
@pytest.mark.parametrize("is_script", [False, True], ids=["command", "script"])
def test_both_directions_of_a_conversion_have_the_options_of_the_scripts(
    words: list[str], module: str, function: str, is_script: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[tuple, dict]] = []
    monkeypatch.setattr(
        f"megatron_sftrl.{module}.{function}", lambda *args, **kwargs: calls.append((args, kwargs))
    )
    given = {
        "run_to_megatron": ["--tp", "2", "--pp", "3", "--ep", "4", "--allow-pickle", "--text-only"],
        "run_to_hf": ["--max-file-gb", "0.5", "--verify-pp", "2"],
    }[function]
    for more in ([], [*given, "--dtype", "fp32", "--verify"]):
        assert start([*words, *more], is_script, monkeypatch) == 0
    (plain, defaults), (_, all_given) = calls
    assert plain == (Path("a"), Path("b"))
    assert (defaults["dtype"], defaults["with_verify"]) == (None, False)
    assert (all_given["dtype"], all_given["with_verify"]) == ("fp32", True)
    if function == "run_to_hf":
        assert (defaults["max_file_gb"], defaults["verify_pp"]) == (5.0, 1)
        assert (all_given["max_file_gb"], all_given["verify_pp"]) == (0.5, 2)
    else:
        assert [(each.tp, each.pp, each.ep) for each in (defaults["layout"], all_given["layout"])] == [
            (1, 1, 1),
            (2, 3, 4),
        ]
        assert (defaults["allow_pickle"], all_given["allow_pickle"]) == (False, True)
        assert (defaults["text_only"], all_given["text_only"]) == (False, True)


SCRIPTS = {
    ("convert", "to-megatron"): "hf_to_megatron.py",
    ("convert", "to-hf"): "megatron_to_hf.py",
    ("score",): "score_behavior_logprobs.py",
}


def start(words: list[str], is_script: bool, monkeypatch: pytest.MonkeyPatch) -> object:
    """The exit code of a command, or of the script that stands for it."""
    if not is_script:
        return main(words)
    name, script = next((name, file) for name, file in SCRIPTS.items() if tuple(words[: len(name)]) == name)
    monkeypatch.setattr(sys, "argv", [script, *words[len(name) :]])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "tools" / script), run_name="__main__")
    return ended.value.code


@pytest.mark.parametrize("is_script", [False, True], ids=["command", "script"])
def test_a_score_takes_the_keys_of_a_run_wherever_they_stand(
    is_script: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(EXAMPLE)
    calls: list[tuple] = []
    monkeypatch.setattr(
        "megatron_sftrl.apps.score.score", lambda config, **paths: calls.append((config.parallel.tp, paths))
    )
    options = ["--checkpoint", "c", "--data", "d.jsonl"]
    words = ["score", str(path), "parallel.tp=3", *options, "parallel.tp=2", "--out", "o.jsonl"]
    assert start(words, is_script, monkeypatch) == 0
    paths = {"checkpoint": Path("c"), "data": Path("d.jsonl"), "out": Path("o.jsonl")}
    assert calls == [(2, paths)]


def test_a_conversion_says_what_it_lacks_and_shows_where_an_error_was_raised(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for words, missing in (
        (["convert"], "required: direction"),
        (["convert", "to-hf"], "required: --checkpoint, --out"),
        (["convert", "to-megatron", "--hf", "a", "--out", "b", "tp=2"], "unrecognized arguments: tp=2"),
    ):
        with pytest.raises(SystemExit) as ended:
            main(words)
        assert ended.value.code == 2
        assert missing in capsys.readouterr().err
    to_hf = ["convert", "to-hf", "--checkpoint", str(tmp_path), "--out", str(tmp_path / "out")]
    assert main([*to_hf, "--max-file-gb", "0"]) == 2
    assert "--max-file-gb: expected a size above 0, got 0.0" in capsys.readouterr().err
    with pytest.raises(UserError, match="--verify-pp has no effect without --verify"):
        main([*to_hf, "--verify-pp", "2", "--traceback"])


@pytest.mark.parametrize(
    ("rank", "level", "said"),
    [
        ("0", "", ["INFO: built", "WARNING: slow"]),
        ("3", "", ["WARNING: slow"]),
        ("3", "info", ["INFO: built", "WARNING: slow"]),
        ("0", "ERROR", []),
    ],
)
def test_the_log_goes_to_standard_error_with_time_rank_and_level(
    rank: str,
    level: str,
    said: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("SFTRL_LOG", level)
    for _ in range(2):  # a second command in one process says nothing twice
        start_logging()
    module = logging.getLogger("megatron_sftrl.any.module")
    module.info("built")
    module.warning("slow")
    lines = capsys.readouterr().err.splitlines()
    assert [re.sub(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ", "", line) for line in lines] == [
        f"[rank {rank}] {each}" for each in said
    ]


def test_a_level_that_does_not_exist_is_refused(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SFTRL_LOG", "loud")
    assert run_command(lambda: 0) == 2
    assert "SFTRL_LOG: expected one of DEBUG, INFO" in capsys.readouterr().err


_AN_END = """
import atexit, threading, time
from megatron_sftrl import __main__ as program, cli


class Kept:
    def __del__(self):
        print("memory cleared up")


def main():
    atexit.register(lambda: print("a library's end"))
    threading.Thread(target=lambda: (time.sleep(0.2), print("a thread's end"))).start()
    if "raise" in {how!r}:
        raise ValueError("a failure")
    return 75


kept, cli.main = Kept(), main
raise SystemExit(program.start())
"""


@pytest.mark.parametrize(("how", "code"), [("return", 75), ("raise", 1)])
def test_a_program_ends_behind_its_threads_and_libraries_and_clears_no_memory_up(how: str, code: int) -> None:
    done = subprocess.run(
        [sys.executable, "-c", _AN_END.replace("{how!r}", repr(how))],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        timeout=120,
        check=False,
    )
    assert done.returncode == code, done.stderr
    ends = ["a thread's end", "a library's end"]
    # A failure ends as in any program.
    assert done.stdout.splitlines() == (ends if how == "return" else [*ends, "memory cleared up"])
    assert ("ValueError: a failure" in done.stderr) == (how == "raise")
