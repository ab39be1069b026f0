"""The command line of `sftrl eval`; nothing heavy is imported before it runs."""

from __future__ import annotations

import argparse
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_sftrl.apps.evaluate.limits import Limits

if TYPE_CHECKING:
    from megatron_sftrl.apps.evaluate.run import EvalRequest
    from megatron_sftrl.config.schema import GrpoConfig

EVAL = {
    "help": "accuracy, pass@k, entropy and lengths of a checkpoint, with intervals",
    "description": "Greedy and sampled responses to held-out prompts, judged by the rewards of a GRPO run's "
    "YAML. Each response is kept; a killed evaluation goes on where it was. On several processes: "
    "torchrun --nproc-per-node N -m megatron_sftrl eval run.yaml ...",
    "example": "rollout.temperature=0.6",
}
HANDOFF = {
    "help": "is a checkpoint of SFT ready for RL? entropy, equal groups, head-room, ends, format, KL",
    "description": "What `sftrl eval` does, at temperature 1, and each number beside its limit; "
    "ends with 1 where one is beyond it.",
    "example": "data.valid=[held_out.jsonl]",
}


def add_eval_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command line may hold beside the YAML file and its overrides."""
    parser.add_argument("--out", type=Path, required=True, help="folder for responses and results")
    parser.add_argument(
        "--checkpoint",
        type=Path,
        help="step, run or Hugging Face directory (the run's own latest)",
    )
    parser.add_argument(
        "--prompts", type=Path, nargs="+", default=[], help="rows of prompts and answers (data.valid)"
    )
    parser.add_argument(
        "--demonstrations",
        type=Path,
        help="held-out rows of demonstrations, whose likelihood is told as well",
    )
    parser.add_argument(
        "--base",
        type=Path,
        help="step, run or Hugging Face directory from which SFT began: KL(checkpoint || base) on the "
        "demonstrations is told as well",
    )
    parser.add_argument(
        "--samples", type=int, default=8, help="drawn for each prompt beside the greedy one; 0 for none (8)"
    )
    parser.add_argument("--k", type=int, nargs="+", help="of pass@k (1 and --samples)")
    parser.add_argument("--seed", type=int, default=0, help="of the responses and the intervals (0)")


def add_handoff_arguments(parser: argparse.ArgumentParser) -> None:
    """The same, and a limit for each number."""
    add_eval_arguments(parser)
    for each in fields(Limits):
        option, meaning = f"--{each.name.replace('_', '-')}", each.metadata["meaning"]
        default = "none" if each.default is None else f"{each.default:g}"
        help = f"{meaning} ({default}, {each.metadata['source']})"
        parser.add_argument(option, type=float, default=each.default, help=help)


def eval_command(parsed: argparse.Namespace) -> None:
    """Run `sftrl eval`."""
    config, request = _read(parsed)
    from megatron_sftrl.apps.evaluate.run import run_evaluation

    run_evaluation(config, request)


def handoff_command(parsed: argparse.Namespace) -> int:
    """Run `sftrl handoff`; the exit code is 1 where a number is beyond its limit."""
    config, request = _read(parsed)
    from megatron_sftrl.apps.evaluate.handoff import run_handoff

    limits = Limits(**{each.name: getattr(parsed, each.name) for each in fields(Limits)})
    return 0 if run_handoff(config, request, limits) else 1


def _read(parsed: argparse.Namespace) -> tuple[GrpoConfig, EvalRequest]:
    from megatron_sftrl.config.load import load_config
    from megatron_sftrl.config.schema import GrpoConfig

    config = load_config(parsed.config, parsed.overrides, schema=GrpoConfig)
    from megatron_sftrl.apps.evaluate.run import EvalRequest

    return config, EvalRequest(
        out=parsed.out,
        checkpoint=parsed.checkpoint,
        prompts=tuple(parsed.prompts),
        demonstrations=parsed.demonstrations,
        base=parsed.base,
        num_samples=parsed.samples,
        ks=tuple(parsed.k or sorted({1, max(parsed.samples, 1)})),
        seed=parsed.seed,
    )
