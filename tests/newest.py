"""Short runs whose numbers must not depend on megatron-core's version: python -m tests.newest FOLDER.

The first environment that comes leaves its curves and a checkpoint in FOLDER; each later one must have the
same curves, and goes on from that checkpoint. tests/run.sh calls it with the oldest and the newest version.
"""

from __future__ import annotations

import functools
import importlib.metadata
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.distributed.checkpoint_runs import NUM_STEPS, Span, run_span
from tests.distributed.mixture_runs import QWEN3_MOE, run_mixture
from tests.distributed.test_layouts import Curve, assert_same_curve, train
from tests.e2e.grpo_project import make_grpo_project
from tests.e2e.product import sftrl
from tests.e2e.project import make_project, metrics_of
from tests.ranks import close_ranks, run_ranks

OVERLAPPED = {"distributed_optimizer": True, "overlap_grad_reduce": True, "overlap_param_gather": True}
LAYOUTS: dict[str, tuple[int, dict[str, Any], str, int]] = {
    "one process": (1, {}, "sft", 1),
    "dp2, distributed optimizer": (2, OVERLAPPED, "sft", 2),
    "tp2, sequence parallel": (2, {"tp": 2, "sequence_parallel": True}, "curiosft", 2),
    "pp2, vp2": (2, {"pp": 2, "vp": 2}, "gift", 4),
    "cp2": (2, {"cp": 2}, "pear", 2),
}
HALF = NUM_STEPS // 2
balanced = functools.partial(run_mixture, aux_loss_coeff=1.0)


def runs(first_checkpoint: Path, own: Path) -> dict[str, Callable[[], Curve]]:
    """By name: a run's (loss, gradient norm, something else) of each step.

    Args:
        first_checkpoint: of the first environment; made where there is none yet.
        own: an empty folder.
    """
    layouts = {name: functools.partial(layout_run, *layout) for name, layout in LAYOUTS.items()}
    return {
        **layouts,
        "ep2, load balancing": expert_run,
        "its own checkpoint": functools.partial(resumed, own / "half"),
        "the first one's checkpoint": functools.partial(resumed, first_checkpoint),
        "grpo, in_process": functools.partial(grpo_run, own),
    }


def layout_run(num_ranks: int, parallel: dict[str, Any], loss: str, num_microbatches: int) -> Curve:
    return run_ranks(num_ranks, train, parallel, loss, num_microbatches, {})[0]


def expert_run() -> Curve:
    run = run_ranks(2, balanced, {"ep": 2, "distributed_optimizer": True}, QWEN3_MOE)[0]
    return [(loss, norm, balance) for (loss, norm, _), balance in zip(run.curve, run.balance, strict=True)]


def resumed(checkpoints: Path) -> Curve:
    """The second half of a run; the first one is done, and saved, where that has not happened."""
    if not checkpoints.exists():
        run_ranks(2, run_span, Span(parallel=OVERLAPPED, last=HALF, save=str(checkpoints)))
    outcome = run_ranks(2, run_span, Span(parallel={"tp": 2}, load=str(checkpoints)))[0]
    assert outcome.step == HALF
    return [(loss, norm, 0.0) for loss, norm in outcome.metrics]


def grpo_run(folder: Path) -> Curve:
    project = make_grpo_project(make_project(folder), folder)
    sftrl(*project.command(folder / "run"))
    return [(row["loss"], row["grad_norm"], row["reward/mean"]) for row in metrics_of(folder / "run")]


def main(folder: Path) -> None:
    """Write curves.json, or compare with it.

    Raises:
        AssertionError: another number, with the name of the run.
    """
    version = importlib.metadata.version("megatron-core")
    file = folder / "curves.json"
    known = json.loads(file.read_text()) if file.exists() else None
    found: dict[str, Curve] = {}
    with tempfile.TemporaryDirectory() as own:
        for name, run in runs(folder / "half", Path(own)).items():
            found[name] = run()
            if known is not None:
                try:
                    assert_same_curve(found[name], known["curves"][name])
                except AssertionError as error:
                    raise AssertionError(f"{name}: {version} against {known['version']}: {error}") from None
            print(f"megatron-core {version}, {name}: {'the same' if known else 'written'}", flush=True)
    if known is None:
        file.write_text(json.dumps({"version": version, "curves": found}))
    elif known["version"] == version:
        raise AssertionError(f"both environments have megatron-core {version}")


if __name__ == "__main__":
    try:
        main(Path(sys.argv[1]))
    finally:
        close_ranks()
