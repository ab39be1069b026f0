"""The command line of `sftrl coupling`; nothing heavy is imported before it runs."""

from __future__ import annotations

import argparse
from pathlib import Path

COUPLING = {
    "help": "what SFT did to the reward, what RL did to the loss of SFT, and how the weights turned",
    "description": "Evaluates the checkpoints of several stages, in the order of training, on the same "
    "prompts and demonstrations; then signed changes with intervals, KL between stages, cosines of "
    "gradients, and rotations of singular vectors. What is done is passed over. On several processes: "
    "torchrun --nproc-per-node N -m megatron_sftrl coupling run.yaml ...",
    "example": "parallel.tp=2",
}


def add_coupling_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command line may hold beside the YAML file and its overrides."""
    parser.add_argument("--out", type=Path, required=True, help="folder for everything that is measured")
    parser.add_argument(
        "--stage",
        dest="stages",
        action="append",
        type=_stage,
        default=[],
        metavar="NAME=DIR",
        help="step, run or Hugging Face directory; repeatable, the first stage first",
    )
    parser.add_argument(
        "--along",
        dest="stages",
        action="append",
        type=_along,
        metavar="NAME=RUN_DIR",
        help="every checkpoint of a run, each a stage NAME-STEP",
    )
    parser.add_argument(
        "--prompts", type=Path, nargs="+", default=[], help="held-out prompts and answers (data.valid)"
    )
    parser.add_argument(
        "--demonstrations", type=Path, required=True, help="held-out rows, which SFT would learn"
    )
    parser.add_argument("--samples", type=int, default=8, help="responses drawn for each prompt (8)")
    parser.add_argument("--k", type=int, nargs="+", help="of pass@k (1 and --samples)")
    parser.add_argument("--seed", type=int, default=0, help="of the responses and the intervals (0)")
    parser.add_argument(
        "--rank", type=int, default=16, help="singular vectors whose rotation is told; 0 for none (16)"
    )


def coupling_command(parsed: argparse.Namespace) -> None:
    """Run `sftrl coupling`."""
    from megatron_sftrl.config.load import load_config
    from megatron_sftrl.config.schema import GrpoConfig

    config = load_config(parsed.config, parsed.overrides, schema=GrpoConfig)
    from megatron_sftrl.apps.coupling.run import run_coupling
    from megatron_sftrl.apps.coupling.stages import CouplingRequest, stages_of

    request = CouplingRequest(
        out=parsed.out,
        stages=stages_of(parsed.stages),
        prompts=tuple(parsed.prompts),
        demonstrations=parsed.demonstrations,
        num_samples=parsed.samples,
        ks=tuple(parsed.k or sorted({1, max(parsed.samples, 1)})),
        seed=parsed.seed,
        rank=parsed.rank,
    )
    run_coupling(config, request)


def _stage(text: str) -> tuple[str, Path, bool]:
    name, separator, path = text.partition("=")
    if not (name and separator and path):
        raise argparse.ArgumentTypeError(f"expected NAME=DIR, got {text}")
    return name, Path(path).expanduser(), False


def _along(text: str) -> tuple[str, Path, bool]:
    return (*_stage(text)[:2], True)
