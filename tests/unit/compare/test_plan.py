"""Which commands a comparison is made of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_sftrl.apps.compare.config import read_compare_config
from megatron_sftrl.apps.compare.plan import Stage, stages_of
from tests.e2e.compare_runs import runs_of


def stages(root: Path, data: dict[str, Any]) -> dict[str, Stage]:
    """Of the arm pear, under one seed, whose demonstrations are scored."""
    sft, grpo = runs_of(root)
    sft["data"].update(data)
    tree = {
        "out_dir": str(root / "out"),
        "seeds": [0],
        "base": {"sft": sft, "grpo": grpo, "eval": {"prompts": ["p.jsonl"]}},
        "arms": {"pear": {"loss": {"name": "pear"}, "score": {"checkpoint": "writer"}}},
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
    assert run.needs == ("pear/score-0", "pear/score-1", "pear/score-2")
    assert yaml.safe_load(found["sft/seed-0/sft"].text)["data"]["valid"] == ["c.jsonl"]
