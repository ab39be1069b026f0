"""The command line of `sftrl eval`; nothing heavy is imported before it runs."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING

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
    "help": "is a checkpoint of SFT ready for RL? entropy, equal groups, head-room, ends, format",
    "description": "What `sftrl eval` does, at temperature 1, and each of five numbers beside its limit; "
    "ends with 1 where one is beyond it.",
    "example": "data.valid=[held_out.jsonl]",
}


def _limit(default: float, meaning: str, source: str) -> float:
    return field(default=default, metadata={"meaning": meaning, "source": source})


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """Where a number says that RL would start badly, what the number is, and whose limit that is.

    Below min_entropy the policy has collapsed before RL begins. With more equal groups than max_equal_groups,
    the four rounds of dynamic sampling do not fill a step. RL raises what is drawn now and then already: the
    head-room's interval must lie above min_headroom. Rewards of responses that were cut are those of other
    texts (min_finished). Beyond max_format_loss, RL would first teach the format.
    """

    min_entropy: float = _limit(0.18, "nats per drawn token at temperature 1", "arXiv:2606.18487")
    max_equal_groups: float = _limit(
        0.8, "share of prompts whose responses are all right or all wrong", "filters.max_rounds"
    )
    min_headroom: float = _limit(
        0.0, "pass@n less pass@1, n being --samples; the low end of its interval counts", "arXiv:2510.01624"
    )
    min_finished: float = _limit(0.9, "share of responses that reach their end", "arXiv:2503.14476")
    max_format_loss: float = _limit(
        0.1, "lenient less strict accuracy: right answers in the wrong format", "the run's rewards"
    )


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


def add_handoff_arguments(parser: argparse.ArgumentParser) -> None:
    """The same, and a limit for each number."""
    add_eval_arguments(parser)
    for each in fields(Limits):
        option, meaning = f"--{each.name.replace('_', '-')}", each.metadata["meaning"]
        help = f"{meaning} ({each.default:g}, {each.metadata['source']})"
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
        num_samples=parsed.samples,
        ks=tuple(parsed.k or sorted({1, max(parsed.samples, 1)})),
        seed=parsed.seed,
    )
