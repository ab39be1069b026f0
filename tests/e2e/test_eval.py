"""`sftrl eval` from a run's checkpoint: the responses of `sftrl generate`, resumed where it was killed."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.grpo_project import GrpoProject
from tests.e2e.product import sftrl, sftrl_each
from tests.e2e.project import read_rows

SAMPLES = 3


def demonstrations(grpo: GrpoProject) -> Path:
    """Held-out rows with responses, beside the prompts."""
    path = grpo.root / "shown.jsonl"
    rows = [{"prompt": row["prompt"], "response": row["prompt"][:5]} for row in read_rows(grpo.prompts)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def command(grpo: GrpoProject, run: Path, out: Path, *more: str) -> list[str]:
    return [
        "eval", str(grpo.yaml), f"run_dir={run}", "--prompts", str(grpo.prompts), "--out", str(out),
        "--demonstrations", str(demonstrations(grpo)), "--samples", str(SAMPLES), "--seed", "6", *more,
    ]  # fmt: skip


def lines_of(out: Path) -> dict[tuple[str, int], dict[str, Any]]:
    return {(line["arm"], line["prompt"]): line for line in read_rows(out / "generations.jsonl")}


def texts_of(out: Path) -> dict[tuple[str, int], list[str]]:
    return {key: [each["text"] for each in line["responses"]] for key, line in lines_of(out).items()}


@pytest.fixture(scope="module")
def evaluated(grpo: GrpoProject, grpo_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("eval") / "out"
    sftrl(*command(grpo, grpo_run, out))
    return out


def test_the_numbers_are_those_of_the_responses_that_were_kept(
    evaluated: Path, grpo: GrpoProject, grpo_run: Path, tmp_path: Path
) -> None:
    prompts = read_rows(grpo.prompts)
    lines = lines_of(evaluated)
    assert set(lines) == {(arm, n) for arm in ("greedy", "sampled") for n in range(len(prompts))}
    results = json.loads((evaluated / "results.json").read_text())["results"]
    for arm, number in (("greedy", 1), ("sampled", SAMPLES)):
        groups = [lines[arm, place]["responses"] for place in range(len(prompts))]
        assert {len(group) for group in groups} == {number}
        shares = [sum("aeiou".count(c) for c in each["text"]) for group in groups for each in group]
        firsts = [each["first"] for group in groups for each in group]
        assert [first > 0 for first in firsts] == [share > 0 for share in shares]
        right = [sum(each["first"] >= 0.5 for each in group) / number for group in groups]
        assert results[arm]["accuracy"]["value"] == pytest.approx(sum(right) / len(right))
        lengths = [sum(len(each["tokens"]) for each in group) / number for group in groups]
        assert results[arm]["tokens"]["value"] == pytest.approx(sum(lengths) / len(lengths))
    entropies = {"entropy", "entropy/top_fifth"}
    assert set(results["sampled"]) == {*results["greedy"], *entropies, "pass@1", f"pass@{SAMPLES}"}
    drawn = [[each["entropies"] for each in lines["sampled", n]["responses"]] for n in range(len(prompts))]
    means = [sum(map(sum, group)) / sum(map(len, group)) for group in drawn]
    assert results["sampled"]["entropy"]["value"] == pytest.approx(sum(means) / len(means))
    scored = tmp_path / "scored.jsonl"
    sftrl(
        "score", str(grpo.yaml), f"run_dir={grpo_run}", "--checkpoint", str(grpo_run),
        "--data", str(demonstrations(grpo)), "--out", str(scored),
    )  # fmt: skip
    nats = [row["behavior_logprobs"] for row in read_rows(scored)]
    tokens = [-value for row in nats for value in row]
    shown = results["demonstrations"]
    assert shown["nll/token"]["value"] == pytest.approx(sum(tokens) / len(tokens))
    assert shown["nll/sequence"]["value"] == pytest.approx(sum(tokens) / len(nats))
    out = tmp_path / "generated.jsonl"
    sftrl(
        "generate", str(grpo.yaml), f"run_dir={grpo_run}", "--prompts", str(grpo.prompts), "--out", str(out),
        "--max-new-tokens", "8", "--seed", "6",
    )  # fmt: skip
    generated = [row["responses"] for row in read_rows(out)]
    assert generated == [texts_of(evaluated)["greedy", place] for place in range(len(prompts))]


@pytest.mark.parametrize("layout", ["parallel.tp=2", "parallel.pp=2", "seed=7"])
def test_two_processes_answer_as_one_does(
    layout: str, evaluated: Path, grpo: GrpoProject, grpo_run: Path, tmp_path: Path
) -> None:
    """seed=7 is the run's own: dp = 2."""
    out = tmp_path / "out"
    sftrl(*command(grpo, grpo_run, out, layout), ranks=2)
    assert texts_of(out) == texts_of(evaluated)
    for key, line in lines_of(evaluated).items():
        for mine, theirs in zip(lines_of(out)[key]["responses"], line["responses"], strict=True):
            assert len(theirs["entropies"]) == (len(theirs["tokens"]) if key[0] == "sampled" else 0)
            assert mine["entropies"] == pytest.approx(theirs["entropies"], abs=1e-5)
    likely = [json.loads((each / "results.json").read_text())["results"] for each in (out, evaluated)]
    ours, theirs = (each["demonstrations"]["nll/token"]["value"] for each in likely)
    assert ours == pytest.approx(theirs, abs=1e-5)


def test_a_killed_evaluation_goes_on_behind_what_it_has_written(
    evaluated: Path, grpo: GrpoProject, grpo_run: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.mkdir()
    lines = (evaluated / "generations.jsonl").read_text().splitlines(keepends=True)
    kept = "".join(lines[:5])
    (out / "generations.jsonl").write_text(kept + lines[5][:40])
    (out / "settings.json").write_text((evaluated / "settings.json").read_text())
    sftrl(*command(grpo, grpo_run, out))
    assert (out / "generations.jsonl").read_text().startswith(kept)
    assert texts_of(out) == texts_of(evaluated)
    numbers = [json.loads((folder / "results.json").read_text())["results"] for folder in (out, evaluated)]
    assert numbers[0] == numbers[1]


def test_what_cannot_be_evaluated_is_refused_by_name(
    evaluated: Path, grpo: GrpoProject, grpo_run: Path, tmp_path: Path
) -> None:
    no_prompts = ["eval", str(grpo.yaml), f"run_dir={grpo_run}", "--out", str(tmp_path / "a")]
    refused = {
        "holds an evaluation with another seed: 6 and not 7": [
            *command(grpo, grpo_run, evaluated)[:-1], "7",
        ],
        f"--k: expected 1 to --samples = {SAMPLES}, got 4": [
            *command(grpo, grpo_run, tmp_path / "b"), "--k", "4",
        ],
        "the run has no data.valid; name prompts by --prompts": no_prompts,
    }  # fmt: skip
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "settings.json").write_text((evaluated / "settings.json").read_text())
    (broken / "generations.jsonl").write_text('{"arm": "greedy"}\n')
    refused["generations.jsonl:1: expected a line that an evaluation wrote"] = command(grpo, grpo_run, broken)
    handoff = ["handoff", *command(grpo, grpo_run, tmp_path / "c")[1:]]
    refused["--min-entropy: expected a number from -1 to inf, got nan"] = [*handoff, "--min-entropy", "nan"]
    refused["--max-equal-groups: expected a number from -1 to 1, got 7.0"] = [
        *handoff, "--max-equal-groups", "7",
    ]  # fmt: skip
    refused["--max-kl: it is a limit on the distance from --base"] = [*handoff, "--max-kl", "1"]
    alone = [each for each in handoff if each not in ("--demonstrations", str(demonstrations(grpo)))]
    refused["--base: its distance is measured on demonstrations"] = [*alone, "--base", str(grpo_run)]
    for message, ended in zip(refused, sftrl_each(list(refused.values())), strict=True):
        assert message in ended.expect(2).stderr


def test_handoff_judges_samples_at_temperature_1_and_ends_with_1_beyond_a_limit(
    grpo: GrpoProject, grpo_run: Path, tmp_path: Path
) -> None:
    base = ["--base", str(grpo_run / "checkpoints" / sorted(os.listdir(grpo_run / "checkpoints"))[-1])]
    lines = [
        ["handoff", *command(grpo, grpo_run, tmp_path / "out", "rollout.temperature=0.5")[1:], *base, *more]
        for more in ([], ["--min-finished", "0", "--min-headroom", "-1", "--max-equal-groups", "1"])
    ]
    strict, loose = sftrl_each(lines)
    strict.expect(1)
    loose.expect(0)
    sampler = json.loads((tmp_path / "out" / "settings.json").read_text())["rollout"]
    assert (sampler["temperature"], sampler["top_p"], sampler["top_k"]) == (1.0, 1.0, 0)
    found = json.loads((tmp_path / "out" / "handoff.json").read_text())
    entropy = json.loads((tmp_path / "out" / "results.json").read_text())["results"]["sampled"]["entropy"]
    assert found["min_entropy"]["found"] == entropy
    assert found["max_kl"]["found"]["value"] == pytest.approx(0, abs=1e-6), (
        "the base is the checkpoint itself"
    )
    assert (found["max_kl"]["limit"], found["max_kl"]["is_kept"]) == (None, True)
