"""`sftrl compare`: two arms under two seeds, killed, failing, refused, and as jobs of Slurm."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import yaml

from megatron_sftrl.observability.run_lock import RunLock
from tests.e2e.compare_runs import CompareProject, make_compare_project
from tests.e2e.once import once
from tests.e2e.product import TIMEOUT_S, Started, run_product, sftrl, sftrl_each, start_product
from tests.e2e.project import read_rows
from tests.grid import HOW_TO_RUN_ALL, is_full

FORKING = ("-m", "tests.e2e.compare_runs")
ARMS, SEEDS = ("sft", "pear"), (0, 1)


@pytest.fixture(scope="module")
def comparison(tmp_path_factory: pytest.TempPathFactory) -> CompareProject:
    return once(tmp_path_factory, "compare", make_compare_project)


@pytest.fixture(scope="module")
def compared(comparison: CompareProject, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A finished comparison, and the report.json that it wrote."""

    def run(folder: Path) -> tuple[Path, str]:
        out = folder / "out"
        with start(comparison, out, folder / "log") as started:
            assert started.wait() == 0, started.output()
        return out, (out / "report.json").read_text()

    return once(tmp_path_factory, "compared", run)


def start(comparison: CompareProject, out: Path, log: Path, *more: str) -> Started:
    return start_product(*comparison.command(out, "launch.at_once=2", *more), log=log, program=FORKING)


def test_the_report_holds_the_numbers_of_the_evaluations(
    comparison: CompareProject, compared: tuple[Path, str]
) -> None:
    out, text = compared
    report = json.loads(text)
    assert list(report["arms"]) == list(ARMS)
    for arm in ARMS:
        assert report["arms"][arm]["failures"] == {}
        assert report["arms"][arm]["missing"] == []
        for side in ("sft", "grpo"):
            folders = [out / arm / f"seed-{seed}" / f"eval_{side}" for seed in SEEDS]
            told = [json.loads((each / "results.json").read_text())["results"] for each in folders]
            for name in ("accuracy", "pass@4", "entropy"):
                expected = sum(each["sampled"][name]["value"] for each in told) / len(SEEDS)
                found = report["arms"][arm]["numbers"][side][name]
                assert found["value"] == pytest.approx(expected), (arm, side, name)
                assert (found["num_seeds"], found["num_prompts"]) == (2, 10)
    after = {arm: report["arms"][arm]["numbers"]["grpo"]["accuracy"]["value"] for arm in ARMS}
    gap = next(each for each in report["differences"] if each["side"] == "grpo")
    assert gap["mean"]["value"] == pytest.approx(after["pear"] - after["sft"])
    page = (out / "report.html").read_text()
    assert "cannot be told from" in page
    assert f"loss.name=pear, loss.variant=token, score.checkpoint={comparison.base}" in page
    assert {each.name for each in (out / "plots").iterdir()} == {
        "pass_at_k.png", "entropy_in_grpo.png", "reward_in_grpo.png",
    }  # fmt: skip
    # What makes arms comparable: one start, one order of data per seed, and scores of the base's.
    starts = {
        (out / arm / f"seed-{seed}" / "sft" / "origins.json").read_text() for arm in ARMS for seed in SEEDS
    }
    assert len(starts) == 1
    assert [row["prompt"] for row in read_rows(next((out / "scores").glob("*-0.jsonl")))] == [
        row["prompt"] for row in read_rows(comparison.root / "train.jsonl")
    ]
    resolved = yaml.safe_load((out / "pear" / "seed-1" / "grpo" / "resolved.yaml").read_text())
    assert (resolved["seed"], resolved["model"]["init_checkpoint"]) == (1, str(out / "pear/seed-1/sft"))


def test_a_comparison_that_is_killed_again_and_again_ends_with_the_same_numbers(
    comparison: CompareProject, compared: tuple[Path, str], tmp_path: Path
) -> None:
    """Killed with its stages, and alone, so that a stage outlives it and is waited for; and asked to stop."""
    out = tmp_path / "out"
    moments = {
        "sft/seed-0/sft/checkpoints/step-00000001": "all",
        "sft/seed-0/eval_sft/generations.jsonl": "alone",
        "pear/seed-0/grpo/checkpoints/step-00000001": "alone",
        "sft/seed-1/sft/resolved.yaml": "asked",
        "sft/seed-1/grpo/checkpoints/step-00000001": "all",
    }
    if not is_full():  # each of the three once
        moments = dict(list(moments.items())[-3:])
    for number, (moment, whom) in enumerate(moments.items()):
        with start(comparison, out, tmp_path / f"log-{number}") as started:
            deadline = time.monotonic() + TIMEOUT_S
            # Asked before it runs stages, it would end as any program does.
            while not (out / moment).exists() or (whom == "asked" and "started" not in started.output()):
                assert started.is_running, started.output()
                assert time.monotonic() < deadline, started.output()
                time.sleep(0.02)
            if whom == "all":
                started.kill()
            else:
                number = signal.SIGTERM if whom == "asked" else signal.SIGKILL
                os.kill(started.processes()[0].pid, number)
                assert started.wait() == (os.EX_TEMPFAIL if whom == "asked" else -number), started.output()
    with start(comparison, out, tmp_path / "log") as started:
        assert started.wait() == 0, started.output()
    assert (out / "report.json").read_text() == compared[1]


@pytest.mark.skipif(not is_full(), reason=HOW_TO_RUN_ALL)
def test_an_arm_of_adapters_is_compared_with_one_of_all_weights(
    comparison: CompareProject, tmp_path: Path
) -> None:
    """Over a directory of Hugging Face's; RL goes on from the arm's merged weights."""
    sftrl("convert", "to-hf", "--checkpoint", str(comparison.base), "--out", str(tmp_path / "hf"))
    config = yaml.safe_load(comparison.yaml.read_text())
    base, out = config["base"], tmp_path / "out"
    base["sft"]["model"] = {"hf": str(tmp_path / "hf"), "dtype": "fp32"}
    lora = {"rank": 2, "alpha": 4}
    adapters = {"loss": {"name": "gift"}, "reference": {"kind": "frozen"}, "lora": lora}
    config |= {"seeds": [0], "out_dir": str(out), "arms": {"adapters": adapters}}
    (tmp_path / "compare.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    with start_product(
        "compare", str(tmp_path / "compare.yaml"), log=tmp_path / "log", program=FORKING
    ) as started:
        assert started.wait() == 0, started.output()
    report = json.loads((out / "report.json").read_text())
    assert all(arm["failures"] == {} and arm["missing"] == [] for arm in report["arms"].values())
    record = json.loads(next((out / "adapters/seed-0/sft/checkpoints").glob("*/checkpoint.json")).read_text())
    assert record["lora"]["rank"] == 2
    base["grpo"]["lora"] = lora
    (tmp_path / "compare.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    (ended,) = sftrl_each([["compare", str(tmp_path / "compare.yaml"), f"out_dir={tmp_path / 'never'}"]])
    assert "base.grpo: lora: expected none" in ended.expect(2).stderr


def test_an_arm_that_fails_is_told_with_its_error_and_the_others_go_on(
    comparison: CompareProject, compared: tuple[Path, str], tmp_path: Path
) -> None:
    """As a user starts it. Missing are an evaluation of another arm, and weights that nothing needs."""
    out, text = compared
    shutil.rmtree(out / "pear/seed-0/eval_grpo")
    kept = out / "pear/seed-0/sft/checkpoints"
    kept.rename(tmp_path / "kept")
    lost = "arms.lost={loss: {name: dft}, gates: [{metric: loss, above: 0.0, action: stop}]}"
    one_seed = comparison.command(out, lost, "seeds=[0]")
    with start_product(*one_seed, log=tmp_path / "log") as started:
        assert started.wait() == 1, started.output()
        assert "One seed: every interval is over prompts alone" in started.output()
    report, before = json.loads((out / "report.json").read_text()), json.loads(text)
    assert set(report["arms"]["lost"]["failures"]) == {"lost/seed-0/sft"}
    assert "loss" in report["arms"]["lost"]["failures"]["lost/seed-0/sft"]
    assert len(report["arms"]["lost"]["missing"]) == 3
    assert (report["arms"]["pear"]["seeds"], report["arms"]["pear"]["failures"]) == ([0], {})
    listed = run_product(*one_seed, "--list", log=tmp_path / "list")
    assert "9 done, 1 failed, 3 missing" in listed
    (tmp_path / "kept").rename(kept)
    run_product(*comparison.command(out, "--report-only"), log=tmp_path / "report")
    assert json.loads((out / "report.json").read_text()) == before


def test_what_does_not_fit_is_refused_by_name_before_anything_starts(
    comparison: CompareProject, compared: tuple[Path, str], tmp_path: Path
) -> None:
    out, _ = compared
    new = tmp_path / "new"
    other = tmp_path / "other.yaml"
    base = yaml.safe_load((comparison.root / "base.yaml").read_text())
    base["model"]["architecture"]["hidden_size"] = 32
    other.write_text(yaml.safe_dump({**base, "run_dir": str(tmp_path / "other")}))
    few, tokenizer = tmp_path / "few.jsonl", tmp_path / "tokenizer"
    few.write_text("".join((comparison.root / "train.jsonl").read_text().splitlines(keepends=True)[:16]))
    shutil.copytree(comparison.root / "tokenizer", tokenizer)
    template = json.loads((tokenizer / "tokenizer_config.json").read_text())
    (tokenizer / "chat_template.jinja").write_text("{{ messages[0].content }}<|end|>")
    (tokenizer / "tokenizer_config.json").write_text(json.dumps({**template, "chat_template": None}))
    sftrl_each([["sft", str(other), "train.steps=1"]])[0].expect(0)
    pear = "arms.pear={loss: {name: pear}, score: {checkpoint: %s}}"
    cases = {
        "arm pear: score.checkpoint: checkpoint": (new, pear % (tmp_path / "other")),
        "score: the loss dft reads no behaviour": (
            new, f"arms.dft={{loss: {{name: dft}}, score: {{checkpoint: {comparison.base}}}}}",
        ),
        "its tokenizer is another one than that of base.sft": (
            new, f"base.grpo.tokenizer={{path: {tokenizer}}}",
        ),
        "model.init_checkpoint: checkpoint": (new, f"base.sft.model.init_checkpoint={tmp_path / 'other'}"),
        "arms.dft.train: all arms share train": (new, "arms.dft={loss: {name: dft}, train: {steps: 9}}"),
        "base.sft: expected train.steps": (new, "base.sft.train={epochs: 1}"),
        "base.eval.ks: expected 1 to samples = 4, got 8": (new, "base.eval.ks=[8]"),
        "train.steps: 3 there, 4 now": (out, "base.sft.train.steps=4"),
        f"data.train: ['{comparison.root / 'train.jsonl'}'] there": (out, f"base.sft.data.train=[{few}]"),
        "with samples 4 and not 5": (out, "base.eval.samples=5"),
        "base.eval.prompts: 20 of 20 are in the training files, too": (
            new, f"base.eval.prompts=[{comparison.root / 'train.jsonl'}]",
        ),
        f"there is no comparison to report in out_dir {new}": (new, "--report-only"),
    }  # fmt: skip
    lines = [comparison.command(folder, change) for folder, change in cases.values()]
    for message, ended in zip(cases, sftrl_each(lines), strict=True):
        assert message in ended.expect(2).stderr
    assert not new.exists()
    for name, told in {"train.jsonl": "base.sft data.train: ", "my_rewards.py": "module "}.items():
        file = comparison.root / name
        text = file.read_text()
        file.write_text(text.removesuffix("\n").rpartition("\n")[0] + "\n")  # the same path, other content
        try:
            assert told in sftrl_each([comparison.command(out)])[0].expect(2).stderr
        finally:
            file.write_text(text)
    with RunLock(out):
        assert "in use by another run" in sftrl_each([comparison.command(out)])[0].expect(2).stderr


SBATCH = """#!/bin/bash
number=$(($(wc -l < "$CALLS") + 100))
echo "$number $*" >> "$CALLS"
script="${@: -1}"
[ -z "$RUNS" ] || bash "$script" > "$CALLS.$number" 2>&1
echo "$number"
"""


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """sbatch that notes its calls in this file, and runs its job at once where RUNS is set; no queue."""
    programs, calls = tmp_path / "bin", tmp_path / "calls"
    programs.mkdir()
    for name, text in {
        "sbatch": SBATCH,
        "srun": '#!/bin/bash\nexec "$@"\n',
        "squeue": '#!/bin/bash\necho "$QUEUE"\n',
    }.items():
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    calls.touch()
    for name, value in {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "CALLS": str(calls),
        "RUNS": "",
        "QUEUE": "",
    }.items():
        monkeypatch.setenv(name, value)
    return calls


def test_slurm_jobs_wait_for_those_they_need_and_are_submitted_once(
    comparison: CompareProject, slurm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = comparison.command(tmp_path / "out", "launch={kind: slurm, sbatch: [--time=5]}", "seeds=[0]")
    with start_product(*command, log=tmp_path / "log") as started:
        assert started.wait() == 0, started.output()
    jobs = {}
    for line in slurm.read_text().splitlines():
        number, *words = line.split()
        assert {"--time=5", "--nodes=1"} <= set(words)
        name = next(word for word in words if word.startswith("--job-name=")).removeprefix(
            "--job-name=compare-"
        )
        needs = next((word for word in words if word.startswith("--dependency=")), "")
        jobs[name] = (number, needs.removeprefix("--dependency="))
    at = {name: number for name, (number, _) in jobs.items()}
    (score,) = (name for name in jobs if name.startswith("scores-base-"))
    assert {name: needs for name, (_, needs) in jobs.items() if name != "report"} == {
        score: "",
        "sft-seed-0-sft": "",
        "sft-seed-0-eval_sft": f"afterok:{at['sft-seed-0-sft']}",
        "sft-seed-0-grpo": f"afterok:{at['sft-seed-0-sft']}",
        "sft-seed-0-eval_grpo": f"afterok:{at['sft-seed-0-grpo']}",
        "pear-seed-0-sft": f"afterok:{at[score]}",
        "pear-seed-0-eval_sft": f"afterok:{at['pear-seed-0-sft']}",
        "pear-seed-0-grpo": f"afterok:{at['pear-seed-0-sft']}",
        "pear-seed-0-eval_grpo": f"afterok:{at['pear-seed-0-grpo']}",
    }
    every = [number for name, number in at.items() if name != "report"]
    assert jobs["report"][1] == f"afterany:{':'.join(every)}"
    monkeypatch.setenv("QUEUE", "100")  # all of them are queued
    with start_product(*command, log=tmp_path / "log") as started:
        assert started.wait() == 0, started.output()
    assert len(slurm.read_text().splitlines()) == len(jobs) + 1  # another report alone


def test_a_slurm_job_does_its_stage_and_leaves_its_exit_code(
    comparison: CompareProject,
    compared: tuple[Path, str],
    slurm: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out, text = compared
    shutil.rmtree(out / "pear/seed-0/eval_grpo")
    monkeypatch.setenv("RUNS", "1")
    with start_product(*comparison.command(out, "launch={kind: slurm}"), log=tmp_path / "log") as started:
        assert started.wait() == 0, started.output()
    assert len(slurm.read_text().splitlines()) == 2
    assert (out / "report.json").read_text() == text
