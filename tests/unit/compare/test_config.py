"""What compare.yaml may say: names, shared settings, the bar; and how stages are started."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from megatron_sftrl.apps.compare.config import CompareConfig, arm_trees, read_compare_config
from megatron_sftrl.apps.compare.launch import StageFiles, _script, slots_of
from megatron_sftrl.errors import UserError

SFT = {
    "batch": {"global_size": 8, "aggregation": "sequence_mean"},
    "optim": {"lr": 1.0},
    "loss": {"name": "dft"},
}


def read(tmp_path: Path, arms: dict[str, Any], **changes: Any) -> CompareConfig:
    base = {"sft": SFT, "grpo": {}, "eval": {"prompts": ["a.jsonl"], "samples": 12}}
    tree = {"out_dir": str(tmp_path / "out"), "seeds": [0], "base": base, "arms": arms, **changes}
    path = tmp_path / "compare.yaml"
    path.write_text(yaml.safe_dump(tree))
    return read_compare_config(path, [])


def test_an_arm_replaces_its_loss_and_merges_what_else_it_may_change(tmp_path: Path) -> None:
    gift = {"loss": {"name": "gift"}, "reference": {"kind": "frozen"}, "optim": {"eps": 0.1}}
    trees = arm_trees(read(tmp_path, {"gift": gift, "same": {}}), SFT)
    assert list(trees) == ["sft", "gift", "same"]
    bar, arm, same = (trees[name][0] for name in trees)
    assert bar == {**SFT, "loss": {"name": "sft"}, "batch": {"global_size": 8, "aggregation": "token_mean"}}
    assert arm == {
        **SFT,
        "loss": {"name": "gift"},
        "reference": {"kind": "frozen"},
        "optim": {"lr": 1.0, "eps": 0.1},
    }
    assert same == SFT
    tuned = arm_trees(read(tmp_path, {"sft": {"loss": {"name": "sft"}, "optim": {"lr": 2.0}}}), SFT)
    assert tuned["sft"][0]["optim"] == {"lr": 2.0}


@pytest.mark.parametrize(
    ("arms", "message"),
    [
        ({"a": {"tokenizer": {"path": "x"}}}, "arms.a.tokenizer: all arms share tokenizer"),
        ({"a": {"model": {"hf": "x"}}}, "arms.a.model: all arms share model"),
        ({"a": {"batch": {"global_size": 4}}}, "arms.a.batch.global_size: all arms share it"),
        ({"a": {"optim": 3}}, "arms.a.optim: expected a section of keys, got 3"),
        ({"a": {"score": {"checkpoints": "x"}}}, "arms.a.score"),
        ({"sft": {"loss": {"name": "gift"}}}, "arms.sft: the name sft is for the plain loss"),
        ({"sft": {"loss": {"name": "sft"}, "batch": {"aggregation": "sequence_mean"}}}, "arms.sft: the name"),
        ({"a/b": {}}, "'a/b' names a directory"),
        ({"plots": {}}, "'plots' names a directory"),
        ({"Gift": {}, "gift": {}}, "'Gift' and 'gift' are the same directory"),
    ],
)
def test_an_arm_that_could_not_be_compared_is_refused_by_name(
    arms: dict[str, Any], message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        arm_trees(read(tmp_path, arms), SFT)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seeds": []}, "seeds .*: expected at least 1 item"),
        ({"seeds": [1, 1]}, "seeds: expected each once"),
        ({"arm": {}}, "unknown key 'arm' .*did you mean 'arms'"),
        (
            {"launch": {"kind": "local", "sbatch": ["-p"]}},
            "launch.sbatch has no effect on launch.kind: local",
        ),
        ({"launch": {"kind": "slurm", "at_once": 2}}, "launch.at_once has no effect on launch.kind: slurm"),
    ],
)
def test_a_comparison_that_makes_no_sense_is_refused(changes: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        read(tmp_path, {}, **changes)


def test_k_goes_in_powers_of_two_up_to_the_samples(tmp_path: Path) -> None:
    assert read(tmp_path, {}).base.eval.all_ks == (1, 2, 4, 8)


def test_stages_at_the_same_time_have_gpus_of_their_own(tmp_path: Path) -> None:
    launch = read(tmp_path, {}, launch={"at_once": 2, "nproc": 2}).launch
    assert slots_of(launch, ["3", "4", "5", "6", "7"]) == [["3", "4"], ["5", "6"]]
    assert slots_of(launch, []) == [[], []]
    with pytest.raises(UserError, match="at_once 2 times nproc 2 need 4 GPUs, and 3 are here"):
        slots_of(launch, ["0", "1", "2"])


def test_a_job_on_several_nodes_meets_at_the_first(tmp_path: Path) -> None:
    launch = read(tmp_path, {}, launch={"kind": "slurm", "nodes": 4, "nproc": 8}).launch
    script = _script(launch, ["sft", "a b.yaml"], StageFiles(place=tmp_path / "sft"))
    assert 'head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)' in script
    assert '--nnodes 4 --nproc-per-node 8 --rdzv-backend c10d --rdzv-id "$SLURM_JOB_ID"' in script
    assert "-m megatron_sftrl sft 'a b.yaml'" in script
