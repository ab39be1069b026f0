"""rollout.router_replay: a mixture trains on the experts that its engine chose, in every layout."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.e2e.grpo_project import GrpoProject, samples_of
from tests.e2e.product import sftrl, sftrl_each
from tests.e2e.project import VOCAB_SIZE, make_tokenizer, metrics_of, without_timing
from tests.e2e.test_grpo_layouts import assert_same_run
from tests.grid import HOW_TO_RUN_ALL, is_full, often
from tests.hf_models import write_model

MIXTURE = (
    "model.architecture.family=qwen3_moe", "model.architecture.num_experts=4",
    "model.architecture.experts_per_token=2",
)  # fmt: skip
REPLAY = (*MIXTURE, "rollout.router_replay=true")
CHANGED = "router_replay/changed"


def test_where_the_engine_chose_what_the_trainer_would_the_run_is_the_same(
    grpo: GrpoProject, tmp_path: Path
) -> None:
    """With one update a step: in later ones the policy's own choice moves away from the engine's."""
    one = ("rollout.passes=1", "batch.global_size=16")
    for done in sftrl_each(
        [
            grpo.command(tmp_path / "own", *MIXTURE, *one),
            grpo.command(tmp_path / "replayed", *REPLAY, *one),
        ]
    ):
        done.expect(0)
    assert samples_of(tmp_path / "own") == samples_of(tmp_path / "replayed")
    replayed = metrics_of(tmp_path / "replayed")
    assert [row.pop(CHANGED) for row in replayed] == [0.0] * 3
    assert without_timing(replayed) == without_timing(metrics_of(tmp_path / "own"))


LONG = ("optim={lr: 0.05, eps: 1.0e-4}", "loss.kl_coefficient=0.1", "reference={kind: frozen}")
LORA = "lora={rank: 8, alpha: 16}"
RUNS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {  # what both say, and what the second one says
    "tp2, sequence parallel, prompts shared": (
        ("rollout.ahead=1", "rollout.passes=1", "batch.global_size=16", LORA),
        (
            "parallel={tp: 2, sequence_parallel: true}",
            "batch={global_size: 16, packing: true, max_tokens: 48}",
            "rollout.share_prompts=true",
        ),
    ),
    "pp2, vp2": ((), ("parallel={pp: 2, vp: 2}", "train.recompute=full")),
    "cp2": ((), ("parallel.cp=2",)),
    "ep2": ((), ("parallel.ep=2",)),
}
SELDOM = ("pp2, vp2", "cp2", "ep2")


@pytest.mark.parametrize("name", often(RUNS, rarely=SELDOM))
def test_two_processes_follow_one(name: str, grpo: GrpoProject, tmp_path: Path) -> None:
    shared, layout = RUNS[name]
    model = REPLAY
    if LORA in shared:
        base = write_model(tmp_path / "base", "qwen3_moe", vocab_size=VOCAB_SIZE)
        make_tokenizer(base)
        model = ("model.architecture=null", f"model.hf={base}", "rollout.router_replay=true")
    sftrl(*grpo.command(tmp_path / "one", *model, *LONG, *shared))
    sftrl(*grpo.command(tmp_path / "two", *model, *LONG, *shared, *layout), ranks=2)
    # A shared prompt's choices are counted once.
    except_for = (CHANGED,) if "rollout.share_prompts=true" in layout else ()
    assert_same_run(tmp_path / "two", tmp_path / "one", except_for=except_for)
    rows = metrics_of(tmp_path / "one")
    assert any(row[CHANGED] > 0 for row in rows), "the policy's own choice was always the engine's"


@pytest.mark.skipif(not is_full(), reason=HOW_TO_RUN_ALL)
def test_generators_elsewhere_send_the_experts_of_all_their_ranks(grpo: GrpoProject, tmp_path: Path) -> None:
    sftrl(*grpo.command(tmp_path / "one", *REPLAY, *LONG))
    apart = ("rollout.devices=2", "rollout.tp=2")
    sftrl(*grpo.command(tmp_path / "apart", *REPLAY, *LONG, *apart), ranks=3)
    apart_tokens, one_tokens = (
        [row["response_tokens"] for row in samples_of(tmp_path / name)] for name in ("apart", "one")
    )
    assert apart_tokens == one_tokens
    for ours, truth in zip(metrics_of(tmp_path / "apart"), metrics_of(tmp_path / "one"), strict=True):
        for name in ("loss", "grad_norm", CHANGED):
            assert ours[name] == pytest.approx(truth[name], rel=2e-5, abs=2e-5)
