"""`sftrl coupling` on two steps of a run and an export: paired, resumed, the same with tensor parallelism."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.grpo_project import GrpoProject
from tests.e2e.product import sftrl, sftrl_each
from tests.e2e.project import read_rows

SAMPLES = 3
PAIRS = ("rl-1 -> rl-2", "rl-2 -> hf", "rl-1 -> hf")


@dataclass(frozen=True)
class Measured:
    """A finished report, and the command that made it."""

    out: Path
    run: Path
    hf: Path
    shown: Path
    command: Callable[..., list[str]]

    def found(self, out: Path | None = None) -> dict[str, Any]:
        return json.loads(((out or self.out) / "coupling.json").read_text())


@pytest.fixture(scope="module")
def measured(grpo: GrpoProject, tmp_path_factory: pytest.TempPathFactory) -> Measured:
    root = tmp_path_factory.mktemp("coupling")
    run, hf, shown = root / "run", root / "hf", root / "shown.jsonl"
    sftrl(*grpo.command(run, "checkpoint={every: 1, keep_last: 3}"))
    sftrl("convert", "to-hf", "--checkpoint", str(run), "--out", str(hf))
    shutil.rmtree(run / "checkpoints" / "step-00000003")  # the export is the third stage
    rows = [{"prompt": row["prompt"], "response": row["prompt"][:5]} for row in read_rows(grpo.prompts)]
    shown.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def command(out: Path, *more: str) -> list[str]:
        return [
            "coupling", str(grpo.yaml), *more, "--along", f"rl={run}", "--stage", f"hf={hf}", "--prompts",
            str(grpo.prompts), "--demonstrations", str(shown), "--out", str(out), "--samples", str(SAMPLES),
            "--rank", "4",
        ]  # fmt: skip

    sftrl(*command(root / "out"))
    return Measured(out=root / "out", run=run, hf=hf, shown=shown, command=command)


def test_changes_are_those_of_the_evaluations_of_the_stages(measured: Measured) -> None:
    found = measured.found()
    assert list(found["stages"]) == ["rl-1", "rl-2", "hf"]
    assert tuple(found["changes"]) == PAIRS
    results = {
        name: json.loads((measured.out / name / "results.json").read_text())["results"]
        for name in found["stages"]
    }
    for pair, changes in found["changes"].items():
        before, after = (results[name] for name in pair.split(" -> "))
        for name, arm in (
            ("nll/token", "demonstrations"), ("accuracy", "sampled"), ("lenient", "sampled"),
            (f"pass@{SAMPLES}", "sampled"), ("entropy", "sampled"),
        ):  # fmt: skip
            change = after[arm][name]["value"] - before[arm][name]["value"]
            assert changes[name]["value"] == pytest.approx(change, abs=1e-12)
        # The run's only reward, of weight 1.
        change = after["sampled"]["reward/vowels"]["value"] - before["sampled"]["reward/vowels"]["value"]
        assert changes["reward"]["value"] == pytest.approx(change, abs=1e-12)
        assert changes["nll/token"]["low"] <= changes["nll/token"]["value"] <= changes["nll/token"]["high"]
        assert changes["kl/token"]["value"] > 1e-4
        kinds = found["rotation"][pair]["kind"]
        assert {"embed_tokens", "layers.self_attn.q_proj", "layers.mlp.down_proj"} <= set(kinds)
        assert all(each["weights"] > 0 and each["largest"] > 0 for each in kinds.values())
    for gradients in found["gradients"].values():
        assert gradients["num_responses"] == SAMPLES * len(read_rows(measured.shown))
        assert 0 < abs(gradients["cosine"]) < 1
    assert "rl-1 -&gt; hf" in (measured.out / "report.html").read_text()


def test_tensor_parallel_ranks_measure_the_same_and_a_kl_term_pulls_to_its_reference(
    measured: Measured, tmp_path: Path
) -> None:
    """The evaluations are there already; at the reference itself KL has no gradient."""
    start = measured.run / "checkpoints" / "step-00000001"
    kl = ("loss={name: grpo, kl_coefficient: 50}", f"reference={{kind: frozen, checkpoint: {start}}}")
    out = tmp_path / "out"
    shutil.copytree(
        measured.out, out, ignore=shutil.ignore_patterns("kl", "gradients.json", "rotation.jsonl")
    )
    sftrl(*measured.command(out, "parallel.tp=2", *kl), ranks=2)
    ours, theirs = measured.found(out), measured.found()
    assert ours["numbers"] == theirs["numbers"]
    assert ours["rotation"] == theirs["rotation"]
    cosines = [[each["gradients"][name]["cosine"] for each in (ours, theirs)] for name in theirs["stages"]]
    assert cosines[0][0] == pytest.approx(cosines[0][1], abs=1e-5)
    assert all(abs(mine - plain) > 1e-3 for mine, plain in cosines[1:])
    for pair, changes in theirs["changes"].items():
        divergence = ours["changes"][pair]["kl/token"]["value"]
        assert divergence == pytest.approx(changes["kl/token"]["value"], abs=1e-5)


def test_a_loss_without_advantages_has_a_gradient_where_all_responses_are_equally_good(
    measured: Measured, tmp_path: Path
) -> None:
    start = measured.run / "checkpoints" / "step-00000001"
    loss = ("loss={name: ts_opsd, tau: 2.0}", f"reference={{kind: frozen, checkpoint: {start}}}")
    out = tmp_path / "out"
    shutil.copytree(measured.out, out, ignore=shutil.ignore_patterns("gradients.json"))
    for log in out.glob("*/generations.jsonl"):
        lines = [json.loads(line) for line in log.read_text().splitlines()]
        for part in (part for line in lines for each in line["responses"] for part in each["rewards"]):
            part["reward"] = 0.0
        log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    sftrl(*measured.command(out, *loss))
    for each in measured.found(out)["gradients"].values():
        assert each["rl"] > 0
        assert each["num_responses"] == SAMPLES * len({row["prompt"] for row in read_rows(measured.shown)})


def test_a_killed_measurement_goes_on_and_ends_with_the_same(measured: Measured, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(measured.out, out)
    lines = (out / "rl-2" / "generations.jsonl").read_text().splitlines(keepends=True)
    (out / "rl-2" / "generations.jsonl").write_text("".join(lines[:5]) + lines[5][:40])
    turns = (out / "rotation.jsonl").read_text().splitlines(keepends=True)
    (out / "rotation.jsonl").write_text("".join(turns[:4]) + turns[4][:40])
    for gone in ("coupling.json", "report.html", "rl-2/results.json", "hf/gradients.json", "kl/rl-2/hf.json"):
        (out / gone).unlink()
    kept = [out / "rl-1" / "gradients.json", out / "kl" / "rl-1" / "hf.json"]
    times = [file.stat().st_mtime_ns for file in kept]
    sftrl(*measured.command(out))
    assert (out / "coupling.json").read_bytes() == (measured.out / "coupling.json").read_bytes()
    assert [file.stat().st_mtime_ns for file in kept] == times


def test_what_cannot_be_compared_is_refused_by_name(
    measured: Measured, grpo: GrpoProject, tmp_path: Path
) -> None:
    def command(*stages: str, more: tuple[str, ...] = ()) -> list[str]:
        named = [word for stage in stages for word in ("--stage", stage)]
        return [
            "coupling", str(grpo.yaml), *named, "--prompts", str(grpo.prompts), "--demonstrations",
            str(measured.shown), "--out", str(tmp_path / "out"), *more,
        ]  # fmt: skip

    run, hf = str(measured.run), str(measured.hf)
    larger, foreign, empty = tmp_path / "larger", tmp_path / "foreign", tmp_path / "empty.jsonl"
    shutil.copytree(measured.hf, larger)
    config = json.loads((larger / "config.json").read_text())
    (larger / "config.json").write_text(json.dumps(config | {"intermediate_size": 96}))
    shutil.copytree(measured.hf, foreign)
    rules = json.loads((foreign / "tokenizer.json").read_text())
    vocabulary = rules["model"]["vocab"]
    vocabulary["j"], vocabulary["q"] = vocabulary["q"], vocabulary["j"]
    (foreign / "tokenizer.json").write_text(json.dumps(rules))
    empty.write_text("")
    refused = {
        "expected two stages or more, got 1": command(f"a={run}"),
        "--stage b: ": command(f"a={run}", f"b={run}/checkpoints/step-00000002"),
        "--stage kl: a stage names a folder": command(f"a={run}", f"kl={hf}"),
        "--stage A: two stages have this name": command(f"a={run}", f"A={hf}"),
        "--stage b: ffn_hidden_size: ": command(f"a={run}", f"b={larger}"),
        "--stage c: ": command(f"a={run}", f"c={foreign}"),
        "--k: expected 1 to --samples = 3, got 4": command(
            f"a={run}", f"b={hf}", more=("--samples", "3", "--k", "4")
        ),
        "--samples: expected 2 or more, got 1": command(f"a={run}", f"b={hf}", more=("--samples", "1")),
        f"{empty} holds no row": command(f"a={run}", f"b={hf}", more=("--demonstrations", str(empty))),
        "the loss grpo looks at a reference, whose weights are known where": command(
            f"a={run}", f"b={hf}", more=("loss.kl_coefficient=0.1", "reference={kind: frozen}")
        ),
        "holds an evaluation with another seed: 0 and not 1": measured.command(measured.out, "--seed", "1"),
    }
    says = {
        "--stage b: ": "is a, too",
        "--stage c: ": "another tokenizer",
        "--stage b: ffn": "is not the model",
    }
    for message, ended in zip(refused, sftrl_each(list(refused.values())), strict=True):
        said = ended.expect(2).stderr
        assert message.removesuffix("ffn_hidden_size: ") in said
        assert next((text for start, text in says.items() if message == start), "") in said
    assert not (tmp_path / "out").exists()
