"""`sftrl doctor loss` proves that a loss means the same under every layout, `sftrl doctor reward` finds what
a reward pays for, both on the user's machine. Here: their options; the command line loads nothing more.
"""

from __future__ import annotations

import argparse
from pathlib import Path


def add_loss_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command line of `sftrl doctor loss` may hold."""
    parser.add_argument("--loss", metavar="NAME", help="registered name; not needed for a file of one loss")
    parser.add_argument(
        "--module", action="append", default=[], metavar="FILE", help="file of your own losses (repeatable)"
    )
    parser.add_argument(
        "--option", action="append", default=[], metavar="key=value", help="of the loss, e.g. beta=5.0"
    )
    parser.add_argument(
        "--only", action="append", default=[], metavar="PROPERTY", help="look at this one (repeatable)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the step that is drawn (0)")
    parser.add_argument(
        "--timeout", type=float, default=30.0, metavar="S", help="seconds for a layout of several ranks (30)"
    )


def add_reward_arguments(parser: argparse.ArgumentParser) -> None:
    """What the command line of `sftrl doctor reward` may hold."""
    add = parser.add_argument
    add("config", nargs="?", help="YAML file of a run: its rewards, on its data.train")
    add("overrides", nargs="*", metavar="key=value", help="for example reward_workers.seconds=60")
    add("--reward", metavar="NAME", help="without a run: a registered reward; not needed for a file of one")
    add("--module", action="append", default=[], metavar="FILE", help="file of your own rewards (repeatable)")
    add("--option", action="append", default=[], metavar="key=value", help="of the reward, e.g. decimals=3")
    add("--data", action="append", default=[], type=Path, metavar="FILE", help="its rows (repeatable)")
    add(
        "--task",
        action="append",
        default=[],
        metavar="NAME",
        help="or rows that this task of reasoning_gym makes (repeatable)",
    )
    add("--rows", type=int, default=64, metavar="N", help="rows that are drawn, or made of each task (64)")
    add("--seed", type=int, default=0, help="of the draw, and of the tasks (0)")
    add("--json", type=Path, metavar="FILE", help="write everything to this file, too")
