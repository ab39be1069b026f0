"""The command line of `sftrl eval`; nothing heavy is imported before it runs."""

from __future__ import annotations

import argparse
from pathlib import Path

EXPLAINED = {
    "help": "accuracy, pass@k, entropy and lengths of a checkpoint, with intervals",
    "description": "Greedy and sampled responses to held-out prompts, judged by the rewards of a GRPO run's "
    "YAML. Each response is kept; a killed evaluation goes on where it was. On several processes: "
    "torchrun --nproc-per-node N -m megatron_sftrl eval run.yaml ...",
    "example": "rollout.temperature=0.6",
}


def add_eval_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command line may hold beside the YAML file and its overrides."""
    parser.add_argument("--out", type=Path, required=True, help="folder for responses and results")
    parser.add_argument(
        "--checkpoint", type=Path, help="step or run directory; the run's own latest when not given"
    )
    parser.add_argument(
        "--prompts", type=Path, nargs="+", default=[], help="rows of prompts and answers (data.valid)"
    )
    parser.add_argument(
        "--samples", type=int, default=8, help="drawn for each prompt beside the greedy one; 0 for none (8)"
    )
    parser.add_argument("--k", type=int, nargs="+", help="of pass@k (1 and --samples)")
    parser.add_argument("--seed", type=int, default=0, help="of the responses and the intervals (0)")


def eval_command(parsed: argparse.Namespace) -> None:
    """Run it."""
    from megatron_sftrl.config.load import load_config
    from megatron_sftrl.config.schema import GrpoConfig

    config = load_config(parsed.config, parsed.overrides, schema=GrpoConfig)
    from megatron_sftrl.apps.evaluate.run import EvalRequest, run_evaluation

    run_evaluation(
        config,
        EvalRequest(
            out=parsed.out,
            checkpoint=parsed.checkpoint,
            prompts=tuple(parsed.prompts),
            num_samples=parsed.samples,
            ks=tuple(parsed.k or sorted({1, max(parsed.samples, 1)})),
            seed=parsed.seed,
        ),
    )
