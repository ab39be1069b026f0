"""Which commands a comparison is made of."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_sftrl.apps.compare.config import read_compare_config
from megatron_sftrl.apps.compare.plan import Stage, _check_overlap, stages_of
from megatron_sftrl.config.load import config_from_text
from megatron_sftrl.config.schema import GrpoConfig
from megatron_sftrl.errors import UserError
from tests.e2e.compare_runs import runs_of


def stages(root: Path, data: dict[str, Any], **arms: dict[str, Any]) -> dict[str, Stage]:
    """Of the arm pear, under one seed, whose demonstrations are scored; and of further arms."""
    sft, grpo = runs_of(root)
    sft["data"].update(data)
    tree = {
        "out_dir": str(root / "out"),
        "seeds": [0],
        "base": {"sft": sft, "grpo": grpo, "eval": {"prompts": ["p.jsonl"]}},
        "arms": {"pear": {"loss": {"name": "pear"}, "score": {"checkpoint": "writer"}}, **arms},
    }
    (root / "compare.yaml").write_text(yaml.safe_dump(tree))
    return {each.name: each for each in stages_of(read_compare_config(root / "compare.yaml", []))}


@pytest.mark.parametrize("weights", [None, (0.25, 0.75)])
def test_every_file_that_the_loss_reads_is_scored_and_keeps_its_weight(
    weights: tuple[float, float] | None, tmp_path: Path
) -> None:
    """data.valid, too: the loss refuses rows without scores there as well."""
    paths = ["a.jsonl", "b.jsonl"]

    def train(names: list[str]) -> list[Any]:
        if weights is None:
            return names
        return [{"path": name, "weight": weight} for name, weight in zip(names, weights, strict=True)]

    found = stages(tmp_path, {"train": train(paths), "valid": ["c.jsonl"]})
    scored = {
        each.words[each.words.index("--data") + 1]: str(each.done)
        for each in found.values()
        if each.kind == "score"
    }
    assert list(scored) == [*paths, "c.jsonl"]
    run = found["pear/seed-0/sft"]
    data = yaml.safe_load(run.text)["data"]
    assert data["train"] == train([scored[path] for path in paths])
    assert data["valid"] == [scored["c.jsonl"]]
    assert run.needs == tuple(each.name for each in found.values() if each.kind == "score")
    assert [name.rpartition("-")[0][:14] for name in run.needs] == ["scores/writer-"] * 3
    assert yaml.safe_load(found["sft/seed-0/sft"].text)["data"]["valid"] == ["c.jsonl"]


def test_arms_with_one_writer_share_its_scores_and_another_writer_has_its_own(tmp_path: Path) -> None:
    found = stages(
        tmp_path,
        {"train": ["a.jsonl"]},
        block={"loss": {"name": "pear", "variant": "block"}, "score": {"checkpoint": "writer"}},
        other={"loss": {"name": "pear"}, "score": {"checkpoint": "elsewhere/writer"}},
    )
    scores = [each for each in found.values() if each.kind == "score"]
    assert len(scores) == 2
    needs = {arm: found[f"{arm}/seed-0/sft"].needs for arm in ("pear", "block", "other")}
    assert needs["pear"] == needs["block"] == (scores[0].name,)
    assert needs["other"] == (scores[1].name,)
    trained = [yaml.safe_load(found[f"{arm}/seed-0/sft"].text)["data"]["train"] for arm in ("pear", "block")]
    assert trained == [[str(scores[0].done)]] * 2
    # A further arm in front of the others changes nothing of theirs.
    more = stages(
        tmp_path, {"train": ["a.jsonl"]}, a={"loss": {"name": "pear"}, "score": {"checkpoint": "a"}}
    )
    assert more["pear/seed-0/sft"].text == found["pear/seed-0/sft"].text


def overlapping(root: Path, prompts: list[dict], demonstrations: list[dict]) -> str:
    """What is said of held-out rows where 1 + 1 and 2 + 2 are demonstrated, and 3 + 3 is rewarded."""
    sft, grpo = runs_of(root)
    asked = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1 +  1"}]
    rows = {
        "sft": [
            {"prompt": asked, "response": "2"},
            {
                "messages": [
                    {"role": "user", "content": "Hello"},
                    {"role": "assistant", "content": "Hello."},
                    {"role": "user", "content": "2 + 2"},
                    {"role": "assistant", "content": "4"},
                ]
            },
        ],
        "grpo": [{"prompt": "3 + 3", "answer": "6"}],
        "prompts": prompts,
        "demonstrations": demonstrations,
    }
    for name, each in rows.items():
        for number, row in enumerate(each):  # one format to a file
            (root / f"{name}{number}.jsonl").write_text(json.dumps(row) + "\n")
    sft["data"]["train"] = [str(root / "sft0.jsonl"), str(root / "sft1.jsonl")]
    grpo["data"]["train"] = [str(root / "grpo0.jsonl")]
    section = {
        "prompts": [str(root / f"prompts{number}.jsonl") for number in range(len(prompts))],
        "demonstrations": str(root / "demonstrations0.jsonl"),
    }
    tree = {
        "out_dir": str(root / "out"),
        "seeds": [0],
        "base": {"sft": sft, "grpo": grpo, "eval": section},
        "arms": {},
    }
    (root / "compare.yaml").write_text(yaml.safe_dump(tree))
    config = read_compare_config(root / "compare.yaml", [])
    found = {each.kind: each for each in stages_of(config)}
    runs: Any = [
        config_from_text(found["sft"].text, source="sft"),
        config_from_text(found["grpo"].text, source="grpo", schema=GrpoConfig),
    ]
    try:
        _check_overlap(config, *runs)
    except UserError as error:
        return str(error).replace(str(root), "")
    return ""


FRESH = [{"prompt": "5 + 5", "answer": "10"}]
SHOWN = [{"prompt": "6 + 6", "response": "12"}]


@pytest.mark.parametrize(
    ("prompts", "demonstrations", "said"),
    [
        (FRESH, SHOWN, ""),
        (
            [*FRESH, {"prompt": "1 + 1\n", "answer": "2"}],
            SHOWN,
            "prompts: 1 of 2 .*prompts1.* what .*sft0",
        ),
        ([{"prompt": "3 + 3", "answer": "6"}] * 2, SHOWN, r"prompts: 2 of 2 .* what .*grpo0\.jsonl:1 asks"),
        (
            FRESH,
            [{"prompt": "1 + 1", "response": "3"}],
            "demonstrations: 1 of 1 .* set base.eval.overlap: allow",
        ),
        # What follows another turn is another question.
        ([{"prompt": "2 + 2", "answer": "4"}], SHOWN, ""),
        ([{"prompt": "Hello", "answer": "4"}], SHOWN, "prompts: 1 of 1 .*sft1"),
    ],
)
def test_held_out_questions_that_are_trained_on_are_refused_by_file_and_number(
    prompts: list[dict], demonstrations: list[dict], said: str, tmp_path: Path
) -> None:
    found = overlapping(tmp_path, prompts, demonstrations)
    assert re.search(said, found) if said else not found
