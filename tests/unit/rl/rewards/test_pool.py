"""Rewards in worker processes: what one sample does to its worker costs that sample, and nothing else."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_sftrl.config.rewards import RewardSection, RewardWorkersSection
from megatron_sftrl.rl.rewards import (
    RewardInputs,
    RewardPool,
    describe_failures,
    failed_everywhere,
    reward_metrics,
)
from megatron_sftrl.rl.rewards.registry import Part, weighted
from tests.unit.rl.rewards.samples import sample

HOSTILE = str(Path(__file__).with_name("hostile.py"))
# Long enough for an honest sample (a millisecond) while eight other jobs share the machine.
SECONDS = 1.5


def pool_of(*names: str, num_workers: int = 1, seconds: float = SECONDS) -> RewardPool:
    sections = [RewardSection(name=name, modules=[HOSTILE]) for name in names]
    return RewardPool(sections, RewardWorkersSection(num_workers=num_workers, seconds=seconds, memory_gb=0.5))


@pytest.fixture(scope="module")
def pool() -> Iterator[RewardPool]:
    with pool_of("hostile") as made:
        yield made


OUTCOMES = {
    "hang": ("timeout", "more than 1.5 s"),
    "sleep": ("timeout", "more than 1.5 s"),
    "processor": ("timeout", "signal 24"),
    "bomb": ("error", "MemoryError: more than the worker's memory_gb"),
    "exit": ("crashed", "it ended with code 0"),
    "sys.exit": ("crashed", "it ended with code 0"),
    "killed": ("crashed", "signal 9"),
    "real-time signal": ("crashed", "signal 40"),
    "segfault": ("crashed", "signal 11"),
    "interrupt": ("crashed", "KeyboardInterrupt"),
    "forge": ("crashed", "no reply to its job"),
    "answer twice": ("crashed", "more than one reply"),
    "nonsense": ("crashed", "no JSON"),
    "list": ("crashed", "no reply"),
    "flood": ("crashed", "more than one reply"),
    "recursion": ("error", "RecursionError"),
    "raise": ("error", "KeyError: 'no such key'"),
    "nan": ("nonfinite", "reward is nan"),
    "huge": ("nonfinite", "reward is -1e+308, expected a finite number of at most 1e+15 in size"),
    "infinite": ("nonfinite", "reward is -inf"),
    "lenient nan": ("nonfinite", "lenient is nan"),
    "metric nan": ("nonfinite", "m is nan"),
    "text": ("error", "could not convert string to float"),
    "number": ("error", "expected the reward to return a RewardOutput, got float"),
    "none": ("error", "got NoneType"),
}


@pytest.mark.parametrize("act", OUTCOMES)
def test_a_hostile_sample_costs_itself_and_the_others_keep_their_rewards_and_places(
    act: str, pool: RewardPool
) -> None:
    before, lost, after = pool.score([sample("1.5"), sample(act), sample("-2")])
    assert (before.reward, before.outcome, after.reward, after.outcome) == (1.5, "ok", -2.0, "ok")
    outcome, detail = OUTCOMES[act]
    assert (lost.reward, lost.lenient, lost.outcome) == (None, None, outcome), lost
    assert detail in lost.parts[0].detail
    assert [one.parts[0].is_retried for one in (before, lost, after)] == [False, True, False]


def test_what_a_reward_prints_is_no_answer(pool: RewardPool) -> None:
    assert [one.reward for one in pool.score([sample("chatter"), sample("3")])] == [7.0, 3.0]


def test_every_result_is_told_as_soon_as_it_is_known(pool: RewardPool) -> None:
    told: list[None] = []
    pool.score([sample("chatter"), sample("exit"), sample("3")], lambda: told.append(None))
    assert len(told) >= 3  # one that failed may be tried again


def test_failures_are_counted_by_kind_and_described(pool: RewardPool) -> None:
    scored = pool.score([sample(text) for text in ("1", "exit", "raise", "nan", "raise")])
    metrics = reward_metrics(scored)
    kinds = ("timeout", "crashed", "error", "nonfinite", "retried")
    assert [metrics[f"reward/hostile/{kind}"] for kind in kinds] == [0, 1, 2, 1, 4]
    assert metrics["reward/mean"] == metrics["reward/hostile"] == 1
    assert metrics["reward/unscored"] == 4 / 5
    lines = describe_failures(scored)
    assert lines[1] == "sample 2: reward 'hostile': error: KeyError: 'no such key'"
    assert lines[3] == "and 1 more"


def test_two_workers_keep_the_order_of_many_samples_though_the_first_is_ready_last() -> None:
    texts = [str(number) for number in range(120)]
    texts[0], texts[3], texts[77] = "slow", "exit", "exit"
    with pool_of("hostile", num_workers=2, seconds=20) as pool:
        rewards = [one.reward for one in pool.score([sample(text) for text in texts])]
    expected = {"slow": 7.0, "exit": None}
    assert rewards == [expected[text] if text in expected else float(text) for text in texts]


def test_a_failed_reward_makes_the_sum_unknown_and_leaves_the_other_rewards_of_its_sample() -> None:
    sections = [
        RewardSection(name="hostile", modules=[HOSTILE], weight=2.0),
        RewardSection(name="length", weight=0.5, max_tokens=10, cache=5),  # type: ignore[call-arg]
    ]
    with RewardPool(sections, RewardWorkersSection(num_workers=1)) as pool:
        fine, broken = pool.score([sample("1", tokens=6), sample("exit", tokens=100)])
    # 2 * 1 + 0.5 * (5 - 6) / 5, exactly representable up to one rounding of 0.2
    assert fine.reward is not None
    assert math.isclose(fine.reward, 2 - 0.5 * 0.2, rel_tol=1e-15)
    assert (broken.reward, broken.lenient, broken.outcome) == (None, None, "crashed")
    assert [part.outcome for part in broken.parts] == ["crashed", "ok"]
    assert broken.parts[1].reward == -1.0


def test_a_failed_reward_that_is_only_measured_takes_nothing_from_the_sum() -> None:
    parts = (Part(name="math", outcome="ok", reward=1.0, lenient=1.0), Part(name="judge", outcome="timeout"))
    assert (weighted([2.0, 0.0], parts).reward, weighted([2.0, 0.5], parts).reward) == (2.0, None)
    # Where it is the first one, it is not known whether the response is a success.
    assert (weighted([2.0, 0.0], parts).first, weighted([0.0, 2.0], parts[::-1]).first) == (1.0, None)


def test_a_state_that_an_earlier_sample_left_behind_is_no_verdict() -> None:
    """`spoil` breaks its worker for good; what comes after it there is judged again in a fresh one."""
    with pool_of("spoilt") as pool:
        scored = pool.score([sample(text) for text in ("1", "spoil", "2", "spoil", "3")])
    assert [one.reward for one in scored] == [1.0, None, 2.0, None, 3.0]


def test_a_reward_that_is_broken_for_all_does_not_start_a_worker_for_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("megatron_sftrl.rl.rewards.pool.MOST_FRESH_STARTS", 2)
    with pool_of("always_raises") as pool:
        scored = pool.score([sample("", file=str(tmp_path / "pids"))] * 6)
    assert {one.outcome for one in scored} == {"error"}
    pids = (tmp_path / "pids").read_text().split()
    assert len(pids) == 12
    # One of the first tries, two that a failure has touched, and the one that judges the rest.
    assert [pids.count(pid) for pid in dict.fromkeys(pids)] == [6, 1, 1, 4]


def test_a_verifier_under_load_gets_a_second_chance_and_the_sample_its_reward(tmp_path: Path) -> None:
    with pool_of("late_at_first") as pool:
        (one,) = pool.score([sample("", file=str(tmp_path / "been_here"))])
    assert (one.reward, one.parts[0].is_retried) == (1.0, True)
    assert reward_metrics([one])["reward/late_at_first/retried"] == 1


def test_a_reward_that_judged_nothing_is_found_with_its_first_failure() -> None:
    fine = Part(name="math", outcome="ok", reward=1.0)
    bad = [Part(name="judge", outcome="error", detail=f"call {number}") for number in range(2)]
    scored = [weighted([1.0, 0.0], (fine, part)) for part in bad]
    assert failed_everywhere(scored) == bad[0]
    answered = weighted([1.0, 0.0], (fine, Part(name="judge", outcome="ok")))
    assert failed_everywhere([*scored, answered]) is None
    assert failed_everywhere([]) is None


@pytest.mark.parametrize("length", [1, 2**20])
@pytest.mark.parametrize("character", ["\0", "\ud800", "\U0001f600", "\u2028", "x"], ids=ascii)
def test_any_text_of_any_length_arrives_as_it_was(character: str, length: int, checksums: RewardPool) -> None:
    text = character * length
    (one,) = checksums.score([sample(text)])
    assert one.parts[0].metrics == {"length": len(text)}
    assert one.reward == zlib.crc32(text.encode("utf-8", "surrogatepass"))


@pytest.fixture(scope="module")
def checksums() -> Iterator[RewardPool]:
    with pool_of("checksum", seconds=20) as made:
        yield made


def test_a_worker_sees_no_secret_no_file_and_no_library_of_the_trainer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY", "MY_OWN"):
        monkeypatch.setenv(name, "hush-9f3")
    secret = tmp_path / "open_in_the_trainer"
    with secret.open("w") as file, pool_of("inside") as pool:
        os.set_inheritable(file.fileno(), True)
        (one,) = pool.score([sample("", secret="hush-9f3", file=str(secret))])
    seen = one.parts[0].metrics
    assert (seen["secrets"], seen["parents_files"], seen["loaded_torch"]) == (0, 0, 0)
    assert seen["descriptors"] == 5  # three standard ones, and the socket twice
    assert seen["is_home_its_directory"] == 1


def test_memory_processor_time_and_files_are_limited_anew_for_each_sample() -> None:
    with pool_of("inside", seconds=2.2) as pool:
        samples = [sample("", secret="x", file="x")] * 3
        limits = [one.parts[0].metrics for one in pool.score(samples)]
    assert {(limit["memory"], limit["core"], limit["file"]) for limit in limits} == {(2**29, 0, 2**26)}
    # 3 = 2.2 rounded up; the limit is a whole second, so that up to one more may remain.
    assert all(2 < limit["processor"] <= 4 for limit in limits)


def test_a_worker_that_dies_between_two_calls_is_replaced_and_nobody_pays() -> None:
    with pool_of("inside") as pool:
        (first,) = pool.score([sample("", secret="x", file="x")])
        os.kill(int(first.parts[0].metrics["pid"]), signal.SIGKILL)
        time.sleep(0.1)
        (second,) = pool.score([sample("", secret="x", file="x")])
    assert second.outcome == "ok"
    assert second.parts[0].metrics["pid"] != first.parts[0].metrics["pid"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_what_slurm_sends_to_every_process_of_a_job_ends_no_worker(number: int) -> None:
    with pool_of("inside") as pool:
        (first,) = pool.score([sample("", secret="x", file="x")])
        os.kill(int(first.parts[0].metrics["pid"]), number)
        time.sleep(0.1)
        (second,) = pool.score([sample("", secret="x", file="x")])
    assert second.parts[0].metrics["pid"] == first.parts[0].metrics["pid"]


@pytest.fixture(scope="module")
def evaluating() -> Iterator[RewardPool]:
    with pool_of("evaluates", seconds=10) as made:
        yield made


@pytest.mark.parametrize(
    "program",
    [
        "__import__('os').system('touch FILE')",
        "__import__('subprocess').run(['touch', 'FILE'])",
        "__import__('os').posix_spawn('/bin/touch', ['touch', 'FILE'], {})",
        "__import__('os').execv('/bin/touch', ['touch', 'FILE'])",
        "__import__('os').fork()",
        "__import__('os').kill(__import__('os').getppid(), 9)",
        "__import__('os').killpg(__import__('os').getpgid(__import__('os').getppid()), 0)",
        "__import__('resource').prlimit(__import__('os').getppid(), 0, (1, 1))",
        "__import__('socket').create_connection(('127.0.0.1', 9))",
        "__import__('urllib.request').request.urlopen('http://127.0.0.1:9')",
        "__import__('ctypes').CDLL(None).kill(0, 0)",
        "open('FILE', 'w')",
        "open('FILE', 'x')",
        "__import__('os').open('FILE', 0o101)",
        "__import__('os').rename('EXISTING', 'FILE')",
        "__import__('os').remove('EXISTING')",
        "__import__('os').truncate('EXISTING', 0)",
        "__import__('shutil').rmtree('EXISTING')",
        "__import__('os').symlink('EXISTING', 'FILE')",
    ],
)
def test_a_response_that_is_a_program_gets_neither_process_nor_network_nor_file(
    program: str, evaluating: RewardPool, tmp_path: Path
) -> None:
    existing = tmp_path / "existing"
    existing.write_text("mine")
    program = program.replace("FILE", str(tmp_path / "made")).replace("EXISTING", str(existing))
    (one,) = evaluating.score([sample(program)])
    assert one.outcome == "error"
    assert "PermissionError: a reward may not start processes" in one.parts[0].detail
    assert list(tmp_path.iterdir()) == [existing]
    assert existing.read_text() == "mine"


@pytest.mark.parametrize(
    "program",
    [
        *(f"open('/proc/TRAINER/{name}', 'rb').read(1)" for name in ("cmdline", "environ", "status", "comm")),
        "__import__('pathlib').Path('/proc/TRAINER/cmdline').read_bytes()",
        "__import__('os').open('/proc/TRAINER/cmdline', 0)",
        "__import__('os').open(b'/proc/TRAINER/cmdline', 0)",
        "__import__('os').listdir('/proc/TRAINER')",
        "list(__import__('os').scandir('/proc/TRAINER/fd'))",
        "__import__('os').listdir('/proc')",
        "__import__('os').chdir('/proc')",
        "__import__('os').open('/proc', 0)",
        "open('/proc/self/../TRAINER/cmdline')",
        "open('/proc/self/net/unix')",
        "open('FOLDER/link/cmdline')",
    ],
)
def test_a_response_that_is_a_program_reads_nothing_about_the_trainer_in_proc(
    program: str, evaluating: RewardPool, tmp_path: Path
) -> None:
    (tmp_path / "link").symlink_to(f"/proc/{os.getpid()}")
    program = program.replace("TRAINER", str(os.getpid())).replace("FOLDER", str(tmp_path))
    (one,) = evaluating.score([sample(program)])
    assert one.outcome == "error"
    assert "PermissionError: a reward may not look at other processes" in one.parts[0].detail


def test_the_kernel_hides_the_trainers_files_and_environment_where_no_audit_event_tells() -> None:
    script = (
        "import os\nfrom megatron_sftrl.rl.rewards.worker import enter_kernel_domain\n"
        "print(enter_kernel_domain())\n"
        "for look in (lambda path: os.readlink(path + 'cwd'), lambda path: open(path + 'environ').close()):\n"
        "    look('/proc/self/')\n"
        "    try:\n        look(f'/proc/{os.getppid()}/')\n"
        "    except PermissionError:\n        print('refused')\n"
    )
    ran = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    offered, *refused = ran.stdout.split()
    if offered == "False":
        pytest.skip("this kernel has no Landlock")
    assert refused == ["refused", "refused"]


def test_what_is_harmless_is_not_refused(evaluating: RewardPool) -> None:
    own = ("status", "environ", "limits", "stat", "maps")
    machine = ("cpuinfo", "meminfo", "stat", "loadavg", "sys/vm/swappiness")
    harmless = (
        f"[open('/proc/self/' + name).read() for name in {own}]",
        f"[open('/proc/' + name).read() for name in {machine}]",
        "__import__('os').listdir('/proc/self/fd')",
        "__import__('os').listdir()",
        "__import__('multiprocessing').cpu_count()",
        "__import__('decimal').Decimal(1) / 3",
        "print('x')",
    )
    for text, one in zip(harmless, evaluating.score([sample(text) for text in harmless]), strict=True):
        assert (one.outcome, one.reward) == ("ok", 1.0), (text, one.parts[0].detail)


def is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def has_ended(pid: int, *, seconds: float) -> bool:
    until = time.monotonic() + seconds
    while is_running(pid) and time.monotonic() < until:
        time.sleep(0.05)
    return not is_running(pid)


def test_what_a_hanging_sample_has_started_ends_with_its_worker(tmp_path: Path) -> None:
    with pool_of("leaves_a_child") as pool:
        (one,) = pool.score([sample("", file=str(tmp_path / "pids"))])
    assert one.outcome == "timeout"
    worker, child = map(int, (tmp_path / "pids").read_text().split())
    assert has_ended(worker, seconds=5)
    assert has_ended(child, seconds=5)


TRAINER = f"""
from megatron_sftrl.config.rewards import RewardSection, RewardWorkersSection
from megatron_sftrl.rl.rewards import RewardInputs, RewardPool
section = RewardSection(name="orphan", modules=[{HOSTILE!r}])
pool = RewardPool([section], RewardWorkersSection(num_workers=1, seconds=1))
row = dict(file="FILE")
pool.score([RewardInputs(prompt="", response="", row=row, num_response_tokens=1, is_finished=True)])
"""


def test_a_worker_whose_trainer_was_killed_in_mid_sample_ends_by_itself(tmp_path: Path) -> None:
    script = TRAINER.replace("FILE", str(tmp_path / "pid"))
    # A killed trainer cannot remove its worker's directory: let it be where pytest tidies up.
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-c", script]
    trainer = subprocess.run(command, cwd=Path(__file__).parents[4], env=environment, timeout=60)
    assert trainer.returncode == -signal.SIGKILL
    # Two seconds of processor time at most, on a machine that may be shared with many.
    assert has_ended(int((tmp_path / "pid").read_text()), seconds=30)


def test_a_pool_that_was_closed_leaves_no_process_and_starts_again() -> None:
    pool = pool_of("inside")
    with pool:
        (one,) = pool.score([sample("", secret="x", file="x")])
    assert has_ended(int(one.parts[0].metrics["pid"]), seconds=1)
    assert pool.score([sample("", secret="x", file="x")])[0].outcome == "ok"
    pool.close()


def test_a_module_that_loads_here_but_not_in_a_worker_is_an_error_that_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_TOKEN", "1")
    file = tmp_path / "needs_a_token.py"
    file.write_text("import os\nos.environ['MY_TOKEN']\n")
    section = RewardSection(name="length", modules=[str(file)], max_tokens=2, cache=1)  # type: ignore[call-arg]
    with (
        RewardPool([section], RewardWorkersSection()) as pool,
        pytest.raises(
            ValueError, match=r"do not load in a worker process: .*a_token\.py, line 2: KeyError: 'MY_TOKEN'"
        ),
    ):
        pool.score([sample("")])


def test_workers_that_die_while_they_start_end_the_run_after_three(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MY_TOKEN", "1")
    file = tmp_path / "dies.py"
    file.write_text(
        "import os\nif 'MY_TOKEN' not in os.environ:\n    print('alas', flush=True)\n    os._exit(3)\n"
    )
    section = RewardSection(name="length", modules=[str(file)], max_tokens=2, cache=1)  # type: ignore[call-arg]
    with (
        RewardPool([section], RewardWorkersSection(num_workers=1)) as pool,
        pytest.raises(
            RuntimeError, match=r"do not start, 3 times in a row \(it ended with code 3; it printed: alas\)"
        ),
    ):
        pool.score([sample("")])


def test_a_module_given_by_a_relative_path_is_found_by_the_workers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.py").write_text(
        "from megatron_sftrl import RewardOutput, register_reward\n"
        "@register_reward('by_relative_path')\n"
        "def mine(inputs, config):\n    return RewardOutput(reward=0.25)\n"
    )
    monkeypatch.chdir(tmp_path)
    section = RewardSection(name="by_relative_path", modules=["mine.py"])
    with RewardPool([section], RewardWorkersSection(num_workers=1)) as pool:
        assert pool.score([sample("")])[0].reward == 0.25


def test_a_row_that_lacks_the_answer_or_holds_no_json_is_refused_before_anything_runs() -> None:
    pool = RewardPool([RewardSection(name="exact_match")], RewardWorkersSection())
    with pytest.raises(
        ValueError, match=r"'exact_match' needs 'answer' in every row of the data, got a row "
    ):
        pool.score([sample("", answer="4"), sample("", answer=None, question="2 + 2")])
    unsuitable: RewardInputs = sample("", answer=object())  # type: ignore[arg-type]
    with pytest.raises(
        ValueError, match=r"sample 0: expected its row to hold JSON .* convert it when the data"
    ):
        pool.score([unsuitable])


def test_nothing_to_score_is_no_work() -> None:
    assert RewardPool([RewardSection(name="exact_match")], RewardWorkersSection()).score([]) == []
    assert reward_metrics([]) == {}


def test_lenient_readings_and_metrics_are_averaged_over_the_samples_that_have_them() -> None:
    parts = [
        Part(name="math", outcome="ok", reward=1.0, lenient=1.0, metrics={"answered": 1.0}, seconds=0.5),
        Part(name="math", outcome="ok", reward=0.0, lenient=1.0, metrics={"answered": 0.0}, seconds=0.1),
        Part(name="math", outcome="timeout", seconds=9.0),
    ]
    metrics = reward_metrics([weighted([1.0], (part,)) for part in parts])
    assert metrics["reward/math"] == metrics["reward/mean"] == 1 / 2
    assert metrics["reward/math/lenient"] == metrics["reward/lenient_mean"] == 1
    assert metrics["reward/unscored"] == 1 / 3
    assert metrics["reward/math/answered"] == 1 / 2
    assert (metrics["reward/math/timeout"], metrics["reward/slowest_seconds"]) == (1, 9.0)


def test_an_interrupted_score_leaves_no_answer_behind_for_the_next_one() -> None:
    class Stop(Exception):
        """What Ctrl-C, or a watchdog of the trainer, raises."""

    def interrupt(*_: object) -> None:
        raise Stop

    with pool_of("hostile", seconds=20) as pool:
        previous = signal.signal(signal.SIGALRM, interrupt)
        try:
            pool.score([sample("1")])
            signal.setitimer(signal.ITIMER_REAL, 0.3)
            with pytest.raises(Stop):
                pool.score([sample("slow"), sample("2")])
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, previous)
        assert [one.reward for one in pool.score([sample("3"), sample("4")])] == [3.0, 4.0]
