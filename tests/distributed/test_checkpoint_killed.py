"""kill -9 at any moment: what was complete before stays complete, and the run goes on from there."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import random
import signal
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from megatron_sftrl.apps.doctor.ranks import IMPORTED_BEFORE_THE_FORKS
from megatron_sftrl.engine.checkpoint import directory as checkpoint_directory
from megatron_sftrl.engine.checkpoint.directory import read_record
from tests.distributed.checkpoint_runs import NUM_STEPS, Outcome, Span, engines, run_span, stored_tensors

NUM_KILLS = 8
HALF = NUM_STEPS // 2
SPAN = Span(parallel={}, optim={"eps": 1e-8}, reference="moving_average")


@pytest.mark.parametrize("async_save", [False, True])
def test_a_kill_in_the_middle_of_a_save_leaves_the_previous_checkpoint_usable(
    async_save: bool, tmp_path: Path
) -> None:
    found = in_fresh_process(kill_saves, str(tmp_path), NUM_KILLS, async_save)
    assert len(found) == NUM_KILLS
    assert any(leftover for _, leftover in found), "no kill hit a save: the test is blind"


def test_a_run_killed_after_its_checkpoint_resumes_bitwise(tmp_path: Path) -> None:
    whole, resumed = in_fresh_process(kill_and_resume, str(tmp_path))
    assert resumed.step == HALF
    assert resumed.metrics == whole.metrics[HALF:]
    assert [name for name in whole.state if not torch.equal(whole.state[name], resumed.state[name])] == []
    assert {float(value) for name, value in resumed.state.items() if name.endswith(".step")} == {NUM_STEPS}


def kill_saves(directory: str, num_kills: int, async_save: bool) -> list[tuple[int, bool]]:
    """(latest step, was a save interrupted) after each kill; raises when what is left is not sound."""
    delays = random.Random(0)
    found = []
    for _ in range(num_kills):
        pid, ready = fork(lambda say: save_for_ever(directory, async_save, say))
        os.read(ready, 1)
        time.sleep(delays.uniform(0.0, 0.1))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        os.close(ready)
        complete = checkpoint_directory.complete_checkpoints(Path(directory))
        assert 1 <= len(complete) <= 3
        for path in complete:
            record = read_record(path)
            step = record.trainer.step
            for name, file in record.files.items():
                assert checkpoint_directory.file_problem(path / name, file) is None
            for key, tensor in stored_tensors(path).items():
                assert not key.startswith("policy.") or bool((tensor == step).all())
        found.append((step, any(path.name.startswith(".") for path in Path(directory).iterdir())))
    return found


def save_for_ever(directory: str, async_save: bool, say: Callable[[bytes], None]) -> None:
    """Step after step, a checkpoint whose every weight is the step's number."""
    from megatron_sftrl.engine.checkpoint import CheckpointStore, TrainerState

    with engines(Span(parallel={})) as (parallel, policy, reference):
        store = CheckpointStore(Path(directory), parallel, keep_last=2, async_save=async_save)
        latest = store.latest()
        step = store.load(latest, policy, reference).step if latest else 0
        for number in range(step + 1, 10**6):
            with torch.no_grad():
                for chunk in policy.chunks:
                    for parameter in chunk.parameters():
                        parameter.fill_(number)
            store.save(TrainerState(step=number), policy, reference)
            if number == step + 1:
                store.finish()
                say(b"1")


def kill_and_resume(directory: str) -> tuple[Outcome, Outcome]:
    """(the run that was never interrupted, the run that was killed one step after its checkpoint)."""
    import dataclasses

    half = dataclasses.replace(SPAN, last=HALF, save=directory)
    beyond = dataclasses.replace(SPAN, load=directory, last=HALF + 1)

    def train_and_die(say: Callable[[bytes], None]) -> None:
        run_span(half)
        run_span(beyond)
        os.kill(os.getpid(), signal.SIGKILL)

    whole = ask(lambda: run_span(SPAN))
    pid, _ = fork(train_and_die)
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGKILL
    return whole, ask(lambda: run_span(dataclasses.replace(SPAN, load=directory)))


def in_fresh_process(function: Callable, *args: Any) -> Any:
    """Call `function` in a process that has no threads, so that it may fork."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(IMPORTED_BEFORE_THE_FORKS)
    ours, theirs = context.Pipe()
    process = context.Process(target=_answer, args=(theirs, function, args))
    process.start()
    theirs.close()
    try:
        is_good, answer = pickle.loads(ours.recv_bytes()) if ours.poll(120) else (False, "no answer")
    finally:
        process.kill()
        process.join()
    assert is_good, answer
    return answer


def _answer(pipe: Any, function: Callable, args: tuple) -> None:
    from megatron_sftrl.engine import cpu_backend

    cpu_backend.install()
    import megatron_sftrl.engine.checkpoint  # noqa: F401  imported once, before the forks

    torch.set_num_threads(1)
    try:
        answer = pickle.dumps((True, function(*args)))
    except BaseException:
        answer = pickle.dumps((False, traceback.format_exc()))
    pipe.send_bytes(answer)


def fork(child: Callable[[Callable[[bytes], None]], None]) -> tuple[int, int]:
    """(pid, end of a pipe on which the child can say something)."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid:
        os.close(writer)
        return pid, reader
    os.close(reader)
    try:
        child(lambda message: os.write(writer, message) and None)
    except BaseException:
        traceback.print_exc()
    os._exit(1)


def ask(function: Callable[[], Outcome]) -> Outcome:
    """What `function` returns in a child of its own."""
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            with open(writer, "wb") as stream:
                pickle.dump(function(), stream)
        except BaseException:
            traceback.print_exc()
        os._exit(0)
    os.close(writer)
    with open(reader, "rb") as stream:
        answer = pickle.loads(stream.read())
    os.waitpid(pid, 0)
    return answer
