"""The options of `sftrl plan`; nothing heavy is imported here, since every command builds the parser."""

from __future__ import annotations

import argparse
from pathlib import Path

_RATES = (
    ("peak-tflops", 989.0, "dense bf16, of one GPU"),
    ("hbm", 3350.0, "GB/s of a GPU's memory"),
    ("nvlink", 450.0, "GB/s of a GPU inside the node, in one direction"),
    ("network", 50.0, "GB/s of a GPU between nodes, in one direction"),
    ("host-link", 10.0, "GB/s between a GPU and its host"),
    ("efficiency", 0.6, "share of peak and memory rate that kernels reach: an assumption"),
    ("link-efficiency", 0.8, "share of the links' rates that collectives reach: an assumption"),
)


def add_plan_arguments(plan: argparse.ArgumentParser) -> None:
    """What the command line of `sftrl plan` may hold."""
    plan.add_argument("config", help="YAML file of a run; of its model only config.json is read")
    plan.add_argument("overrides", nargs="*", metavar="key=value", help="for example parallel.tp=8")
    plan.add_argument("--gpus", type=_count, required=True, help="GPUs of the job")
    plan.add_argument("--gpu-memory", default="80GB", help="of one GPU; GB is 10^9 bytes, GiB 2^30 (80GB)")
    plan.add_argument("--search", action="store_true", help="list the fastest layouts that fit")
    plan.add_argument("--top", type=_count, default=8, help="layouts in that list (8)")
    plan.add_argument("--mean-length", type=_count, help="tokens of a sequence in estimates (the longest)")
    plan.add_argument("--json", type=Path, help="write everything to this file, too")
    plan.add_argument("--gpus-per-node", type=_count, default=8, help="GPUs joined by NVLink (8)")
    plan.add_argument("--reserve", default="6GB", help="of a GPU for CUDA, NCCL and the allocator (6GB)")
    for name, default, meaning in _RATES:
        plan.add_argument(f"--{name}", type=float, default=default, help=f"{meaning} ({default:g})")
    plan.add_argument(
        "--kernels",
        choices=("transformer_engine", "torch"),
        default="transformer_engine",
        help="whose layers: torch where Transformer Engine is not installed (transformer_engine)",
    )


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, got {text}")
    return int(text)
